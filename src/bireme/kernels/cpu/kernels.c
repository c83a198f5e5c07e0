/* What takes a CPU many passes from torch, in one: norms, gates, rotation, and attention of one new token a
 * sequence over a paged cache. Numbers are float32 or bfloat16 (`kind`), sums are float32. Each row comes out the
 * same whatever lies beside it.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __x86_64__
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define PLACES 32 /* of a context that are scored at a time */

enum { FLOAT32, BFLOAT16 };

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float half_vector __attribute__((vector_size(32)));
typedef float quarter_vector __attribute__((vector_size(16)));

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float load(int kind, const void *from, int64_t at) {
    if (kind == FLOAT32)
        return ((const float *)from)[at];
    return as_float((uint32_t)((const uint16_t *)from)[at] << 16);
}

/* To the nearest, to even between two. */
INLINE uint16_t rounded(float x) {
    uint32_t bits = bits_of(x);
    uint16_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : nearest;
}

INLINE void store(int kind, void *to, int64_t at, float x) {
    if (kind == FLOAT32)
        ((float *)to)[at] = x;
    else
        ((uint16_t *)to)[at] = rounded(x);
}

INLINE float as_stored(int kind, float x) {
    return kind == FLOAT32 ? x : as_float((uint32_t)rounded(x) << 16);
}

INLINE const void *behind(int kind, const void *from, int64_t count) {
    return (const char *)from + count * (kind == FLOAT32 ? 4 : 2);
}

INLINE void load_all(int kind, float *to, const void *from, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        to[i] = load(kind, from, i);
}

/* To a few units in the last place, also where it is far from 1. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_float((uint32_t)((int32_t)n + 127) << 23);
}

INLINE void norm(int kind, const void *x, const void *delta, const void *weight, void *total, void *out,
                 int64_t num_rows, int64_t size, float eps, float offset) {
    float row[size];
    for (int64_t at = 0; at < num_rows * size; at += size) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++)
            row[i] = load(kind, x, at + i);
        if (delta)
            for (int64_t i = 0; i < size; i++) {
                row[i] = as_stored(kind, row[i] + load(kind, delta, at + i));
                store(kind, total, at + i, row[i]);
            }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++)
            sum += row[i] * row[i];
        float scale = 1 / sqrtf(sum / size + eps);
        if (offset != 0)
            for (int64_t i = 0; i < size; i++)
                store(kind, out, at + i, row[i] * scale * (load(kind, weight, i) + offset));
        else
            for (int64_t i = 0; i < size; i++)
                store(kind, out, at + i, load(kind, weight, i) * as_stored(kind, row[i] * scale));
    }
}

/* x [num_rows, size] -> out; where there is a delta, of x + delta -> total. */
CLONES void bireme_norm(int kind, const void *x, const void *delta, const void *weight, void *total, void *out,
                        int64_t num_rows, int64_t size, float eps, float offset) {
    if (kind == FLOAT32)
        norm(FLOAT32, x, delta, weight, total, out, num_rows, size, eps, offset);
    else
        norm(BFLOAT16, x, delta, weight, total, out, num_rows, size, eps, offset);
}

INLINE void silu_mul(int kind, const void *h, void *out, int64_t num_rows, int64_t size) {
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t i = 0; i < size; i++) {
            float gate = load(kind, h, 2 * row * size + i), up = load(kind, h, (2 * row + 1) * size + i);
            store(kind, out, row * size + i, gate / (1 + exponential(-gate)) * up);
        }
}

/* h [num_rows, 2 size], gate before up -> out [num_rows, size] */
CLONES void bireme_silu_mul(int kind, const void *h, void *out, int64_t num_rows, int64_t size) {
    if (kind == FLOAT32)
        silu_mul(FLOAT32, h, out, num_rows, size);
    else
        silu_mul(BFLOAT16, h, out, num_rows, size);
}

struct heads {
    int64_t queries, kv, size; /* of a head: elements */
};

INLINE void rotate(int kind, const void *from, void *to, const float *cos, const float *sin, int64_t half,
                   int64_t size) {
    for (int64_t i = 0; i < half; i++) {
        float a = load(kind, from, i), b = load(kind, from, half + i);
        store(kind, to, i, a * cos[i] - b * sin[i]);
        store(kind, to, half + i, b * cos[i] + a * sin[i]);
    }
    for (int64_t i = 2 * half; i < size; i++)
        store(kind, to, i, load(kind, from, i));
}

INLINE void rope_and_write(int kind, const void *qkv, const void *cos, const void *sin, const int64_t *places,
                           void *keys, void *values, void *out, int64_t num_rows, int64_t num_written,
                           int64_t half, const struct heads *heads) {
    int64_t size = heads->size, of_queries = heads->queries * size, of_kv = heads->kv * size;
    float c[half + 1], s[half + 1];
    for (int64_t row = 0; row < num_rows; row++) {
        const void *from = behind(kind, qkv, row * (of_queries + 2 * of_kv));
        for (int64_t i = 0; i < half; i++) {
            c[i] = load(kind, cos, row * half + i);
            s[i] = load(kind, sin, row * half + i);
        }
        void *to = (void *)behind(kind, out, row * of_queries);
        for (int64_t at = 0; at < of_queries; at += size)
            rotate(kind, behind(kind, from, at), (void *)behind(kind, to, at), c, s, half, size);
        if (row >= num_written)
            continue;
        from = behind(kind, from, of_queries);
        to = (void *)behind(kind, keys, places[row] * of_kv);
        for (int64_t at = 0; at < of_kv; at += size)
            rotate(kind, behind(kind, from, at), (void *)behind(kind, to, at), c, s, half, size);
        memcpy((void *)behind(kind, values, places[row] * of_kv), behind(kind, from, of_kv),
               of_kv * (kind == FLOAT32 ? 4 : 2));
    }
}

/* qkv [num_rows, (queries + 2 kv) size]; cos and sin [num_rows, half]; keys and values of the first rows go to
 * `places` of the cache [N, kv, size] -> out [num_rows, queries, size] */
CLONES void bireme_rope_and_write(int kind, const void *qkv, const void *cos, const void *sin,
                                  const int64_t *places, void *keys, void *values, void *out, int64_t num_rows,
                                  int64_t num_written, int64_t half, const struct heads *heads) {
    if (kind == FLOAT32)
        rope_and_write(FLOAT32, qkv, cos, sin, places, keys, values, out, num_rows, num_written, half, heads);
    else
        rope_and_write(BFLOAT16, qkv, cos, sin, places, keys, values, out, num_rows, num_written, half, heads);
}

struct scoring {
    float scale, cap;    /* cap 0: none */
    int64_t window;      /* 0: none */
    const float *slopes; /* of each query head, or NULL */
};

/* One more part of a context, with running maxima and sums (flash attention). */
struct state {
    float *query, *mixed;  /* [queries, size] */
    float *score;          /* [queries, PLACES] */
    float *best, *total;   /* [queries] */
    float *rows;           /* [PLACES, kv, size] */
};

INLINE float sum_of(vector x) {
    half_vector half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    quarter_vector quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                             __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return quarter[0] + quarter[2] + (quarter[1] + quarter[3]);
}

/* size is a multiple of 16 */
INLINE float product(const float *a, const float *b, int64_t size) {
    vector sum = {0}, other = {0};
    int64_t at = 0;
    for (; at + 32 <= size; at += 32) {
        sum += *(const vector *)(a + at) * *(const vector *)(b + at);
        other += *(const vector *)(a + at + 16) * *(const vector *)(b + at + 16);
    }
    if (at < size)
        sum += *(const vector *)(a + at) * *(const vector *)(b + at);
    return sum_of(sum + other);
}

/* to [size] = to * shrink + weights [count] times rows, `stride` apart; size is a multiple of 16. */
INLINE void mix(float *to, float shrink, const float *weights, const float *rows, int64_t count, int64_t stride,
                int64_t size) {
    int64_t at = 0;
    for (; at + 64 <= size; at += 64) {
        vector *sum = (vector *)(to + at);
        vector a = sum[0] * shrink, b = sum[1] * shrink, c = sum[2] * shrink, d = sum[3] * shrink;
        for (int64_t i = 0; i < count; i++) {
            const vector *row = (const vector *)(rows + i * stride + at);
            a += weights[i] * row[0];
            b += weights[i] * row[1];
            c += weights[i] * row[2];
            d += weights[i] * row[3];
        }
        sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
    }
    for (; at < size; at += 16) {
        vector sum = *(vector *)(to + at) * shrink;
        for (int64_t i = 0; i < count; i++)
            sum += weights[i] * *(const vector *)(rows + i * stride + at);
        *(vector *)(to + at) = sum;
    }
}

INLINE void attend_part(int kind, struct state *state, const void *keys, const void *values, const int64_t *places,
                        int64_t count, int64_t distance, const int32_t *head_map, const struct heads *heads,
                        const struct scoring *scoring) {
    int64_t size = heads->size, of_place = heads->kv * size;
    for (int64_t i = 0; i < count; i++)
        load_all(kind, state->rows + i * of_place, behind(kind, keys, places[i] * of_place), of_place);
    for (int64_t head = 0; head < heads->queries; head++) {
        float *score = state->score + head * PLACES;
        const float *query = state->query + head * size, *row = state->rows + head_map[head] * size;
        for (int64_t i = 0; i < count; i++)
            score[i] = product(query, row + i * of_place, size);
        if (scoring->cap != 0)
            for (int64_t i = 0; i < count; i++)
                score[i] = scoring->cap * (1 - 2 / (exponential(2 * score[i] / scoring->cap) + 1));
        if (scoring->slopes)
            for (int64_t i = 0; i < count; i++)
                score[i] -= scoring->slopes[head] * (distance - i);
    }
    for (int64_t i = 0; i < count; i++)
        load_all(kind, state->rows + i * of_place, behind(kind, values, places[i] * of_place), of_place);
    for (int64_t head = 0; head < heads->queries; head++) {
        float *score = state->score + head * PLACES, best = state->best[head], sum = 0;
#pragma omp simd reduction(max : best)
        for (int64_t i = 0; i < count; i++)
            best = score[i] > best ? score[i] : best;
        float shrink = exponential(state->best[head] - best);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) {
            score[i] = exponential(score[i] - best);
            sum += score[i];
        }
        state->best[head] = best;
        state->total[head] = state->total[head] * shrink + sum;
        mix(state->mixed + head * size, shrink, score, state->rows + head_map[head] * size, count, of_place, size);
    }
}

INLINE void decode_attention(int kind, const void *q, const void *keys, const void *values, const int64_t *places,
                             int64_t num_places, const int64_t *positions, const int32_t *head_map, void *out,
                             int64_t num_rows, const struct heads *heads, const struct scoring *scoring,
                             float *work) {
    int64_t num_heads = heads->queries, of_row = num_heads * heads->size;
    struct state state;
    state.query = work;
    state.mixed = state.query + of_row;
    state.score = state.mixed + of_row;
    state.best = state.score + num_heads * PLACES;
    state.total = state.best + num_heads;
    state.rows = state.total + num_heads;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t stop = positions[row] + 1, window = scoring->window;
        int64_t first = window && stop > window ? stop - window : 0;
        for (int64_t i = 0; i < of_row; i++) {
            state.query[i] = load(kind, q, row * of_row + i) * scoring->scale;
            state.mixed[i] = 0;
        }
        for (int64_t head = 0; head < num_heads; head++)
            state.best[head] = -FLT_MAX, state.total[head] = 0;
        for (int64_t at = first; at < stop; at += PLACES) {
            int64_t count = stop - at < PLACES ? stop - at : PLACES;
            attend_part(kind, &state, keys, values, places + row * num_places + at, count, stop - 1 - at,
                        head_map, heads, scoring);
        }
        for (int64_t head = 0; head < num_heads; head++)
            for (int64_t i = 0; i < heads->size; i++)
                store(kind, out, row * of_row + head * heads->size + i,
                      state.mixed[head * heads->size + i] / state.total[head]);
    }
}

/* How many floats `bireme_decode_attention` works in. */
int64_t bireme_attention_floats(const struct heads *heads) {
    return heads->queries * (2 * heads->size + PLACES + 2) + PLACES * heads->kv * heads->size;
}

/* q [num_rows, queries, size] at `positions`, over the cache [N, kv, size]: places [num_rows, num_places] of a
 * row's positions from 0 on; query head h reads KV head head_map[h] -> out, as q */
CLONES void bireme_decode_attention(int kind, const void *q, const void *keys, const void *values,
                                    const int64_t *places, int64_t num_places, const int64_t *positions,
                                    const int32_t *head_map, void *out, int64_t num_rows,
                                    const struct heads *heads, const struct scoring *scoring, float *work) {
    if (kind == FLOAT32)
        decode_attention(FLOAT32, q, keys, values, places, num_places, positions, head_map, out, num_rows, heads,
                         scoring, work);
    else
        decode_attention(BFLOAT16, q, keys, values, places, num_places, positions, head_map, out, num_rows, heads,
                         scoring, work);
}
