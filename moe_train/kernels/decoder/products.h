/* Products of fp32 rows with packed weights: y = x W^T, W in fp32, bfloat16 or int8.
 *
 * A packed weight is a list of panels of 32 outputs. In fp32 a panel holds 32 numbers for each input. In 16 and 8 bits it
 * holds two tiles of the matrix unit (amx_matrix.h) for each 32 or 64 inputs, padded with zeros. Rows are converted to
 * tiles first; in int8 with a scale per row, so that no result depends on other rows.
 */
#ifndef MOE_TRAIN_PRODUCTS_H
#define MOE_TRAIN_PRODUCTS_H

#include <math.h>

#include "amx_matrix.h"

enum { FP32, BF16, INT8 };
/* Outputs of a panel; rows that fp32 computes at a time (24 of 32 registers hold sums); inputs fetched ahead. */
enum { STRIP = 32, GROUP = 12, AHEAD = 12 };

/* Where a product is written: y [rows, outputs] = relu(x W^T scale + bias), or added to y. */
typedef struct {
    float *to;
    long outputs;
    const float *bias, *scale; /* [outputs] or NULL; scale: of the int8 weights */
    int relu, add;
} Target;

INLINE __mmask16 first16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

INLINE __m512 load16(const float *at, long n) { return _mm512_maskz_loadu_ps(first16(n), at); }

/* Writes 16 results of one row. `column`: the first of them. */
INLINE void put(const Target *y, long row, long column, __m512 sum) {
    __mmask16 mask = first16(y->outputs - column);
    float *to = y->to + row * y->outputs + column;
    if (y->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y->bias + column));
    if (y->relu) sum = _mm512_max_ps(_mm512_setzero_ps(), sum); /* in this operand order NaN is kept */
    if (y->add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, sum);
}

/* Up to GROUP rows of x times one fp32 panel. */
INLINE void strip(const float *x, long stride, const float *w, long inputs, const Target *y, long row, long column,
                  const int rows) {
    __m512 low[GROUP], high[GROUP];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (long k = 0; k < inputs; k++, w += STRIP) {
        __m512 one = _mm512_load_ps(w), two = _mm512_load_ps(w + 16);
        _mm_prefetch((const char *)(w + AHEAD * STRIP), _MM_HINT_T0);
        _mm_prefetch((const char *)(w + AHEAD * STRIP + 16), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512 a = _mm512_set1_ps(x[r * stride + k]);
            low[r] = _mm512_fmadd_ps(a, one, low[r]);
            high[r] = _mm512_fmadd_ps(a, two, high[r]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        put(y, row + r, column, low[r]);
        put(y, row + r, column + 16, high[r]);
    }
}

static void fp32_product(const float *x, long stride, long rows, const float *weight, long inputs, const Target *y,
                         long from, long upto) {
    for (long p = from; p < upto; p++) {
        const float *w = weight + p * STRIP * inputs;
        for (long row = 0; row < rows;) {
            long left = rows - row, now = left <= GROUP ? left : left < 2 * GROUP ? (left + 1) / 2 : GROUP;
            const float *at = x + row * stride;
            switch (now) {
#define CASE(n)                                                      \
    case n:                                                          \
        strip(at, stride, w, inputs, y, row, p * STRIP, n);          \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
            }
            row += now;
        }
    }
}

/* Pairs of tiles of a row of `inputs` numbers. */
INLINE long depth_of(long inputs, int format) { return format == INT8 ? (inputs + 63) / 64 : (inputs + 31) / 32; }

/* Converts row `row` of x to the tiles `to` [panel of 32 rows, depth, 2 tiles]; in int8 returns the row's scale. */
INLINE float pack_row(char *to, const float *x, long row, long inputs, int format) {
    long deep = depth_of(inputs, format);
    char *at = to + (row / BLOCK) * deep * PAIR + (row % BLOCK) / 16 * TILE + row % 16 * 64;
    if (format == BF16) {
        for (long k = 0; k < inputs; k += 32, at += PAIR)
            _mm512_store_si512(at, narrow(load16(x + k, inputs - k), load16(x + k + 16, inputs - k - 16)));
        return 1;
    }
    __m512 largest = _mm512_setzero_ps();
    for (long k = 0; k < inputs; k += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load16(x + k, inputs - k)));
    float top = _mm512_reduce_max_ps(largest), scale = top > 0 ? 127 / top : 0;
    __m512 factor = _mm512_set1_ps(scale);
    for (long k = 0; k < inputs; k += 64, at += PAIR)
        for (long c = 0; c < 64; c += 16) {
            __m512 v = _mm512_mul_ps(load16(x + k + c, inputs - k - c), factor);
            _mm_store_si128((__m128i *)(at + c), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
        }
    return top / 127;
}

/* 32 x 32 sums of a panel of rows and one of weights; only the first 16 rows if not `whole`. */
INLINE void tiles(const char *a, const char *b, long deep, int whole, const int integers, void *sums) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tile loads read memory */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < deep; k++, a += PAIR, b += PAIR) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE, 64);
        if (whole) _tile_loadd(5, a + TILE, 64);
        if (integers) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (whole) _tile_dpbssd(2, 5, 6);
            if (whole) _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (whole) _tile_dpbf16ps(2, 5, 6);
            if (whole) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, (char *)sums + 64, 128);
    if (whole) _tile_stored(2, (char *)sums + 16 * 128, 128);
    if (whole) _tile_stored(3, (char *)sums + 16 * 128 + 64, 128);
    __asm__ volatile("" ::: "memory");
}

/* `packed`: the rows by pack_row, `scales` [rows] theirs in int8. */
INLINE void tiled_product(const char *packed, const float *scales, long rows, const char *weight, long inputs,
                          const Target *y, long from, long upto, const int format) {
    _Alignas(64) float sums[PATCH];
    long deep = depth_of(inputs, format);
    for (long p = from; p < upto; p++) {
        __m512 low_scale = _mm512_setzero_ps(), high_scale = low_scale;
        if (format == INT8) {
            low_scale = load16(y->scale + p * STRIP, y->outputs - p * STRIP);
            high_scale = load16(y->scale + p * STRIP + 16, y->outputs - p * STRIP - 16);
        }
        for (long row = 0; row < rows; row += BLOCK) {
            long now = min_of(rows - row, BLOCK);
            tiles(packed + row / BLOCK * deep * PAIR, weight + p * deep * PAIR, deep, now > 16, format == INT8, sums);
            for (long i = 0; i < now; i++) {
                __m512 low = _mm512_load_ps(sums + i * BLOCK), high = _mm512_load_ps(sums + i * BLOCK + 16);
                if (format == INT8) {
                    __m512 scale = _mm512_set1_ps(scales[row + i]);
                    low = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(low)), _mm512_mul_ps(scale, low_scale));
                    high = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(high)), _mm512_mul_ps(scale, high_scale));
                }
                put(y, row + i, p * STRIP, low);
                put(y, row + i, p * STRIP + 16, high);
            }
        }
    }
}

#endif
