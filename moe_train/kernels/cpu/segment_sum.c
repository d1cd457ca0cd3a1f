/* Weighted sums of bfloat16 rows, accumulated in fp32. Called by moe_train/kernels/cpu/segment_sum.py.
 *
 * Each pass reads every row once; torch's kernels for the same convert rows to fp32 first, or take weights in the type
 * of the rows. Tokens, or rows, from .. upto - 1 are computed.
 */
#include "bf16.h"

/* out [T, d]: for each token t the sum over p of weight[p] times row ids[p] of values, p from start[t] to before
 * start[t + 1], which is `total` for the last of all T tokens. start: NULL if token t has row t only. weight: NULL if
 * all are 1. */
void moe_weighted_sums(bf16 *out, const bf16 *values, const int64_t *ids, const int64_t *start, const float *weight,
                       long tokens, long total, long from, long upto, long d) {
    for (long t = from; t < upto; t++) {
        long begin = start ? start[t] : t, end = !start ? t + 1 : t + 1 < tokens ? start[t + 1] : total;
        for (long c = 0; c < d; c += WIDTH) {
            __mmask32 mask = first(d - c);
            __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
            for (long p = begin; p < end; p++) {
                __m512i x = load(mask, values + ids[p] * d + c);
                __m512 w = _mm512_set1_ps(weight ? weight[p] : 1);
                low = _mm512_fmadd_ps(w, low_half(x), low);
                high = _mm512_fmadd_ps(w, high_half(x), high);
            }
            _mm512_mask_storeu_epi16(out + t * d + c, mask, narrow(low, high));
        }
    }
}

/* Gradients of y_t = sum of weight[pair[i]] values[i] over the rows i of token t, from y's gradient [T, d]: by_values
 * [n, d], and by_weight [pairs], the dot product of the pair's row of values and its token's gradient. Rows whose pair
 * is out of range are padding, with a zero gradient. */
void moe_weighted_sums_grad(bf16 *by_values, float *by_weight, const bf16 *grad, const bf16 *values,
                                  const float *weight, const int64_t *token, const int64_t *pair, long pairs, long from,
                            long upto, long d) {
    for (long i = from; i < upto; i++) {
        const bf16 *grads = grad + token[i] * d, *row = values + i * d;
        int real = pair[i] < pairs;
        __m512 w = _mm512_set1_ps(real ? weight[pair[i]] : 0), low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
        for (long c = 0; c < d; c += WIDTH) {
            __mmask32 mask = first(d - c);
            __m512i g = load(real ? mask : 0, grads + c), v = load(mask, row + c);
            __m512 g_low = low_half(g), g_high = high_half(g);
            low = _mm512_fmadd_ps(g_low, low_half(v), low);
            high = _mm512_fmadd_ps(g_high, high_half(v), high);
            __m512i scaled = narrow(_mm512_mul_ps(w, g_low), _mm512_mul_ps(w, g_high));
            _mm512_mask_storeu_epi16(by_values + i * d + c, mask, scaled);
        }
        if (real) by_weight[pair[i]] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    }
}
