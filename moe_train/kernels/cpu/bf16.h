/* 32 bfloat16 numbers as fp32 ones and back, rows of either type, and e^x. */
#ifndef MOE_TRAIN_BF16_H
#define MOE_TRAIN_BF16_H

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;
enum { WIDTH = 32 };

#define INLINE static inline __attribute__((always_inline))

/* Mask of the first n of 32; all of them if n is larger. */
INLINE __mmask32 first(long n) { return n >= WIDTH ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

INLINE __m512i load(__mmask32 mask, const bf16 *at) { return _mm512_maskz_loadu_epi16(mask, at); }

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 low_half(__m512i x) { return widen(_mm512_castsi512_si256(x)); }
INLINE __m512 high_half(__m512i x) { return widen(_mm512_extracti64x4_epi64(x, 1)); }

/* To the nearest, ties to even; numbers below the smallest normal one (1e-38) become 0. */
INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

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

typedef struct {
    __m512 low, high;
} Pair;

/* 32 numbers of a row, bfloat16 if `half`, else fp32; `end` where the mask is 0. */
INLINE Pair load_pair(const char *row, long v, __mmask32 mask, int half, float end) {
    __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
    __m512 other = _mm512_set1_ps(end);
    if (half) {
        __m512i x = load(mask, (const bf16 *)row + v);
        return (Pair){_mm512_mask_mov_ps(other, low, low_half(x)), _mm512_mask_mov_ps(other, high, high_half(x))};
    }
    const float *at = (const float *)row + v;
    return (Pair){_mm512_mask_loadu_ps(other, low, at), _mm512_mask_loadu_ps(other, high, at + 16)};
}

INLINE void store_pair(char *row, long v, __mmask32 mask, int half, Pair x) {
    if (half) {
        _mm512_mask_storeu_epi16((bf16 *)row + v, mask, narrow(x.low, x.high));
    } else {
        _mm512_mask_storeu_ps((float *)row + v, (__mmask16)mask, x.low);
        _mm512_mask_storeu_ps((float *)row + v + 16, (__mmask16)(mask >> 16), x.high);
    }
}

#endif
