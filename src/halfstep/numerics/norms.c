/* The kernel of norms.py, which says what it computes. */
#include "kernels.h"

enum { BLOCK = 1 << 16, CHUNK = 1 << 12, LANES = 64 };

/* Squares are taken and added up in fp32, LANES sums side by side, for a chunk; chunks are added up in fp64. */
INLINE double sum_squares(const void *source, int wide, int64_t first, int64_t end) {
    double total = 0.0;
    for (int64_t start = first; start < end; start += CHUNK) {
        float lanes[LANES] = {0};
        int64_t stop = start + CHUNK < end ? start + CHUNK : end, i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float x = read_number(source, wide, i + lane);
                lanes[lane] += x * x;
            }
        for (; i < stop; i++) {
            float x = read_number(source, wide, i);
            lanes[0] += x * x;
        }
        for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    }
    return total;
}

/* parts: address, count, and number of the first block of each tensor; sums: one for each block of all of them. */
void measure_squares(const int64_t *parts, int64_t tensors, int wide, int64_t blocks, double *sums) {
#pragma omp parallel for schedule(static) if (blocks > 2)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t low = 0, high = tensors - 1; /* the last tensor that begins at this block or before */
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (parts[3 * middle + 2] <= block) low = middle;
            else high = middle - 1;
        }
        const void *source = (const void *)parts[3 * low];
        int64_t count = parts[3 * low + 1], first = (block - parts[3 * low + 2]) * BLOCK;
        int64_t end = first + BLOCK < count ? first + BLOCK : count;
        sums[block] = wide ? sum_squares(source, 1, first, end) : sum_squares(source, 0, first, end);
    }
}
