/* Attention over a few hundred keys, of fp32 or bfloat16 numbers, computed in fp32: softmax(Q K^T scale + mask) V, and its
 * gradients. Called by moe_train/kernels/cpu/attention_kernel.py.
 *
 * Query, key and value stand where the projections have written them: head h of position s of sentence b begins at
 * b * batch + s * row + h * dim. One sentence's head at a time is copied to fp32 buffers that stay in the second-level
 * cache. */
#include <math.h>

#include "amx_workspace.h"
#include "bf16.h"

enum { LANES = 16, TALL = 6, WIDE = 4 }; /* sums of one inner product: 6 rows x 4 vectors */

typedef struct {
    char *at;
    long batch, row; /* in numbers */
    long narrow;     /* bfloat16 */
} Matrix;

INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }
INLINE __mmask16 lanes(long n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

INLINE __m512 load_some(const Matrix *m, long place, __mmask16 mask) {
    if (m->narrow) return widen(_mm256_maskz_loadu_epi16(mask, (const bf16 *)m->at + place));
    return _mm512_maskz_loadu_ps(mask, (const float *)m->at + place);
}

INLINE void store_some(const Matrix *m, long place, __mmask16 mask, __m512 x) {
    if (m->narrow) {
        _mm256_mask_storeu_epi16((bf16 *)m->at + place, mask, (__m256i)_mm512_cvtneps_pbh(x));
    } else {
        _mm512_mask_storeu_ps((float *)m->at + place, mask, x);
    }
}

/* to [rows, padded(dim)] = one head, with zeros behind dim. */
static void read_head(float *to, const Matrix *m, long place, long rows, long dim) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < dim; c += LANES)
            _mm512_store_ps(to + i * padded(dim) + c, load_some(m, place + i * m->row + c, lanes(dim - c)));
}

static void write_head(const Matrix *m, long place, const float *from, long rows, long dim) {
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < dim; c += LANES)
            store_some(m, place + i * m->row + c, lanes(dim - c), _mm512_load_ps(from + i * padded(dim) + c));
}

/* to [dim, padded(rows)] = the transpose of from [rows, padded(dim)], with zeros behind rows. */
static void transpose(float *to, const float *from, long rows, long dim) {
    for (long i = 0; i < padded(rows); i += LANES)
        for (long c = 0; c < dim; c += LANES) {
            __m512i r[LANES];
            for (long j = 0; j < LANES; j++)
                r[j] = i + j < rows ? _mm512_load_si512(from + (i + j) * padded(dim) + c) : _mm512_setzero_si512();
            turn(r);
            for (long j = 0; j < min_of(LANES, dim - c); j++) _mm512_store_si512(to + (c + j) * padded(rows) + i, r[j]);
        }
}

/* c [tall, 16 wide] = the sum over k < deep of a[i * down + k * across] b[k, ..]. */
INLINE void inner(float *c, const float *a, const float *b, long deep, long down, long across, long ldb, long ldc,
                  int tall, int wide) {
    __m512 sums[TALL][WIDE];
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) sums[i][j] = _mm512_setzero_ps();
    for (long k = 0; k < deep; k++) {
        __m512 row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = _mm512_load_ps(b + k * ldb + j * LANES);
        for (int i = 0; i < tall; i++) {
            __m512 x = _mm512_set1_ps(a[i * down + k * across]);
            for (int j = 0; j < wide; j++) sums[i][j] = _mm512_fmadd_ps(x, row[j], sums[i][j]);
        }
    }
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) _mm512_store_ps(c + i * ldc + j * LANES, sums[i][j]);
}

#define ROWS(wide)                                                                                             \
    static void rows_of_##wide(float *c, const float *a, const float *b, long n, long deep, long down, long across, \
                               long ldb, long ldc) {                                                           \
        long i = 0;                                                                                            \
        for (; i + TALL <= n; i += TALL)                                                                       \
            inner(c + i * ldc, a + i * down, b, deep, down, across, ldb, ldc, TALL, wide);                     \
        for (; i + 2 <= n; i += 2) inner(c + i * ldc, a + i * down, b, deep, down, across, ldb, ldc, 2, wide); \
        for (; i < n; i++) inner(c + i * ldc, a + i * down, b, deep, down, across, ldb, ldc, 1, wide);         \
    }
ROWS(1)
ROWS(2)
ROWS(3)
ROWS(4)

/* c [n, padded(m)] = A b, b [deep, padded(m)], A [n, deep] with any strides. */
static void multiply_small(float *c, const float *a, const float *b, long n, long m, long deep, long down, long across) {
    long ld = padded(m);
    for (long j = 0; j < ld; j += WIDE * LANES) {
        switch (min_of(ld - j, WIDE * LANES) / LANES) {
        case 1: rows_of_1(c + j, a, b + j, n, deep, down, across, ld, ld); break;
        case 2: rows_of_2(c + j, a, b + j, n, deep, down, across, ld, ld); break;
        case 3: rows_of_3(c + j, a, b + j, n, deep, down, across, ld, ld); break;
        default: rows_of_4(c + j, a, b + j, n, deep, down, across, ld, ld);
        }
    }
}

/* Keys that query i sees: those below the result, apart from what the mask hides. */
INLINE long visible(long i, long keys, long causal) { return causal ? min_of(i + 1, keys) : keys; }
INLINE __mmask16 seen(const uint8_t *mask, long j, long upto) {
    __mmask16 some = lanes(upto - j);
    if (!mask) return some;
    __m128i bytes = _mm_maskz_loadu_epi8(some, mask + j);
    return _mm_test_epi8_mask(bytes, bytes);
}

/* out, and log_sums [sentences, heads, queries], of the pairs (sentence, head) from .. upto - 1. `mask` [sentences,
 * keys], 0: hidden; or NULL. A query that sees no key has the output 0. */
int moe_attention(Matrix *out, float *log_sums, Matrix *query, Matrix *key, Matrix *value, const uint8_t *mask,
                  long heads, long queries, long keys, long dim, long causal, float scale, long from, long upto) {
    long wide = padded(dim), broad = padded(keys);
    float *q = (float *)workspace_of(4 * (queries * wide * 2 + keys * wide * 2 + broad * wide + queries * broad));
    if (!q) return NO_MEMORY;
    float *k = q + queries * wide, *v = k + keys * wide, *turned = v + keys * wide, *p = turned + broad * wide;
    float *y = p + queries * broad;
    for (long pair = from; pair < upto; pair++) {
        long b = pair / heads, h = pair % heads;
        const uint8_t *own = mask ? mask + b * keys : 0;
        read_head(q, query, b * query->batch + h * dim, queries, dim);
        read_head(k, key, b * key->batch + h * dim, keys, dim);
        read_head(v, value, b * value->batch + h * dim, keys, dim);
        transpose(turned, k, keys, dim);
        multiply_small(p, q, turned, queries, keys, dim, wide, 1);
        for (long i = 0; i < queries; i++) {
            float *row = p + i * broad;
            long end = visible(i, keys, causal);
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (long j = 0; j < end; j += LANES)
                top = _mm512_mask_max_ps(top, seen(own, j, end), top, _mm512_load_ps(row + j));
            float largest = _mm512_reduce_max_ps(top) * scale;
            if (largest == -INFINITY) largest = 0;
            for (long j = 0; j < broad; j += LANES) {
                __m512 x = _mm512_fmsub_ps(_mm512_load_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(largest));
                x = _mm512_maskz_mov_ps(seen(own, j, end), exponential(x));
                sum = _mm512_add_ps(sum, x);
                _mm512_store_ps(row + j, x);
            }
            float total = _mm512_reduce_add_ps(sum), inverse = total > 0 || total != total ? 1 / total : 0;
            for (long j = 0; j < end; j += LANES)
                _mm512_store_ps(row + j, _mm512_mul_ps(_mm512_load_ps(row + j), _mm512_set1_ps(inverse)));
            if (log_sums) log_sums[pair * queries + i] = total > 0 || total != total ? largest + logf(total) : INFINITY;
        }
        multiply_small(y, p, v, queries, dim, keys, broad, 1);
        write_head(out, b * out->batch + h * dim, y, queries, dim);
    }
    return 0;
}

/* Gradients of query, key and value from that of out. */
int moe_attention_gradients(Matrix *by_query, Matrix *by_key, Matrix *by_value, Matrix *grad, Matrix *out,
                            const float *log_sums, Matrix *query, Matrix *key, Matrix *value, const uint8_t *mask,
                            long heads, long queries, long keys, long dim, long causal, float scale, long from,
                            long upto) {
    long wide = padded(dim), broad = padded(keys), one = queries * wide, other = keys * wide;
    float *q = (float *)workspace_of(4 * (4 * one + 3 * other + 2 * broad * wide + 2 * queries * broad));
    if (!q) return NO_MEMORY;
    float *g = q + one, *y = g + one, *to_query = y + one, *k = to_query + one, *v = k + other, *to_key = v + other;
    float *k_turned = to_key + other, *v_turned = k_turned + broad * wide, *p = v_turned + broad * wide;
    float *s = p + queries * broad;
    for (long pair = from; pair < upto; pair++) {
        long b = pair / heads, h = pair % heads;
        const uint8_t *own = mask ? mask + b * keys : 0;
        read_head(q, query, b * query->batch + h * dim, queries, dim);
        read_head(k, key, b * key->batch + h * dim, keys, dim);
        read_head(v, value, b * value->batch + h * dim, keys, dim);
        read_head(g, grad, b * grad->batch + h * dim, queries, dim);
        read_head(y, out, b * out->batch + h * dim, queries, dim);
        transpose(k_turned, k, keys, dim);
        transpose(v_turned, v, keys, dim);
        multiply_small(p, q, k_turned, queries, keys, dim, wide, 1);
        multiply_small(s, g, v_turned, queries, keys, dim, wide, 1);
        for (long i = 0; i < queries; i++) {
            long end = visible(i, keys, causal);
            __m512 dot = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
            for (long c = 0; c < wide; c += LANES)
                dot = _mm512_fmadd_ps(_mm512_load_ps(g + i * wide + c), _mm512_load_ps(y + i * wide + c), dot);
            __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
            __m512 less = _mm512_set1_ps(log_sums[pair * queries + i]);
            for (long j = 0; j < broad; j += LANES) {
                __m512 x = exponential(_mm512_fmsub_ps(_mm512_load_ps(p + i * broad + j), factor, less));
                x = _mm512_maskz_mov_ps(seen(own, j, end), x);
                _mm512_store_ps(p + i * broad + j, x);
                __m512 by = _mm512_sub_ps(_mm512_load_ps(s + i * broad + j), along);
                _mm512_store_ps(s + i * broad + j, _mm512_mul_ps(factor, _mm512_mul_ps(x, by)));
            }
        }
        multiply_small(to_query, s, k, queries, dim, keys, broad, 1);
        write_head(by_query, b * by_query->batch + h * dim, to_query, queries, dim);
        multiply_small(to_key, s, q, keys, dim, queries, 1, broad);
        write_head(by_key, b * by_key->batch + h * dim, to_key, keys, dim);
        multiply_small(to_key, p, g, keys, dim, queries, 1, broad);
        write_head(by_value, b * by_value->batch + h * dim, to_key, keys, dim);
    }
    return 0;
}
