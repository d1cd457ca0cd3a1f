/* Label-smoothed cross-entropy of rows of bfloat16 logits, and its gradient in their place. Called by
 * moe_train/kernels/cpu/smoothed_loss.py.
 *
 * torch's operators for the same read or write the [N, V] numbers about ten times, most of them in fp32. Here a row
 * stays in the core's cache for its three passes.
 */
#include "bf16.h"
#include <math.h>

/* e^x for x <= 0 in fp32, relative error below 2e-7; NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2, and the
 * polynomial of Cephes' expf for e^r. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110), x); /* the second operand if it is NaN; e^-110 is 0 in fp32 */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(p, n);
}

/* Halves of 32 logits; behind the row's end -infinity, whose exponential is 0. */
INLINE __m512 low_or_end(__mmask32 mask, __m512i x) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)mask, low_half(x));
}
INLINE __m512 high_or_end(__mmask32 mask, __m512i x) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(mask >> 16), high_half(x));
}

/* nll [N] = -log p of the target, smooth [N] = sum over v of -log p_v; both 0 where the target is `ignore`. If
 * `gradient`, logits [N, V] become p - q with q = at_target at the target and `each` elsewhere; 0 in ignored rows. */
void moe_smoothed_loss(bf16 *logits, float *nll, float *smooth, const int64_t *target, long ignore, float each,
                       float at_target, long gradient, long from, long upto, long vocabulary) {
    for (long n = from; n < upto; n++) {
        bf16 *row = logits + n * vocabulary;
        if (target[n] == ignore) {
            nll[n] = smooth[n] = 0;
            if (gradient)
                for (long v = 0; v < vocabulary; v += WIDTH)
                    _mm512_mask_storeu_epi16(row + v, first(vocabulary - v), _mm512_setzero_si512());
            continue;
        }
        __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            __m512i x = load(mask, row + v); /* 0 behind the end */
            total = _mm512_add_ps(total, _mm512_add_ps(low_half(x), high_half(x)));
            largest = _mm512_max_ps(largest, _mm512_max_ps(low_or_end(mask, x), high_or_end(mask, x)));
        }
        float top = _mm512_reduce_max_ps(largest);
        __m512 shift = _mm512_set1_ps(top);
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            __m512i x = load(mask, row + v);
            __m512 low = exponential(_mm512_sub_ps(low_or_end(mask, x), shift));
            __m512 high = exponential(_mm512_sub_ps(high_or_end(mask, x), shift));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        }
        float weight = _mm512_reduce_add_ps(sum), lse = top + logf(weight);
        uint32_t bits = (uint32_t)row[target[n]] << 16;
        float goal;
        __builtin_memcpy(&goal, &bits, sizeof goal);
        nll[n] = lse - goal;
        smooth[n] = vocabulary * lse - _mm512_reduce_add_ps(total);
        if (!gradient) continue;
        __m512 scale = _mm512_set1_ps(1 / weight), less = _mm512_set1_ps(each);
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            __m512i x = load(mask, row + v);
            __m512 low = exponential(_mm512_sub_ps(low_half(x), shift));
            __m512 high = exponential(_mm512_sub_ps(high_half(x), shift));
            low = _mm512_fmsub_ps(low, scale, less);
            high = _mm512_fmsub_ps(high, scale, less);
            _mm512_mask_storeu_epi16(row + v, mask, narrow(low, high));
        }
        float p = expf(goal - top) / weight - at_target;
        __builtin_memcpy(&bits, &p, sizeof bits);
        if (p == p) bits += 0x7fff + (bits >> 16 & 1); /* to the nearest, ties to even */
        row[target[n]] = bits >> 16;
    }
}
