/* The fast twins of numerics/updates.py, which says what they compute and why: each byte is read and written once. */
#include "kernels.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "torch rounds product and sum once; this instruction set has no such operation"
#endif

enum { PLAIN, DECOUPLED, COUPLED }; /* weight decay: none, of the weight itself, through the gradient */

typedef struct { float first, kept, second, correction, eps, step, decay, factor; } Adam;
typedef struct { float momentum, fresh, step, decay, factor; } Sgd;

INLINE float take(int half, const void *gradient, int64_t i, float factor) {
    float g = half ? from_bf16(((const uint16_t *)gradient)[i]) : ((const float *)gradient)[i];
    return g * factor;
}

/* One parameter of a group; null where it has no such part. */
typedef struct { void *live, *rest; const void *gradient; float *state, *square, *steps; int64_t count; } Tensors;

#define BLOCK 1024 /* numbers: the unit that threads share out; all of its tensors stay in the nearest cache */

/* A block on its way through all parameters of a group, which threads share out as if they were one: a thread starts once,
 * however small the tensors. */
typedef struct { const Tensors *at; int64_t start, left; } Cursor;

static int64_t count_blocks(const Tensors *of) { return (of->count + BLOCK - 1) / BLOCK; }

static Cursor find_place(const Tensors *group, int64_t blocks) {
    Share share = take_share(blocks);
    Cursor cursor = {group, share.first, share.end - share.first};
    if (cursor.left > 0)
        for (; cursor.start >= count_blocks(cursor.at); cursor.at++) cursor.start -= count_blocks(cursor.at);
    cursor.start *= BLOCK;
    return cursor;
}

static void go_on(Cursor *cursor) {
    cursor->start += BLOCK;
    if (--cursor->left > 0)
        while (cursor->start >= cursor->at->count) cursor->at++, cursor->start = 0;
}

#define FOR_BLOCKS \
    _Pragma("omp parallel if (numbers > 32 * BLOCK)") for (Cursor c = find_place(group, blocks); c.left > 0; go_on(&c))
#define FOR_BLOCK _Pragma("omp simd") for (int64_t i = start; i < end; i++) /* no tensor overlaps another */
#define END (c.start + BLOCK < c.at->count ? c.start + BLOCK : c.at->count)

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
        float w = read_weight(storage, live, rest, i), g = take(half, gradient, i, a.factor);
        if (decay == DECOUPLED) w *= a.decay;
        if (decay == COUPLED) g = fmaf(a.decay, w, g);
        float m = step_mean(exp_avg[i], g, a), v = step_square(exp_avg_sq[i], g, a);
        exp_avg[i] = m, exp_avg_sq[i] = v;
        write_weight(storage, live, rest, i, step_weight(w, m, sqrtf(v), a));
    }
}

/* The same with another function for square roots, which takes a block at once. */
INLINE void adam_with(Roots *roots, int storage, int half, int decay, void *live, void *rest, const void *gradient,
                      float *exp_avg, float *exp_avg_sq, int64_t start, int64_t end, Adam a) {
    float root[BLOCK];
    FOR_BLOCK {
        float g = take(half, gradient, i, a.factor);
        if (decay == COUPLED) g = fmaf(a.decay, read_weight(storage, live, rest, i), g);
        exp_avg[i] = step_mean(exp_avg[i], g, a), exp_avg_sq[i] = step_square(exp_avg_sq[i], g, a);
    }
    roots((int)(end - start), exp_avg_sq + start, root, MKL_MODE);
    FOR_BLOCK {
        float w = read_weight(storage, live, rest, i);
        if (decay == DECOUPLED) w *= a.decay;
        write_weight(storage, live, rest, i, step_weight(w, exp_avg[i], root[i - start], a));
    }
}

enum { NONE, BEGINS, GOES_ON }; /* momentum */

INLINE void sgd(int storage, int half, int momentum, int nesterov, void *live, void *rest, const void *gradient,
                float *buffer, int64_t start, int64_t end, Sgd s) {
    FOR_BLOCK {
        float w = read_weight(storage, live, rest, i), g = take(half, gradient, i, s.factor);
        if (s.decay != 0.0f) g = fmaf(s.decay, w, g);
        if (momentum != NONE) {
            float b = momentum == BEGINS ? g : fmaf(s.fresh, g, buffer[i] * s.momentum);
            buffer[i] = b;
            g = nesterov ? fmaf(s.momentum, b, g) : b;
        }
        write_weight(storage, live, rest, i, fmaf(s.step, g, w));
    }
}

#define COUNT_ALL \
    int64_t numbers = 0, blocks = 0; \
    for (int64_t i = 0; i < count; i++) numbers += group[i].count, blocks += count_blocks(group + i);

#define HERE c.at->live, c.at->rest, c.at->gradient
#define ADAM(storage, half, decay) \
    { if (roots) FOR_BLOCKS adam_with(roots, storage, half, decay, HERE, c.at->state, c.at->square, c.start, END, a); \
      else FOR_BLOCKS adam(storage, half, decay, HERE, c.at->state, c.at->square, c.start, END, a); }
#define ADAM_PLAIN(storage, half) ADAM(storage, half, PLAIN)
#define ADAM_DECOUPLED(storage, half) ADAM(storage, half, DECOUPLED)
#define ADAM_COUPLED(storage, half) ADAM(storage, half, COUPLED)

void update_adam(int storage, int half, int decay, const Tensors *group, int64_t count, const float *factors, Roots *roots) {
    Adam a;
    memcpy(&a, factors, sizeof a);
    COUNT_ALL
    if (decay == PLAIN) { EACH(ADAM_PLAIN) }
    else if (decay == DECOUPLED) { EACH(ADAM_DECOUPLED) }
    else { EACH(ADAM_COUPLED) }
    for (int64_t i = 0; i < count; i++)
        if (group[i].steps) *group[i].steps += 1.0f;
}

#define SGD(storage, half, momentum) \
    FOR_BLOCKS sgd(storage, half, momentum, nesterov, HERE, c.at->state, c.start, END, s);
#define SGD_PLAIN(storage, half) SGD(storage, half, NONE)
#define SGD_BEGINS(storage, half) SGD(storage, half, BEGINS)
#define SGD_GOES_ON(storage, half) SGD(storage, half, GOES_ON)

void update_sgd(int storage, int half, int momentum, int nesterov, const Tensors *group, int64_t count,
                const float *factors) {
    Sgd s;
    memcpy(&s, factors, sizeof s);
    COUNT_ALL
    if (momentum == NONE) { EACH(SGD_PLAIN) }
    else if (momentum == BEGINS) { EACH(SGD_BEGINS) }
    else { EACH(SGD_GOES_ON) }
}
