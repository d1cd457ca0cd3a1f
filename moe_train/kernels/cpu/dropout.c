/* Dropout, and the sum of a residual connection, in one pass. Called by moe_train/kernels/cpu/dropout.py. */
#include "bf16.h"

/* out = residual + y * scale, numbers from .. upto - 1, without y where the draw is less than `dropped`. residual: NULL if
 * there is none. All three are bfloat16 if `half`, else fp32. */
INLINE void pass(char *out, const char *y, const char *residual, const int16_t *draws, long dropped, float scale, long from,
                 long upto, int half) {
    __m512i least = _mm512_set1_epi16((short)dropped);
    __m512 factor = _mm512_set1_ps(scale);
    for (long i = from; i < upto; i += WIDTH) {
        __mmask32 mask = first(upto - i);
        __mmask32 kept = _mm512_cmpge_epi16_mask(_mm512_maskz_loadu_epi16(mask, draws + i), least);
        Pair x = load_pair(y, i, mask, half, 0);
        x.low = _mm512_maskz_mul_ps((__mmask16)kept, x.low, factor);
        x.high = _mm512_maskz_mul_ps((__mmask16)(kept >> 16), x.high, factor);
        if (residual) {
            Pair r = load_pair(residual, i, mask, half, 0);
            x.low = _mm512_add_ps(r.low, x.low);
            x.high = _mm512_add_ps(r.high, x.high);
        }
        store_pair(out, i, mask, half, x);
    }
}

void moe_dropout(char *out, const char *y, const char *residual, const int16_t *draws, long dropped, float scale,
                 long half, long from, long upto) {
    if (half) {
        pass(out, y, residual, draws, dropped, scale, from, upto, 1);
    } else {
        pass(out, y, residual, draws, dropped, scale, from, upto, 0);
    }
}
