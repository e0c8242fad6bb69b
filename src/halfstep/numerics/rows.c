/* The fast twins of numerics/rows.py, which says what they compute and why: only rows that a gradient names are touched. */
#include "kernels.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "torch rounds product and sum once; this instruction set has no such operation"
#endif

enum { ADAM, ADAGRAD, SGD, SGD_EACH }; /* SGD_EACH: a row is moved once for each time that it occurs */

typedef struct { float first, second, eps, step, factor; } Numbers;

/* A table with its gradient: `rows` names a row of the table for each of `count` rows of `values`. `scratch` has 3 count + 2
 * words: the occurrences in order of their rows, room for a number of each row, where each row begins, and how many rows there are. */
typedef struct {
    void *live, *rest;
    const int64_t *rows;
    const void *values;
    float *state, *square;
    int64_t *scratch, count, height, width;
} Table;

INLINE uint64_t *get_order(const Table *t) { return (uint64_t *)t->scratch; }
INLINE int64_t *get_room(const Table *t) { return t->scratch + t->count; }
INLINE int64_t *get_starts(const Table *t) { return t->scratch + 2 * t->count; }
INLINE int64_t *get_distinct(const Table *t) { return t->scratch + 3 * t->count + 1; }

#define DIGIT 11 /* bits that one pass sorts by: its counters stay in the nearest cache */
#define LOW 0xFFFFFFFFu

/* Sort occurrences by row, those of one row as they came: row in the upper half of a word, number of the occurrence in the lower.
 * -1 rows where one is not of the table. */
static void sort_rows(const Table *t) {
    uint64_t *from = get_order(t), *to = (uint64_t *)get_room(t), *other;
    int64_t *starts = get_starts(t), distinct = 0;
    *get_distinct(t) = t->count ? -1 : 0;
    for (int64_t i = 0; i < t->count; i++) {
        if (t->rows[i] < 0 || t->rows[i] >= t->height) return;
        from[i] = (uint64_t)t->rows[i] << 32 | (uint64_t)i;
    }
    for (int shift = 32; (t->height - 1) >> (shift - 32); shift += DIGIT) {
        uint32_t places[1 << DIGIT] = {0}, place = 0;
        for (int64_t i = 0; i < t->count; i++) places[from[i] >> shift & ((1 << DIGIT) - 1)]++;
        for (int digit = 0; digit < 1 << DIGIT; digit++) {
            uint32_t here = places[digit];
            places[digit] = place, place += here;
        }
        for (int64_t i = 0; i < t->count; i++) to[places[from[i] >> shift & ((1 << DIGIT) - 1)]++] = from[i];
        other = from, from = to, to = other;
    }
    if (from != get_order(t)) memcpy(get_order(t), from, (size_t)t->count * 8);
    for (int64_t i = 0; i < t->count; i++)
        if (!i || get_order(t)[i] >> 32 != get_order(t)[i - 1] >> 32) starts[distinct++] = i;
    starts[distinct] = t->count;
    *get_distinct(t) = distinct;
}

/* How many rows all tables have together, -1 where a gradient does not fit its table. */
static int64_t sort_all(const Table *tables, int64_t count) {
    int64_t rows = 0, occurrences = 0;
    for (int64_t i = 0; i < count; i++) occurrences += tables[i].count;
    _Pragma("omp parallel for schedule(dynamic) if (count > 1 && occurrences > 4096)")
    for (int64_t i = 0; i < count; i++) sort_rows(tables + i);
    for (int64_t i = 0; i < count; i++) {
        if (*get_distinct(tables + i) < 0) return -1;
        rows += *get_distinct(tables + i);
    }
    return rows;
}

#define BLOCK 1024 /* numbers at once: what is computed on the way stays in the nearest cache */

INLINE int64_t get_row(const Table *t, int64_t number) { return (int64_t)(get_order(t)[get_starts(t)[number]] >> 32); }

/* Ask for memory that is needed soon: rows lie anywhere, and no processor guesses where. */
INLINE void ask_for(const void *start, int64_t bytes) {
    for (int64_t i = 0; i < bytes && i < 512; i += 64) __builtin_prefetch((const char *)start + i);
}

#define AHEAD 6 /* rows between asking and reading */

INLINE void ask_for_values(int half, const Table *t, int64_t occurrence) {
    if (occurrence >= t->count) return;
    int64_t bytes = half ? 2 : 4, place = (int64_t)(get_order(t)[occurrence] & LOW) * t->width;
    ask_for((const char *)t->values + place * bytes, t->width * bytes);
}

INLINE void ask_for_row(int kind, int storage, const Table *t, int64_t number) {
    if (number >= *get_distinct(t)) return;
    int64_t base = get_row(t, number) * t->width;
    ask_for((const char *)t->live + base * (storage == WIDE ? 4 : 2), t->width * (storage == WIDE ? 4 : 2));
    if (storage != WIDE) ask_for((const char *)t->rest + base * (storage == COPY ? 4 : 2), t->width * (storage == COPY ? 4 : 2));
    if (kind == ADAM || kind == ADAGRAD) ask_for(t->state + base, t->width * 4);
    if (kind == ADAM) ask_for(t->square + base, t->width * 4);
}

INLINE int64_t get_place(const Table *t, int64_t occurrence) { return (int64_t)(get_order(t)[occurrence] >> 32) * t->width; }

/* The gradient of a row, numbers [column, column + span) of it: what occurs several times is summed in its order. */
INLINE void sum_row(int half, const Table *t, int64_t number, int64_t column, int64_t span, float factor, float *sum) {
    for (int64_t k = get_starts(t)[number]; k < get_starts(t)[number + 1]; k++) {
        int64_t base = (int64_t)(get_order(t)[k] & LOW) * t->width + column;
        if (!column) ask_for_values(half, t, k + AHEAD);
        if (k == get_starts(t)[number])
            for (int64_t i = 0; i < span; i++) sum[i] = read_number(t->values, !half, base + i) * factor;
        else
            for (int64_t i = 0; i < span; i++) sum[i] += read_number(t->values, !half, base + i) * factor;
    }
}

/* The states of a row by its gradient. up: what the weight moves by before it is divided; square: what the root is taken of. */
INLINE void step_states(int kind, const Table *t, int64_t base, int64_t span, const float *g, float *up, float *square,
                        Numbers n) {
    float *state = t->state + base, *other = t->square + base;
    _Pragma("omp simd")
    for (int64_t i = 0; i < span; i++) {
        if (kind == ADAM) {
            float m = state[i] + (g[i] - state[i]) * n.first, v = other[i] + (g[i] * g[i] - other[i]) * n.second;
            state[i] = up[i] = m, other[i] = square[i] = v;
        } else {
            state[i] = square[i] = state[i] + g[i] * g[i];
            up[i] = g[i];
        }
    }
}

INLINE void step_row(int kind, int storage, const Table *t, int64_t base, int64_t span, const float *up, const float *root,
                     Numbers n) {
    _Pragma("omp simd")
    for (int64_t i = 0; i < span; i++) {
        float w = read_weight(storage, t->live, t->rest, base + i);
        if (kind == ADAM) w += up[i] / (root[i] + n.eps) * n.step;
        else w = fmaf(n.step, kind == ADAGRAD ? up[i] / (root[i] + n.eps) : up[i], w);
        write_weight(storage, t->live, t->rest, base + i, w);
    }
}

/* Some rows of a table, few enough for their numbers to fit into BLOCK, or a part of one row. */
INLINE void step_some(int kind, int storage, int half, const Table *t, int64_t first, int64_t end, int64_t column, int64_t span,
                      Numbers n, Roots *roots) {
    float g[BLOCK], up[BLOCK], square[BLOCK], root[BLOCK];
    int64_t count = (end - first) * span;
    for (int64_t number = first; number < end; number++) {
        int64_t place = (number - first) * span, base = get_row(t, number) * t->width + column;
        if (!column) ask_for_row(kind, storage, t, number + AHEAD);
        sum_row(half, t, number, column, span, n.factor, g + place);
        if (kind != SGD) step_states(kind, t, base, span, g + place, up + place, square + place, n);
    }
    if (kind != SGD && roots) roots((int)count, square, root, MKL_MODE);
    if (kind != SGD && !roots)
        for (int64_t i = 0; i < count; i++) root[i] = sqrtf(square[i]);
    for (int64_t number = first; number < end; number++) {
        int64_t place = (number - first) * span, base = get_row(t, number) * t->width + column;
        step_row(kind, storage, t, base, span, (kind == SGD ? g : up) + place, root + place, n);
    }
}

/* SGD as torch adds a gradient whose rows occur several times: one after another. */
INLINE void step_each(int storage, int half, const Table *t, int64_t first, int64_t end, Numbers n) {
    for (int64_t k = get_starts(t)[first]; k < get_starts(t)[end]; k++) {
        ask_for_values(half, t, k + AHEAD);
        if (k + AHEAD < t->count) ask_for((const float *)t->live + get_place(t, k + AHEAD), t->width * 4);
        int64_t base = get_place(t, k), place = (int64_t)(get_order(t)[k] & LOW) * t->width;
        _Pragma("omp simd")
        for (int64_t i = 0; i < t->width; i++) {
            float g = read_number(t->values, !half, place + i) * n.factor, w = read_weight(storage, t->live, t->rest, base + i);
            write_weight(storage, t->live, t->rest, base + i, fmaf(n.step, g, w));
        }
    }
}

INLINE void step_table(int kind, int storage, int half, const Table *t, int64_t first, int64_t end, Numbers n, Roots *roots) {
    if (kind == SGD_EACH) {
        step_each(storage, half, t, first, end, n);
        return;
    }
    int64_t some = t->width < BLOCK ? BLOCK / t->width : 1;
    for (int64_t number = first; number < end; number += some)
        for (int64_t column = 0; column < t->width; column += BLOCK) {
            int64_t span = t->width - column < BLOCK ? t->width - column : BLOCK;
            step_some(kind, storage, half, t, number, number + some < end ? number + some : end, column, span, n, roots);
        }
}

/* `act` on a thread's share of the rows of all tables: table t, rows [first, last) of it. */
#define FOR_ROWS(act) \
    _Pragma("omp parallel if (rows > 512)") { \
        Share share = take_share(rows); \
        for (const Table *t = tables; t < tables + count && share.end > 0; t++) { \
            int64_t here = *get_distinct(t), first = share.first > 0 ? share.first : 0; \
            int64_t last = share.end < here ? share.end : here; \
            if (first < last) act; \
            share.first -= here, share.end -= here; \
        } \
    }

#define STEP(kind, storage, half) FOR_ROWS(step_table(kind, storage, half, t, first, last, n, roots))
#define STEP_ADAM(storage, half) STEP(ADAM, storage, half)
#define STEP_ADAGRAD(storage, half) STEP(ADAGRAD, storage, half)
#define STEP_SGD(storage, half) STEP(SGD, storage, half)
#define STEP_EACH(storage, half) STEP(SGD_EACH, storage, half)

/* done: set to 1, or to 0 where nothing was done because a gradient does not fit its table. */
void update_rows(int kind, int storage, int half, const Table *tables, int64_t count, const float *numbers, Roots *roots,
                 int64_t *done) {
    Numbers n;
    memcpy(&n, numbers, sizeof n);
    int64_t rows = sort_all(tables, count);
    *done = rows >= 0;
    if (kind == ADAM) { EACH(STEP_ADAM) }
    else if (kind == ADAGRAD) { EACH(STEP_ADAGRAD) }
    else if (kind == SGD) { EACH(STEP_SGD) }
    else { EACH(STEP_EACH) }
}

INLINE void measure_table(int half, const Table *t, int64_t first, int64_t end) {
    float g[BLOCK];
    for (int64_t number = first; number < end; number++) {
        double sum = 0;
        for (int64_t column = 0; column < t->width; column += BLOCK) {
            int64_t span = t->width - column < BLOCK ? t->width - column : BLOCK;
            sum_row(half, t, number, column, span, 1.0f, g);
            _Pragma("omp simd reduction(+ : sum)")
            for (int64_t i = 0; i < span; i++) sum += (double)g[i] * g[i];
        }
        memcpy(get_room(t) + number, &sum, 8);
    }
}

/* squares: for each table the sum of the squares of its gradient's numbers, rows in their order. */
void measure_rows(int half, const Table *tables, int64_t count, double *squares, int64_t *done) {
    int64_t rows = sort_all(tables, count);
    *done = rows >= 0;
    if (half) FOR_ROWS(measure_table(1, t, first, last))
    else FOR_ROWS(measure_table(0, t, first, last))
    for (int64_t i = 0; i < count && rows >= 0; i++) {
        squares[i] = 0;
        for (int64_t number = 0; number < *get_distinct(tables + i); number++) {
            double square;
            memcpy(&square, get_room(tables + i) + number, 8);
            squares[i] += square;
        }
    }
}
