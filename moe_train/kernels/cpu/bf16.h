/* Conversion of 32 bfloat16 numbers to fp32 and back. */
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

#endif
