/* Scores of bfloat16 rows by an fp32 matrix, computed in fp32, their softmax, and the gradients of both. Called by
 * moe_train/kernels/cpu/gate_scores.py.
 *
 * X [T, d], W [E, d], scores [T, E]. torch's operators convert X to fp32 and back, which takes longer than the products,
 * and their softmax is made for longer rows.
 */
#include "bf16.h"

enum {
    TOGETHER = 8, /* experts whose sums are kept in registers */
    ROWS = 4,     /* rows of a gradient that are */
};

INLINE __mmask16 upper(__mmask32 mask) { return (__mmask16)(mask >> 16); }

/* scores of rows from .. upto - 1 */
void moe_gate_scores(float *scores, const bf16 *x, const float *w, const float *bias, long from, long upto, long d,
                     long experts) {
    for (long t = from; t < upto; t++) {
        for (long e = 0; e < experts; e += TOGETHER) {
            __m512 sum[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) sum[i] = _mm512_setzero_ps();
            for (long c = 0; c < d; c += WIDTH) {
                __mmask32 mask = first(d - c);
                __m512i row = load(mask, x + t * d + c);
                __m512 low = low_half(row), high = high_half(row);
                for (int i = 0; i < TOGETHER; i++) {
                    if (e + i >= experts) break;
                    const float *weight = w + (e + i) * d + c;
                    sum[i] = _mm512_fmadd_ps(low, _mm512_maskz_loadu_ps((__mmask16)mask, weight), sum[i]);
                    sum[i] = _mm512_fmadd_ps(high, _mm512_maskz_loadu_ps(upper(mask), weight + 16), sum[i]);
                }
            }
            for (int i = 0; i < TOGETHER && e + i < experts; i++)
                scores[t * experts + e + i] = _mm512_reduce_add_ps(sum[i]) + (bias ? bias[e + i] : 0);
        }
    }
}

/* Gradients from that of the scores, by_scores [T, E]: by_x [T, d] is written, by_w [E, d] is added to. NULL: not
 * computed. Rows from .. upto - 1. */
void moe_gate_gradients(bf16 *by_x, float *by_w, const float *by_scores, const bf16 *x, const float *w, long from,
                        long upto, long d, long experts) {
    for (long t = from; t < upto; t += ROWS) {
        long rows = upto - t < ROWS ? upto - t : ROWS;
        for (long c = 0; c < d; c += WIDTH) {
            __mmask32 mask = first(d - c);
            __m512 x_low[ROWS], x_high[ROWS], low[ROWS], high[ROWS];
            for (int i = 0; i < ROWS; i++) {
                __m512i row = load(i < rows ? mask : 0, x + (t + i) * d + c);
                x_low[i] = low_half(row);
                x_high[i] = high_half(row);
                low[i] = high[i] = _mm512_setzero_ps();
            }
            for (long e = 0; e < experts; e++) {
                float *sums = by_w + e * d + c;
                __m512 w_low = _mm512_maskz_loadu_ps((__mmask16)mask, w + e * d + c);
                __m512 w_high = _mm512_maskz_loadu_ps(upper(mask), w + e * d + c + 16);
                __m512 sum_low = _mm512_setzero_ps(), sum_high = sum_low;
                for (int i = 0; i < ROWS; i++) {
                    __m512 scale = _mm512_set1_ps(i < rows ? by_scores[(t + i) * experts + e] : 0);
                    low[i] = _mm512_fmadd_ps(scale, w_low, low[i]);
                    high[i] = _mm512_fmadd_ps(scale, w_high, high[i]);
                    sum_low = _mm512_fmadd_ps(scale, x_low[i], sum_low);
                    sum_high = _mm512_fmadd_ps(scale, x_high[i], sum_high);
                }
                if (by_w) {
                    sum_low = _mm512_add_ps(sum_low, _mm512_maskz_loadu_ps((__mmask16)mask, sums));
                    sum_high = _mm512_add_ps(sum_high, _mm512_maskz_loadu_ps(upper(mask), sums + 16));
                    _mm512_mask_storeu_ps(sums, (__mmask16)mask, sum_low);
                    _mm512_mask_storeu_ps(sums + 16, upper(mask), sum_high);
                }
            }
            for (int i = 0; by_x && i < rows; i++)
                _mm512_mask_storeu_epi16(by_x + (t + i) * d + c, mask, narrow(low[i], high[i]));
        }
    }
}

/* Softmax of rows from .. upto - 1 of up to 16 scores each. */
void moe_gate_softmax(float *out, const float *scores, long from, long upto, long experts) {
    __mmask16 mask = (__mmask16)first(experts);
    for (long t = from; t < upto; t++) {
        __m512 x = _mm512_maskz_loadu_ps(mask, scores + t * experts);
        __m512 largest = _mm512_set1_ps(_mm512_mask_reduce_max_ps(mask, x));
        __m512 e = exponential(_mm512_sub_ps(x, largest));
        __m512 sum = _mm512_set1_ps(_mm512_mask_reduce_add_ps(mask, e));
        _mm512_mask_storeu_ps(out + t * experts, mask, _mm512_div_ps(e, sum));
    }
}

/* Gradient of the scores from that of the probabilities p: p (g - sum of p g). */
void moe_gate_softmax_gradient(float *by_scores, const float *grad, const float *probabilities, long from, long upto,
                               long experts) {
    __mmask16 mask = (__mmask16)first(experts);
    for (long t = from; t < upto; t++) {
        __m512 p = _mm512_maskz_loadu_ps(mask, probabilities + t * experts);
        __m512 g = _mm512_maskz_loadu_ps(mask, grad + t * experts);
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_mul_ps(p, g)));
        _mm512_mask_storeu_ps(by_scores + t * experts, mask, _mm512_mul_ps(p, _mm512_sub_ps(g, mean)));
    }
}
