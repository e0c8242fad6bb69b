/* The fast twins of numerics/updates.py, which says what they compute and why: each byte is read and written once. */
#include "kernels.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

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

/* One parameter of a group; null where it has no such part. States are fp32, or codes. */
typedef struct { void *live, *rest; const void *gradient; void *state, *square; float *steps; int64_t count; } Tensors;

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

INLINE float take_decayed(int storage, int half, int decay, const void *live, const void *rest, const void *gradient,
                          int64_t i, Adam a) {
    float g = take(half, gradient, i, a.factor);
    return decay == COUPLED ? fmaf(a.decay, read_weight(storage, live, rest, i), g) : g;
}

INLINE float step_mean(float m, float g, Adam a) {
    int far = fabsf(a.first) >= 0.5f; /* torch's lerp starts from the nearer end */
    return fmaf(far ? a.first - 1.0f : a.first, g - m, far ? g : m);
}

INLINE float step_square(float v, float g, Adam a) { return fmaf(a.second * g, g, v * a.kept); }

INLINE float step_weight(int decay, float w, float m, float root, Adam a) {
    if (decay == DECOUPLED) w *= a.decay;
    return w + a.step * m / (root / a.correction + a.eps);
}

INLINE void adam(int storage, int half, int decay, void *live, void *rest, const void *gradient, float *exp_avg,
                 float *exp_avg_sq, int64_t start, int64_t end, Adam a) {
    FOR_BLOCK {
        float w = read_weight(storage, live, rest, i), g = take_decayed(storage, half, decay, live, rest, gradient, i, a);
        float m = step_mean(exp_avg[i], g, a), v = step_square(exp_avg_sq[i], g, a);
        exp_avg[i] = m, exp_avg_sq[i] = v;
        write_weight(storage, live, rest, i, step_weight(decay, w, m, sqrtf(v), a));
    }
}

/* The same with another function for square roots, which takes a block at once. */
INLINE void adam_with(Roots *roots, int storage, int half, int decay, void *live, void *rest, const void *gradient,
                      float *exp_avg, float *exp_avg_sq, int64_t start, int64_t end, Adam a) {
    float root[BLOCK];
    FOR_BLOCK {
        float g = take_decayed(storage, half, decay, live, rest, gradient, i, a);
        exp_avg[i] = step_mean(exp_avg[i], g, a), exp_avg_sq[i] = step_square(exp_avg_sq[i], g, a);
    }
    roots((int)(end - start), exp_avg_sq + start, root, MKL_MODE);
    FOR_BLOCK {
        float w = read_weight(storage, live, rest, i);
        write_weight(storage, live, rest, i, step_weight(decay, w, exp_avg[i], root[i - start], a));
    }
}

/* States in 8 bits, as numerics/codebooks keeps them: decoded, updated and encoded within the nearest cache. */
#define SPAN 256 /* numbers that share a scale; BLOCK holds whole ones */
#define LARGEST 1e18f /* gradients and states up to here have next states that are finite */

/* What stands beside `Tensors` whose states are codes: scales, and what `foresee` finds out about the next states. */
typedef struct { float *mean, *square; int64_t was_signed, is_signed, fits; } Scales;

/* The numbers that codes stand for, and the code of each fp16 number by its bits, negative ones first; without and with signs. */
typedef struct { const float *numbers[2]; const uint8_t *codes[2]; } Books;

#define FOR_SPAN _Pragma("omp simd") for (int i = 0; i < count; i++)
#define LOAD(storage, half) FOR_SPAN g[i] = take_decayed(storage, half, decay, live, rest, of->gradient, start + i, a);

static void load_gradients(int storage, int half, int decay, const Tensors *of, int64_t start, int count, Adam a, float *g) {
    const void *live = of->live, *rest = of->rest;
    EACH(LOAD)
}

/* The processor's own look-ups of 16 numbers at once are asked for by name: compilers take them only for processors they know. */
static void decode(const float *numbers, float scale, int count, const uint8_t *codes, float *x) {
    int i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= count; i += 16) {
        __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(codes + i)));
        _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_i32gather_ps(at, numbers, 4), _mm512_set1_ps(scale)));
    }
#endif
    for (; i < count; i++) x[i] = numbers[codes[i]] * scale;
}

/* Bits of the nearest fp16 number, ties to even, of 0 <= x <= 1. Below 2^-14 they count in 2^-24, as the last bits of 0.5 + x. */
static inline int32_t to_fp16(float x) {
    uint32_t word = as_word(x), small = as_word(x + 0.5f) - 0x3F000000;
    return (int32_t)(x < 0x1p-14f ? small : ((word + 0xFFF + ((word >> 13) & 1)) >> 13) - (112 << 10));
}

/* Returns the scale. */
static float encode(const uint8_t *book, int is_signed, int count, const float *x, uint8_t *codes) {
    int32_t at[SPAN];
    float scale = 0.0f;
    _Pragma("omp simd reduction(max: scale)") for (int i = 0; i < count; i++) {
        float size = fabsf(x[i]);
        scale = size > scale ? size : scale;
    }
    float unit = scale > 0.0f ? scale : 1.0f;
    FOR_SPAN at[i] = to_fp16(fabsf(x[i]) / unit) + (x[i] < 0.0f ? 0 : 1 << 15);
    int i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= count; i += 16) { /* four bytes each, of which the first counts; no number above 1 is looked up */
        __m512i found = _mm512_i32gather_epi32(_mm512_loadu_si512(at + i), book, 1);
        _mm_storeu_si128((void *)(codes + i), _mm512_cvtepi32_epi8(found));
    }
#endif
    for (; i < count; i++) codes[i] = book[at[i]];
    if (!is_signed)
        FOR_SPAN codes[i] = (uint8_t)(codes[i] | ((codes[i] == 0) & (x[i] > 0.0f)));
    return scale;
}

/* Before anything is changed: whether the next states are finite, and whether a mean is negative; of the latter, the first block
 * of a tensor mostly tells. */
static void foresee(int storage, int half, int decay, const Tensors *of, int64_t start, int64_t end, Scales *scales, Adam a,
                    const Books *books) {
    const uint8_t *means = of->state;
    for (; start < end; start += SPAN) {
        int count = (int)(end - start < SPAN ? end - start : SPAN), negative = 0;
        float scale = scales->mean[start / SPAN], g[SPAN], m[SPAN];
        int unfit = !(scale <= LARGEST && scales->square[start / SPAN] <= LARGEST * LARGEST);
        int64_t known;
        load_gradients(storage, half, decay, of, start, count, a, g);
        _Pragma("omp simd reduction(|: unfit)") for (int i = 0; i < count; i++) unfit |= !(fabsf(g[i]) <= LARGEST);
        if (unfit) {
            _Pragma("omp atomic write") scales->fits = 0;
        }
        _Pragma("omp atomic read") known = scales->is_signed;
        if (known) continue;
        decode(books->numbers[scales->was_signed], scale, count, means + start, m);
        _Pragma("omp simd reduction(|: negative)") for (int i = 0; i < count; i++) negative |= step_mean(m[i], g[i], a) < 0.0f;
        if (negative) {
            _Pragma("omp atomic write") scales->is_signed = 1;
        }
    }
}

#define STORE(storage) \
    FOR_SPAN { \
        float w = read_weight(storage, live, rest, start + i); \
        write_weight(storage, live, rest, start + i, step_weight(decay, w, m[i], root[i], a)); \
    }

static void adam_narrow(Roots *roots, int storage, int half, int decay, const Tensors *of, int64_t start, int64_t end,
                        const Scales *scales, Adam a, const Books *books) {
    void *live = of->live, *rest = of->rest;
    for (; start < end; start += SPAN) {
        int count = (int)(end - start < SPAN ? end - start : SPAN), is_signed = (int)scales->is_signed;
        uint8_t *means = (uint8_t *)of->state + start, *squares = (uint8_t *)of->square + start;
        float *scale = scales->mean + start / SPAN, *square_scale = scales->square + start / SPAN;
        float g[SPAN], m[SPAN], v[SPAN], root[SPAN];
        load_gradients(storage, half, decay, of, start, count, a, g);
        decode(books->numbers[scales->was_signed], *scale, count, means, m);
        decode(books->numbers[0], *square_scale, count, squares, v);
        FOR_SPAN m[i] = step_mean(m[i], g[i], a), v[i] = step_square(v[i], g[i], a);
        if (roots) roots(count, v, root, MKL_MODE);
        else FOR_SPAN root[i] = sqrtf(v[i]);
        if (storage == WIDE) STORE(WIDE)
        else if (storage == SPLIT) STORE(SPLIT)
        else STORE(COPY)
        *scale = encode(books->codes[is_signed], is_signed, count, m, means);
        *square_scale = encode(books->codes[0], 0, count, v, squares);
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

/* The same with states in 8 bits. Tensors that do not fit are left as they are, and found in `scales`. */
void update_adam_narrow(int storage, int half, int decay, const Tensors *group, int64_t count, const float *factors,
                        Roots *roots, Scales *scales, const Books *books) {
    Adam a;
    memcpy(&a, factors, sizeof a);
    COUNT_ALL
    FOR_BLOCKS foresee(storage, half, decay, c.at, c.start, END, scales + (c.at - group), a, books);
    FOR_BLOCKS if (scales[c.at - group].fits)
        adam_narrow(roots, storage, half, decay, c.at, c.start, END, scales + (c.at - group), a, books);
    for (int64_t i = 0; i < count; i++)
        if (group[i].steps && scales[i].fits) *group[i].steps += 1.0f;
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

/* Whether all parameters of a group, which all have a number of steps, have made as many. */
void compare_steps(const Tensors *group, int64_t count, int *alike) {
    *alike = 1;
    for (int64_t i = 1; i < count; i++) *alike &= *group[i].steps == *group[0].steps;
}
