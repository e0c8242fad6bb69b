/* The fast twin of numerics/dropouts.py, which says what it computes and why. */
#include "kernels.h"

#define BLOCK 512

static inline void make_factors(Keys keys, int64_t start, int threshold, float scale, float *factors) {
    int16_t noise[BLOCK];
    draw_noise(keys, start, BLOCK, noise);
    for (int i = 0; i < BLOCK; i++) factors[i] = noise[i] < threshold ? 0.0f : scale;
}

static inline void drop_narrow(const uint16_t *source, const float *factors, int64_t here, uint16_t *target) {
    if (here == BLOCK)
        for (int i = 0; i < BLOCK; i++) target[i] = (uint16_t)to_bf16(from_bf16(source[i]) * factors[i]);
    else
        for (int i = 0; i < here; i++) target[i] = (uint16_t)to_bf16(from_bf16(source[i]) * factors[i]);
}

static inline void drop_wide(const float *source, const float *factors, int64_t here, float *target) {
    if (here == BLOCK)
        for (int i = 0; i < BLOCK; i++) target[i] = source[i] * factors[i];
    else
        for (int i = 0; i < here; i++) target[i] = source[i] * factors[i];
}

void drop(const void *source, int wide, int64_t count, int threshold, float scale, uint32_t first, uint32_t second,
          void *target) {
    Keys keys = {first, second};
    _Pragma("omp parallel for if (count > 64 * BLOCK)")
    for (int64_t start = 0; start < count; start += BLOCK) {
        float factors[BLOCK];
        int64_t here = count - start < BLOCK ? count - start : BLOCK;
        make_factors(keys, start, threshold, scale, factors);
        if (wide) drop_wide((const float *)source + start, factors, here, (float *)target + start);
        else drop_narrow((const uint16_t *)source + start, factors, here, (uint16_t *)target + start);
    }
}
