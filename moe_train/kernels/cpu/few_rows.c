/* Products of few fp32 rows with a large matrix. Called by moe_train/kernels/cpu/few_rows.py.
 *
 * Such a product waits for the matrix. Here it is read once, row by row as it stands in memory, and sums stay in the
 * first cache. BLAS copies it first.
 */
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16, ROWS = 8, DEEP = 4 };

/* y [rows, m] += x [rows, deep] w [deep, m]; rows of x are k apart. */
INLINE void add_product(float *y, const float *x, const float *w, int rows, int deep, long k, long m) {
    for (long c = 0; c < m; c += 2 * LANES) {
        long left = m - c;
        __mmask16 one = left >= LANES ? 0xffff : (1u << left) - 1;
        __mmask16 two = left >= 2 * LANES ? 0xffff : left <= LANES ? 0 : (1u << (left - LANES)) - 1;
        __m512 first[DEEP], second[DEEP];
        for (int j = 0; j < deep; j++) {
            first[j] = _mm512_maskz_loadu_ps(one, w + j * m + c);
            second[j] = _mm512_maskz_loadu_ps(two, w + j * m + c + LANES);
        }
        for (int i = 0; i < rows; i++) {
            float *sums = y + i * m + c;
            __m512 low = _mm512_maskz_loadu_ps(one, sums), high = _mm512_maskz_loadu_ps(two, sums + LANES);
            for (int j = 0; j < deep; j++) {
                __m512 factor = _mm512_set1_ps(x[i * k + j]);
                low = _mm512_fmadd_ps(factor, first[j], low);
                high = _mm512_fmadd_ps(factor, second[j], high);
            }
            _mm512_mask_storeu_ps(sums, one, low);
            _mm512_mask_storeu_ps(sums + LANES, two, high);
        }
    }
}

/* y [n, m] = x [n, k] w [k, m] + bias [m] (NULL: none), negative numbers replaced by 0 if `relu`. */
void moe_few_rows(float *y, const float *x, const float *w, const float *bias, long n, long k, long m, int relu) {
    for (long i = 0; i < n; i++)
        for (long c = 0; c < m; c++) y[i * m + c] = bias ? bias[c] : 0;
    for (long j = 0; j < k; j += DEEP) {
        int deep = k - j < DEEP ? k - j : DEEP;
        for (long i = 0; i < n; i += ROWS) {
            int rows = n - i < ROWS ? n - i : ROWS;
            if (rows == ROWS && deep == DEEP)
                add_product(y + i * m, x + i * k + j, w + j * m, ROWS, DEEP, k, m);
            else
                add_product(y + i * m, x + i * k + j, w + j * m, rows, deep, k, m);
        }
    }
    if (relu) /* NaN is kept */
        for (long c = 0; c < n * m; c++) y[c] = y[c] < 0 ? 0 : y[c];
}
