/* What the kernels share. Numbers are computed by the same fp32 operations in the same order as in the readable truth, without
 * contraction (-ffp-contract=off), so that both give the same bits.
 *
 * Loops run over stretches held in local arrays, so that a compiler turns them into vector instructions by itself.
 * Exponentials and sums are the exception: their last bits are the compiler's, and what is promised about them is an error. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline)) /* for a loop made twice, for fp32 and for bf16: `wide` is a constant */

typedef struct { uint32_t first, second; } Keys;

static inline float from_bf16(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static inline uint32_t to_bf16(float x) { /* nearest, ties to even */
    uint32_t word;
    memcpy(&word, &x, 4);
    return (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
}

static inline uint32_t to_bf16_or_nan(float x) { /* for numbers of which any NaN may come: a carry would turn some into zero */
    return x == x ? to_bf16(x) : 0x7FC0;
}

/* Number i of fp32 or bf16 memory. */
INLINE float read_number(const void *source, int wide, int64_t i) {
    return wide ? ((const float *)source)[i] : from_bf16(((const uint16_t *)source)[i]);
}

INLINE void write_number(void *target, int wide, int64_t i, float x) {
    if (wide) ((float *)target)[i] = x;
    else ((uint16_t *)target)[i] = (uint16_t)to_bf16_or_nan(x);
}

/* A weight as numerics/updates keeps it. `storage` is a constant where these are called, so that loops are free of the choice. */
enum { WIDE, SPLIT, COPY };

static inline uint32_t as_word(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}

INLINE float read_weight(int storage, const void *live, const void *rest, int64_t i) {
    if (storage == WIDE) return ((const float *)live)[i];
    if (storage == COPY) return ((const float *)rest)[i];
    uint32_t word = ((uint32_t)((const uint16_t *)live)[i] << 16) + (uint32_t)(int32_t)((const int16_t *)rest)[i];
    float x;
    memcpy(&x, &word, 4);
    return x;
}

INLINE void write_weight(int storage, void *live, void *rest, int64_t i, float x) {
    if (storage == WIDE) {
        ((float *)live)[i] = x;
    } else if (storage == SPLIT) {
        uint32_t word = as_word(x);
        ((uint16_t *)live)[i] = (uint16_t)((word + 0x8000) >> 16);
        ((uint16_t *)rest)[i] = (uint16_t)word;
    } else {
        ((float *)rest)[i] = x;
        ((uint16_t *)live)[i] = (uint16_t)to_bf16_or_nan(x);
    }
}

/* One call for each way to keep a weight and each width of its gradient. */
#define EACH(call) \
    if (storage == WIDE && half) call(WIDE, 1) \
    else if (storage == WIDE) call(WIDE, 0) \
    else if (storage == SPLIT && half) call(SPLIT, 1) \
    else if (storage == SPLIT) call(SPLIT, 0) \
    else if (half) call(COPY, 1) \
    else call(COPY, 0)

/* Square roots of `count` numbers: MKL's vmsSqrt, where torch takes them from there. */
typedef void Roots(int count, const float *x, float *roots, int64_t mode);
#define MKL_MODE 0x140102 /* high accuracy, subnormals as they are, errors ignored: what ATen/cpu/vml.h asks for */

/* What a thread of a parallel region has of `count` things: [first, end). */
typedef struct { int64_t first, end; } Share;

static inline Share take_share(int64_t count) {
#ifdef _OPENMP
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return (Share){count * thread / threads, count * (thread + 1) / threads};
#else
    return (Share){0, count};
#endif
}

/* numerics/noise of `count` numbers, an even count from an even start: one hash for two neighbours. */
static inline void draw_noise(Keys keys, int64_t start, int count, int16_t *noise) {
    uint32_t pair = (uint32_t)(start / 2) + keys.first;
    for (int i = 0; i < count / 2; i++) {
        uint32_t x = pair + (uint32_t)i;
        x = (x ^ x >> 16) * 0x7FEB352Du;
        x = ((x ^ x >> 15) + keys.second) * 0x846CA68Bu;
        x ^= x >> 16;
        memcpy(noise + 2 * i, &x, 4);
    }
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c) /* an instruction; elsewhere it would be a call */
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* e^x for x <= 88, within 2 units in the last place; 0 where the true value is below 2^-126. NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; e^r by Taylor's series to r^7, 2^n by writing the exponent. Adding 1.5 * 2^23 rounds to a
 * whole number, which then stands in the low bits. */
static inline float exponential(float x) {
    float shifted = MULTIPLY_ADD(x, 1.44269504f, 12582912.0f), whole = shifted - 12582912.0f, power, y;
    float r = MULTIPLY_ADD(whole, -0.693145752f, x); /* ln 2 in two parts; the first has 15 bits, so its product is exact */
    r = MULTIPLY_ADD(whole, -1.42860677e-6f, r);
    uint32_t word;
    memcpy(&word, &shifted, 4);
    word = (word << 23) + 0x3F800000;
    memcpy(&power, &word, 4);
    y = MULTIPLY_ADD(r, 1.98412698e-4f, 1.38888889e-3f);
    y = MULTIPLY_ADD(y, r, 8.33333333e-3f);
    y = MULTIPLY_ADD(y, r, 4.16666667e-2f);
    y = MULTIPLY_ADD(y, r, 1.66666667e-1f);
    y = MULTIPLY_ADD(y, r, 0.5f);
    y = MULTIPLY_ADD(y * r, r, r); /* e^r - 1 */
    y = MULTIPLY_ADD(y, power, power);
    return x < -87.3365447f ? 0.0f : y;
}
