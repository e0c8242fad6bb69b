/* What the kernels share. Numbers are computed by the same fp32 operations in the same order as in the readable truth, without
 * contraction (-ffp-contract=off), so that both give the same bits.
 *
 * Loops run over stretches held in local arrays, so that a compiler turns them into vector instructions by itself. */
#include <math.h>
#include <stdint.h>
#include <string.h>

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
