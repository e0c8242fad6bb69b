/* The fast twins of numerics/packing.py, which says what they compute and why. */
#include "kernels.h"

#define GROUP 256
#define LANES 16 /* as many numbers as a vector register holds at most */

/* Numbers start ... start + GROUP of the source as fp32; beyond its end the last one again. */
static inline void load(const void *source, int wide, int64_t start, int64_t count, float *x) {
    int64_t here = count - start < GROUP ? count - start : GROUP;
    if (wide) {
        memcpy(x, (const float *)source + start, here * sizeof(float));
    } else {
        const uint16_t *halves = (const uint16_t *)source + start;
        if (here == GROUP) for (int i = 0; i < GROUP; i++) x[i] = from_bf16(halves[i]);
        else for (int i = 0; i < here; i++) x[i] = from_bf16(halves[i]);
    }
    for (int64_t i = here; i < GROUP; i++) x[i] = x[here - 1];
}

/* Whether all numbers are finite; their smallest and largest. Halves are folded onto each other: each pass is a plain loop
 * over arrays, where a reduction of floats would not be turned into vectors. */
static inline int find_range(const float *x, float *low, float *high) {
    float lows[GROUP], highs[GROUP];
    uint32_t words[GROUP], infinite = 0;
    memcpy(lows, x, sizeof lows);
    memcpy(highs, x, sizeof highs);
    memcpy(words, x, sizeof words);
    for (int i = 0; i < GROUP; i++) infinite |= (words[i] & 0x7F800000) == 0x7F800000;
    for (int half = GROUP / 2; half >= LANES; half /= 2)
        for (int i = 0; i < half; i++) {
            lows[i] = lows[i + half] < lows[i] ? lows[i + half] : lows[i];
            highs[i] = highs[i + half] > highs[i] ? highs[i + half] : highs[i];
        }
    *low = lows[0], *high = highs[0];
    for (int i = 1; i < LANES; i++) {
        *low = lows[i] < *low ? lows[i] : *low;
        *high = highs[i] > *high ? highs[i] : *high;
    }
    return !infinite;
}

static inline void pack_group(const float *x, int bits, Keys keys, int64_t start, uint8_t *codes, float *scales) {
    const float levels = (float)((1 << bits) - 1);
    float low, high, step, inverse;
    int finite = find_range(x, &low, &high);
    low += 0.0f; /* a negative zero becomes a positive one */
    step = (high - low) / levels;
    inverse = 1.0f / step;
    if (!(inverse <= 3.402823466e38f)) step = 0.0f, inverse = 0.0f; /* all the same, or too near to tell apart */
    if (!finite || !(high - low <= 3.402823466e38f)) {
        uint32_t nan = 0x7FC00000;
        memcpy(scales, &nan, 4);
        scales[1] = 0.0f;
        memset(codes, 0, GROUP * bits / 8);
        return;
    }
    scales[0] = low, scales[1] = step;
    int16_t noise[GROUP];
    int32_t chosen[GROUP];
    draw_noise(keys, start, GROUP, noise);
    for (int i = 0; i < GROUP; i++) {
        float draw = (float)noise[i] * 0x1p-16f + (0.5f + 0x1p-17f);
        int32_t code = (int32_t)((x[i] - low) * inverse + draw);
        chosen[i] = code < (1 << bits) - 1 ? code : (1 << bits) - 1;
    }
    if (bits == 8)
        for (int i = 0; i < GROUP; i++) codes[i] = (uint8_t)chosen[i];
    else /* the first half of a group in the low four bits, the second half above it */
        for (int i = 0; i < GROUP / 2; i++) codes[i] = (uint8_t)(chosen[i] | chosen[i + GROUP / 2] << 4);
}

static inline void unpack_group(const uint8_t *codes, const float *scales, int bits, float *x) {
    float low = scales[0], step = scales[1];
    if (bits == 8)
        for (int i = 0; i < GROUP; i++) x[i] = low + step * (float)codes[i];
    else
        for (int i = 0; i < GROUP / 2; i++) {
            x[i] = low + step * (float)(codes[i] & 15);
            x[i + GROUP / 2] = low + step * (float)(codes[i] >> 4);
        }
}

static inline void store(const float *x, int wide, int64_t start, int64_t count, void *target) {
    int64_t here = count - start < GROUP ? count - start : GROUP;
    if (wide) {
        memcpy((float *)target + start, x, here * sizeof(float));
        return;
    }
    uint16_t halves[GROUP];
    if (x[0] != x[0]) /* a group is NaN as a whole */
        for (int i = 0; i < GROUP; i++) halves[i] = 0x7FC0;
    else
        for (int i = 0; i < GROUP; i++) halves[i] = (uint16_t)to_bf16(x[i]);
    memcpy((uint16_t *)target + start, halves, here * sizeof(uint16_t));
}

#define FOR_GROUPS _Pragma("omp parallel for if (count > 64 * GROUP)") \
    for (int64_t group = 0; group < (count + GROUP - 1) / GROUP; group++)

#define PACK(bits, wide) FOR_GROUPS { \
    float x[GROUP]; \
    load(source, wide, group * GROUP, count, x); \
    pack_group(x, bits, keys, group * GROUP, codes + group * (GROUP * bits / 8), scales + 2 * group); \
}

#define UNPACK(bits, wide) FOR_GROUPS { \
    float x[GROUP]; \
    unpack_group(codes + group * (GROUP * bits / 8), scales + 2 * group, bits, x); \
    store(x, wide, group * GROUP, count, target); \
}

void pack_groups(const void *source, int wide, int64_t count, int bits, uint32_t first, uint32_t second,
                 uint8_t *codes, float *scales) {
    Keys keys = {first, second};
    if (bits == 8 && wide) PACK(8, 1)
    else if (bits == 8) PACK(8, 0)
    else if (wide) PACK(4, 1)
    else PACK(4, 0)
}

void unpack_groups(const uint8_t *codes, const float *scales, int bits, int64_t count, int wide, void *target) {
    if (bits == 8 && wide) UNPACK(8, 1)
    else if (bits == 8) UNPACK(8, 0)
    else if (wide) UNPACK(4, 1)
    else UNPACK(4, 0)
}

/* Bits of 0 or 1 a byte each, eight to a byte; the first one lowest. */
void pack_bits(const uint8_t *mask, int64_t count, uint8_t *codes) {
    int64_t whole = count / 8;
    for (int64_t i = 0; i < whole; i++) {
        uint64_t eight;
        memcpy(&eight, mask + 8 * i, 8);
        codes[i] = (uint8_t)((eight * 0x0102040810204080ull) >> 56);
    }
    if (count % 8) {
        codes[whole] = 0;
        for (int64_t i = 8 * whole; i < count; i++) codes[whole] |= (uint8_t)(mask[i] << (i % 8));
    }
}

void unpack_bits(const uint8_t *codes, int64_t count, uint8_t *mask) {
    for (int64_t i = 0; i < count / 8; i++)
        for (int j = 0; j < 8; j++) mask[8 * i + j] = codes[i] >> j & 1;
    for (int64_t i = count / 8 * 8; i < count; i++) mask[i] = codes[i / 8] >> (i % 8) & 1;
}
