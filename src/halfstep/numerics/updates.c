/* The fast twins of numerics/updates.py, which says what they compute and why: each byte is read and written once. */
#include "kernels.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "torch rounds product and sum once; this instruction set has no such operation"
#endif

enum { WIDE, SPLIT, COPY };        /* how a weight is kept */
enum { PLAIN, DECOUPLED, COUPLED }; /* weight decay: none, of the weight itself, through the gradient */

typedef struct { float first, kept, second, correction, eps, step, decay, factor; } Adam;
typedef struct { float momentum, fresh, step, decay, factor; } Sgd;

#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}

INLINE uint32_t as_word(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}

INLINE float read(int storage, const void *live, const void *rest, int64_t i) {
    if (storage == WIDE) return ((const float *)live)[i];
    if (storage == COPY) return ((const float *)rest)[i];
    return as_float(((uint32_t)((const uint16_t *)live)[i] << 16) + (uint32_t)(int32_t)((const int16_t *)rest)[i]);
}

INLINE void write(int storage, void *live, void *rest, int64_t i, float x) {
    if (storage == WIDE) {
        ((float *)live)[i] = x;
    } else if (storage == SPLIT) {
        uint32_t word = as_word(x);
        ((uint16_t *)live)[i] = (uint16_t)((word + 0x8000) >> 16);
        ((uint16_t *)rest)[i] = (uint16_t)word;
    } else {
        ((float *)rest)[i] = x;
        ((uint16_t *)live)[i] = x == x ? (uint16_t)to_bf16(x) : 0x7FC0;
    }
}

INLINE float take(int half, const void *gradient, int64_t i, float factor) {
    float g = half ? from_bf16(((const uint16_t *)gradient)[i]) : ((const float *)gradient)[i];
    return g * factor;
}

#define BLOCK 1024 /* numbers: the unit that threads share out; all of its tensors stay in the nearest cache */
#define FOR_BLOCKS _Pragma("omp parallel for schedule(static) if (count > 32 * BLOCK)") \
    for (int64_t start = 0; start < count; start += BLOCK)
#define FOR_BLOCK _Pragma("omp simd") for (int64_t i = start; i < end; i++) /* no tensor overlaps another */

/* Square roots of `count` numbers: MKL's vmsSqrt. */
typedef void Roots(int count, const float *x, float *roots, int64_t mode);
#define MKL_MODE 0x140102 /* high accuracy, subnormals as they are, errors ignored: what ATen/cpu/vml.h asks for */

INLINE float step_mean(float m, float g, Adam a) {
    int far = fabsf(a.first) >= 0.5f; /* torch's lerp starts from the nearer end */
    return fmaf(far ? a.first - 1.0f : a.first, g - m, far ? g : m);
}

INLINE float step_square(float v, float g, Adam a) { return fmaf(a.second * g, g, v * a.kept); }

INLINE float step_weight(float w, float m, float root, Adam a) {
    return w + a.step * m / (root / a.correction + a.eps);
}

INLINE void adam(int storage, int half, int decay, void *live, void *rest, const void *gradient, float *exp_avg,
                 float *exp_avg_sq, int64_t start, int64_t end, Adam a) {
    FOR_BLOCK {
        float w = read(storage, live, rest, i), g = take(half, gradient, i, a.factor);
        if (decay == DECOUPLED) w *= a.decay;
        if (decay == COUPLED) g = fmaf(a.decay, w, g);
        float m = step_mean(exp_avg[i], g, a), v = step_square(exp_avg_sq[i], g, a);
        exp_avg[i] = m, exp_avg_sq[i] = v;
        write(storage, live, rest, i, step_weight(w, m, sqrtf(v), a));
    }
}

/* The same with another function for square roots, which takes a block at once. */
INLINE void adam_with(Roots *roots, int storage, int half, int decay, void *live, void *rest, const void *gradient,
                      float *exp_avg, float *exp_avg_sq, int64_t start, int64_t end, Adam a) {
    float root[BLOCK];
    FOR_BLOCK {
        float g = take(half, gradient, i, a.factor);
        if (decay == COUPLED) g = fmaf(a.decay, read(storage, live, rest, i), g);
        exp_avg[i] = step_mean(exp_avg[i], g, a), exp_avg_sq[i] = step_square(exp_avg_sq[i], g, a);
    }
    roots((int)(end - start), exp_avg_sq + start, root, MKL_MODE);
    FOR_BLOCK {
        float w = read(storage, live, rest, i);
        if (decay == DECOUPLED) w *= a.decay;
        write(storage, live, rest, i, step_weight(w, exp_avg[i], root[i - start], a));
    }
}

enum { NONE, BEGINS, GOES_ON }; /* momentum */

INLINE void sgd(int storage, int half, int momentum, int nesterov, void *live, void *rest, const void *gradient,
                float *buffer, int64_t start, int64_t end, Sgd s) {
    FOR_BLOCK {
        float w = read(storage, live, rest, i), g = take(half, gradient, i, s.factor);
        if (s.decay != 0.0f) g = fmaf(s.decay, w, g);
        if (momentum != NONE) {
            float b = momentum == BEGINS ? g : fmaf(s.fresh, g, buffer[i] * s.momentum);
            buffer[i] = b;
            g = nesterov ? fmaf(s.momentum, b, g) : b;
        }
        write(storage, live, rest, i, fmaf(s.step, g, w));
    }
}

/* One loop for each way to keep a weight and each width of its gradient; constants choose it, so that loops are free of them. */
#define EACH(call) \
    if (storage == WIDE && half) call(WIDE, 1) \
    else if (storage == WIDE) call(WIDE, 0) \
    else if (storage == SPLIT && half) call(SPLIT, 1) \
    else if (storage == SPLIT) call(SPLIT, 0) \
    else if (half) call(COPY, 1) \
    else call(COPY, 0)

#define END (start + BLOCK < count ? start + BLOCK : count)
#define ADAM(storage, half, decay) \
    { if (roots) FOR_BLOCKS adam_with(roots, storage, half, decay, live, rest, gradient, exp_avg, exp_avg_sq, start, END, a); \
      else FOR_BLOCKS adam(storage, half, decay, live, rest, gradient, exp_avg, exp_avg_sq, start, END, a); }
#define ADAM_PLAIN(storage, half) ADAM(storage, half, PLAIN)
#define ADAM_DECOUPLED(storage, half) ADAM(storage, half, DECOUPLED)
#define ADAM_COUPLED(storage, half) ADAM(storage, half, COUPLED)

void update_adam(int storage, int half, int decay, void *live, void *rest, const void *gradient, float *exp_avg,
                 float *exp_avg_sq, int64_t count, const float *numbers, Roots *roots) {
    Adam a;
    memcpy(&a, numbers, sizeof a);
    if (decay == PLAIN) { EACH(ADAM_PLAIN) }
    else if (decay == DECOUPLED) { EACH(ADAM_DECOUPLED) }
    else { EACH(ADAM_COUPLED) }
}

#define SGD(storage, half, momentum) \
    FOR_BLOCKS sgd(storage, half, momentum, nesterov, live, rest, gradient, buffer, start, END, s);
#define SGD_PLAIN(storage, half) SGD(storage, half, NONE)
#define SGD_BEGINS(storage, half) SGD(storage, half, BEGINS)
#define SGD_GOES_ON(storage, half) SGD(storage, half, GOES_ON)

void update_sgd(int storage, int half, int momentum, int nesterov, void *live, void *rest, const void *gradient,
                float *buffer, int64_t count, const float *numbers) {
    Sgd s;
    memcpy(&s, numbers, sizeof s);
    if (momentum == NONE) { EACH(SGD_PLAIN) }
    else if (momentum == BEGINS) { EACH(SGD_BEGINS) }
    else { EACH(SGD_GOES_ON) }
}
