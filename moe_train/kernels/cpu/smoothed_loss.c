/* Label-smoothed cross-entropy of rows of bfloat16 or fp32 logits, and its gradient in their place. Called by
 * moe_train/kernels/cpu/smoothed_loss.py.
 *
 * torch's operators for the same read or write the [N, V] numbers about ten times, in bf16 most of them in fp32. Here a
 * row stays in the core's cache for its three passes.
 */
#include "bf16.h"
#include <math.h>
#include <string.h>

INLINE float get(const char *row, long v, int half) {
    if (!half) return ((const float *)row)[v];
    uint32_t bits = (uint32_t)((const bf16 *)row)[v] << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void set(char *row, long v, int half, float x) {
    if (!half) {
        ((float *)row)[v] = x;
        return;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if (x == x) bits += 0x7fff + (bits >> 16 & 1); /* to the nearest, ties to even */
    ((bf16 *)row)[v] = bits >> 16;
}

INLINE void rows(char *logits, float *nll, float *smooth, const int64_t *target, long ignore, float each,
                 float at_target, long gradient, long from, long upto, long vocabulary, int half) {
    for (long n = from; n < upto; n++) {
        char *row = logits + n * vocabulary * (half ? sizeof(bf16) : sizeof(float));
        if (target[n] == ignore) {
            nll[n] = smooth[n] = 0;
            if (gradient) memset(row, 0, vocabulary * (half ? sizeof(bf16) : sizeof(float)));
            continue;
        }
        __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            Pair x = load_pair(row, v, mask, half, 0), y = load_pair(row, v, mask, half, -INFINITY);
            total = _mm512_add_ps(total, _mm512_add_ps(x.low, x.high));
            largest = _mm512_max_ps(largest, _mm512_max_ps(y.low, y.high));
        }
        float top = _mm512_reduce_max_ps(largest);
        __m512 shift = _mm512_set1_ps(top);
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            Pair x = load_pair(row, v, mask, half, -INFINITY);
            x.low = exponential(_mm512_sub_ps(x.low, shift));
            x.high = exponential(_mm512_sub_ps(x.high, shift));
            sum = _mm512_add_ps(sum, _mm512_add_ps(x.low, x.high));
        }
        float weight = _mm512_reduce_add_ps(sum), lse = top + logf(weight), goal = get(row, target[n], half);
        nll[n] = lse - goal;
        smooth[n] = vocabulary * lse - _mm512_reduce_add_ps(total);
        if (!gradient) continue;
        __m512 scale = _mm512_set1_ps(1 / weight), less = _mm512_set1_ps(each);
        for (long v = 0; v < vocabulary; v += WIDTH) {
            __mmask32 mask = first(vocabulary - v);
            Pair x = load_pair(row, v, mask, half, 0);
            x.low = _mm512_fmsub_ps(exponential(_mm512_sub_ps(x.low, shift)), scale, less);
            x.high = _mm512_fmsub_ps(exponential(_mm512_sub_ps(x.high, shift)), scale, less);
            store_pair(row, v, mask, half, x);
        }
        set(row, target[n], half, expf(goal - top) / weight - at_target);
    }
}

/* nll [N] = -log p of the target, smooth [N] = sum over v of -log p_v; both 0 where the target is `ignore`. If
 * `gradient`, logits [N, V] become p - q with q = at_target at the target and `each` elsewhere; 0 in ignored rows. They
 * are bfloat16 if `half`, else fp32. */
void moe_smoothed_loss(char *logits, float *nll, float *smooth, const int64_t *target, long ignore, float each,
                       float at_target, long gradient, long half, long from, long upto, long vocabulary) {
    if (half) {
        rows(logits, nll, smooth, target, ignore, each, at_target, gradient, from, upto, vocabulary, 1);
    } else {
        rows(logits, nll, smooth, target, ignore, each, at_target, gradient, from, upto, vocabulary, 0);
    }
}
