/* Label-smoothed cross-entropy of rows of bfloat16 logits, and its gradient in their place. Called by
 * moe_train/kernels/cpu/smoothed_loss.py.
 *
 * torch's operators for the same read or write the [N, V] numbers about ten times, most of them in fp32. Here a row
 * stays in the core's cache for its three passes.
 */
#include "bf16.h"
#include <math.h>

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
