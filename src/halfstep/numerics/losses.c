/* The kernels of numerics/losses.py, which says what they compute and why. */
#include "kernels.h"

typedef struct { float highest, sum; } Row; /* of exponentials less the highest: logsumexp = highest + log(sum) */

/* Two passes over a row: the second one finds it in the cache. A maximum passes over NaN; the sum does not. */
INLINE Row read_row(const void *row, int wide, int64_t classes) {
    float highest = -INFINITY, sum = 0.0f;
    _Pragma("omp simd reduction(max : highest)")
    for (int64_t i = 0; i < classes; i++) {
        float x = read_number(row, wide, i);
        highest = x > highest ? x : highest;
    }
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < classes; i++) sum += exponential(read_number(row, wide, i) - highest);
    return (Row){highest, sum};
}

INLINE double sum_row(const void *row, int wide, int64_t classes) {
    double sum = 0.0;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < classes; i++) sum += (double)read_number(row, wide, i);
    return sum;
}

static inline double measure_loss(const void *row, int wide, int64_t classes, int64_t target, double smoothing, Row *found) {
    Row r = *found = wide ? read_row(row, 1, classes) : read_row(row, 0, classes);
    double above = log((double)r.sum) + (double)r.highest, loss = above - (double)read_number(row, wide, target);
    if (smoothing > 0.0) {
        double sum = wide ? sum_row(row, 1, classes) : sum_row(row, 0, classes);
        loss = (1.0 - smoothing) * loss + smoothing * (above - sum / (double)classes);
    }
    return loss;
}

static inline const void *find_row(const void *logits, int wide, int64_t stride, int64_t row) {
    return (const char *)logits + row * stride * (wide ? 4 : 2);
}

/* totals: the sum of the losses, the number of rows that count, and the number of targets that are no class. */
void measure_losses(const void *logits, int wide, int64_t rows, int64_t classes, int64_t stride, const int64_t *targets,
                    int64_t ignored, double smoothing, Row *found, double *losses, double *totals) {
    totals[0] = totals[1] = totals[2] = 0.0;
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] != ignored) totals[1] += 1.0, totals[2] += targets[row] < 0 || targets[row] >= classes;
    if (totals[2] > 0.0) return;
    _Pragma("omp parallel for if (rows * classes > 16384)")
    for (int64_t row = 0; row < rows; row++)
        losses[row] = targets[row] == ignored ? 0.0 : measure_loss(
            find_row(logits, wide, stride, row), wide, classes, targets[row], smoothing, found + row);
    for (int64_t row = 0; row < rows; row++) totals[0] += losses[row]; /* in one order, whatever the threads */
}

INLINE void write_row(const void *row, int wide, int64_t classes, Row r, float rest, float gradient, void *target) {
    float inverse = 1.0f / r.sum;
    _Pragma("omp simd")
    for (int64_t i = 0; i < classes; i++)
        write_number(target, wide, i, (exponential(read_number(row, wide, i) - r.highest) * inverse - rest) * gradient);
}

void write_gradients(const void *logits, int wide, int64_t rows, int64_t classes, int64_t stride, const int64_t *targets,
                     int64_t ignored, double smoothing, const Row *found, float gradient, void *result) {
    float rest = (float)(smoothing / (double)classes), mine = (float)(1.0 - smoothing);
    _Pragma("omp parallel for if (rows * classes > 16384)")
    for (int64_t row = 0; row < rows; row++) {
        const void *x = find_row(logits, wide, stride, row);
        char *y = (char *)result + row * classes * (wide ? 4 : 2);
        Row r = found[row];
        if (targets[row] == ignored) {
            memset(y, 0, classes * (wide ? 4 : 2));
            continue;
        }
        if (wide) write_row(x, 1, classes, r, rest, gradient, y);
        else write_row(x, 0, classes, r, rest, gradient, y);
        float share = exponential(read_number(x, wide, targets[row]) - r.highest) / r.sum;
        write_number(y, wide, targets[row], (share - mine - rest) * gradient);
    }
}
