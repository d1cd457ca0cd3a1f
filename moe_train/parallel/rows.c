/* Rows of bfloat16 taken, added up and multiplied, with fp32 sums. Called by moe_train/parallel/native_rows.py.
 *
 * Plain loops, left to the compiler's vectors. Each pass reads every row once; torch's kernels for the same widen rows
 * to fp32 first, or take weights in the type of the rows.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
enum { WIDTH = 64 }; /* sums that stay in registers */

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value == value ? (bf16)rounded : 0x7fc0;
}

/* out [n, d]: row token[i] of x. */
void moe_take(bf16 *out, const bf16 *x, const int64_t *token, long from, long upto, long d) {
    for (long i = from; i < upto; i++) memcpy(out + i * d, x + token[i] * d, d * sizeof *out);
}

/* out [T, d]: for each token t the sum over p of weight[p] times row ids[p] of values, p from start[t] to before
 * start[t + 1], which is `total` for the last of all T tokens. weight: NULL where all are 1. */
void moe_add_up(bf16 *out, const bf16 *values, const int64_t *ids, const int64_t *start, const float *weight,
                long tokens, long total, long from, long upto, long d) {
    for (long t = from; t < upto; t++) {
        long end = t + 1 < tokens ? start[t + 1] : total;
        for (long c = 0; c < d; c += WIDTH) {
            long width = d - c < WIDTH ? d - c : WIDTH;
            float sums[WIDTH] = {0};
            for (long p = start[t]; p < end; p++) {
                const bf16 *row = values + ids[p] * d + c;
                float w = weight ? weight[p] : 1;
                if (width == WIDTH) {
                    for (long i = 0; i < WIDTH; i++) sums[i] += w * widen(row[i]);
                } else {
                    for (long i = 0; i < width; i++) sums[i] += w * widen(row[i]);
                }
            }
            for (long i = 0; i < width; i++) out[t * d + c + i] = narrow(sums[i]);
        }
    }
}

/* Of y_t = sum of weight[i] values[i] over the rows i of token t, given y's gradient [T, d]: by_values [n, d], and
 * by_weight [n], the product of each row of values and its token's gradient. */
void moe_add_up_backward(bf16 *by_values, float *by_weight, const bf16 *grad, const bf16 *values, const float *weight,
                         const int64_t *token, long from, long upto, long d) {
    for (long i = from; i < upto; i++) {
        const bf16 *g = grad + token[i] * d, *v = values + i * d;
        bf16 *out = by_values + i * d;
        float sum = 0, w = weight[i];
#pragma omp simd reduction(+ : sum)
        for (long c = 0; c < d; c++) {
            float x = widen(g[c]);
            sum += x * widen(v[c]);
            out[c] = narrow(w * x);
        }
        by_weight[i] = sum;
    }
}
