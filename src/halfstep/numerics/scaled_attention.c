/* The kernels of numerics/scaled_attention.py, which says what they compute and why. */
#include "kernels.h"

#define LIMIT 16384 /* keys a row; a row of fp32 stays on the stack */

enum { NONE, BOOL, FP32, BF16 };

typedef struct {
    int64_t inner, queries, keys; /* batches are outer x inner */
    int64_t outer_stride, inner_stride, query_stride, key_stride; /* of the mask, in numbers */
} Shape;

typedef struct { int threshold; float scale; Keys keys; } Drop;

INLINE void load_scores(const void *scores, int wide, int64_t count, float scale, float *x) {
    for (int64_t i = 0; i < count; i++) x[i] = read_number(scores, wide, i) * scale;
}

static inline void mask_scores(const void *mask, int kind, Shape s, int64_t row, int64_t count, float *x) {
    int64_t batch = row / s.queries, at = (batch / s.inner) * s.outer_stride + (batch % s.inner) * s.inner_stride
        + (row % s.queries) * s.query_stride;
    if (kind == BOOL)
        for (int64_t i = 0; i < count; i++) x[i] = ((const uint8_t *)mask)[at + i * s.key_stride] ? x[i] : -INFINITY;
    else if (kind == FP32)
        for (int64_t i = 0; i < count; i++) x[i] += ((const float *)mask)[at + i * s.key_stride];
    else if (kind == BF16)
        for (int64_t i = 0; i < count; i++) x[i] += from_bf16(((const uint16_t *)mask)[at + i * s.key_stride]);
}

/* Exponentials less the highest in place of the scores; returns 1 / their sum, or 0 where no key may be seen. */
static inline float exponentiate(float *x, int64_t count) {
    float highest = -INFINITY, sum = 0.0f;
    _Pragma("omp simd reduction(max : highest)")
    for (int64_t i = 0; i < count; i++) highest = x[i] > highest ? x[i] : highest;
    if (highest == -INFINITY) highest = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; i++) {
        x[i] = exponential(x[i] - highest);
        sum += x[i];
    }
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

/* 0 or the scale for each key of a row; rows start at even numbers of the noise. */
static inline void make_factors(Drop drop, int64_t row, int64_t keys, float *factors) {
    int16_t noise[LIMIT];
    int64_t even = keys + keys % 2;
    draw_noise(drop.keys, row * even, (int)even, noise);
    for (int64_t i = 0; i < keys; i++) factors[i] = noise[i] < drop.threshold ? 0.0f : drop.scale;
}

INLINE void write_weights(const float *x, float inverse, int wide, int64_t count, int64_t keys, void *weights) {
    for (int64_t i = 0; i < count; i++) write_number(weights, wide, i, x[i] * inverse);
    for (int64_t i = count; i < keys; i++) write_number(weights, wide, i, 0.0f);
}

INLINE void drop_weights(const void *weights, const float *factors, int wide, int64_t keys, void *dropped) {
    for (int64_t i = 0; i < keys; i++) write_number(dropped, wide, i, read_number(weights, wide, i) * factors[i]);
}

static inline void *find_row(void *rows, int wide, int64_t keys, int64_t row) {
    return (char *)rows + row * keys * (wide ? 4 : 2);
}

/* Keys that query `row` may see under the causal limit. */
static inline int64_t count_keys(int causal, int64_t queries, int64_t keys, int64_t row) {
    int64_t seen = row % queries + 1;
    return causal && seen < keys ? seen : keys;
}

/* Scores become weights, in place; `dropped` holds them after dropout, or is null. */
void weigh_keys(void *scores, int wide, int64_t rows, const int64_t *shape, float scale, int causal, const void *mask, int kind,
                int threshold, float drop_scale, uint32_t first, uint32_t second, void *dropped) {
    Shape s;
    Drop drop = {threshold, drop_scale, {first, second}};
    memcpy(&s, shape, sizeof s);
    _Pragma("omp parallel for if (rows * s.keys > 16384)")
    for (int64_t row = 0; row < rows; row++) {
        float x[LIMIT];
        void *here = find_row(scores, wide, s.keys, row);
        int64_t count = count_keys(causal, s.queries, s.keys, row);
        if (wide) load_scores(here, 1, count, scale, x);
        else load_scores(here, 0, count, scale, x);
        mask_scores(mask, kind, s, row, count, x);
        float inverse = exponentiate(x, count);
        if (wide) write_weights(x, inverse, 1, count, s.keys, here);
        else write_weights(x, inverse, 0, count, s.keys, here);
        if (!dropped) continue;
        make_factors(drop, row, s.keys, x);
        if (wide) drop_weights(here, x, 1, s.keys, find_row(dropped, 1, s.keys, row));
        else drop_weights(here, x, 0, s.keys, find_row(dropped, 0, s.keys, row));
    }
}

/* With factors g *= factor. dS = scale * p * (g - sum p g), in place of g. */
INLINE void write_gradients(const void *weights, const float *factors, int wide, int64_t count, int64_t keys, float scale,
                            void *gradients) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; i++)
        sum += read_number(weights, wide, i) * read_number(gradients, wide, i) * (factors ? factors[i] : 1.0f);
    for (int64_t i = 0; i < count; i++) {
        float g = read_number(gradients, wide, i) * (factors ? factors[i] : 1.0f);
        write_number(gradients, wide, i, read_number(weights, wide, i) * (g - sum) * scale);
    }
    for (int64_t i = count; i < keys; i++) write_number(gradients, wide, i, 0.0f);
}

/* Gradients of (dropped) weights become those of scores, in place; `dropped` gets the weights after dropout, or is null. */
void weigh_gradients(void *weights, void *gradients, int wide, int64_t rows, int64_t queries, int64_t keys, float scale,
                     int causal, int threshold, float drop_scale, uint32_t first, uint32_t second, void *dropped) {
    Drop drop = {threshold, drop_scale, {first, second}};
    _Pragma("omp parallel for if (rows * keys > 16384)")
    for (int64_t row = 0; row < rows; row++) {
        float x[LIMIT];
        void *p = find_row(weights, wide, keys, row), *g = find_row(gradients, wide, keys, row);
        int64_t count = count_keys(causal, queries, keys, row);
        if (!dropped) {
            if (wide) write_gradients(p, 0, 1, count, keys, scale, g);
            else write_gradients(p, 0, 0, count, keys, scale, g);
            continue;
        }
        make_factors(drop, row, keys, x);
        if (wide) drop_weights(p, x, 1, keys, find_row(dropped, 1, keys, row)), write_gradients(p, x, 1, count, keys, scale, g);
        else drop_weights(p, x, 0, keys, find_row(dropped, 0, keys, row)), write_gradients(p, x, 0, count, keys, scale, g);
    }
}
