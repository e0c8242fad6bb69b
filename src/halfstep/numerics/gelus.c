/* The kernels of numerics/gelus.py, which says what they compute. Numbers are bf16; a table has an fp32 number for each of theirs. */
#include "kernels.h"

void look_up(const uint32_t *table, const uint16_t *x, uint16_t *y, int64_t count) { /* of a table whose numbers are bf16's */
    _Pragma("omp parallel for simd if (count > 16384)")
    for (int64_t i = 0; i < count; i++) y[i] = (uint16_t)(table[x[i]] >> 16);
}

void multiply(const float *table, const uint16_t *x, const uint16_t *factors, uint16_t *y, int64_t count) {
    _Pragma("omp parallel for simd if (count > 16384)")
    for (int64_t i = 0; i < count; i++) y[i] = (uint16_t)to_bf16_or_nan(table[x[i]] * from_bf16(factors[i]));
}
