/* One product of bfloat16 matrices of any size, with bias and ReLU. Called by moe_train/kernels/cpu/amx_linear.py. */
#include "amx_workspace.h"

enum { PART = 1024 }; /* K of one product; longer ones are added up in fp32 blocks */

/* The part from .. from + count - 1 of K. */
INLINE Operand part_of(Operand o, long from, long count) {
    if (o.turned == o.left) {
        o.at += from * o.stride;
        o.rows = count;
    } else {
        o.at += from;
        o.columns = count;
    }
    return o;
}

/* y [n, m] = act(A B + bias), A [n, k], stored as its transpose if a_turned, B [k, m], likewise. The strides are the
 * distances of stored rows. `kept` [n, m]: the result is 0 where this is 0. `wide`: fp32 [n, m], to which the product is
 * added instead of being written to y. */
int moe_linear(bf16 *y, float *wide, const bf16 *a, const bf16 *b, const bf16 *bias, const bf16 *kept, long n, long m,
               long k, long a_stride, long b_stride, long a_turned, long b_turned, long relu) {
    Operand left = plain(a, a_turned ? k : n, a_turned ? n : k, a_turned, 1);
    Operand right = plain(b, b_turned ? m : k, b_turned ? k : m, b_turned, 0);
    left.stride = a_stride;
    left.down = BLOCK * a_stride;
    right.stride = b_stride;
    right.down = BLOCK * b_stride;
    Result to = to_plain(y, n, m);
    to.wide = wide;
    to.bias = bias;
    to.kept = kept;
    to.factor = 1;
    to.relu = relu;
    Operand left_part = part_of(left, 0, min_of(k, PART)), right_part = part_of(right, 0, min_of(k, PART));
    long need = workspace_to_multiply(&left_part, &right_part);
    long size = k > PART ? blocks(n) * blocks(m) * SUMS : 0;
    char *workspace = workspace_of(size + need);
    if (!workspace) return NO_MEMORY;
    if (k > PART) to.blocks = (float *)workspace;
    configure();
    for (long from = 0; from < k; from += PART) {
        long count = min_of(PART, k - from);
        left_part = part_of(left, from, count);
        right_part = part_of(right, from, count);
        to.begun = from > 0;
        to.unfinished = from + count < k;
        multiply_matrices(&left_part, &right_part, &to, workspace + size);
    }
    release();
    return 0;
}

/* to [columns] = the sums over the rows of x; `sums` [columns] is used for them. */
void moe_column_sums(bf16 *to, float *sums, const bf16 *x, long rows, long columns, long stride) {
    for (long c = 0; c < columns; c += WIDTH) {
        __mmask32 mask = first(columns - c);
        _mm512_mask_storeu_ps(sums + c, (__mmask16)mask, _mm512_setzero_ps());
        _mm512_mask_storeu_ps(sums + c + 16, (__mmask16)(mask >> 16), _mm512_setzero_ps());
    }
    for (long i = 0; i < rows; i += 8) {
        long count = min_of(8, rows - i);
        for (long c = 0; c < columns; c += WIDTH) {
            __mmask32 mask = first(columns - c);
            __m512 low = _mm512_setzero_ps(), high = low;
            for (long j = 0; j < count; j++) {
                __m512i row = load(mask, x + (i + j) * stride + c);
                low = _mm512_add_ps(low, low_half(row));
                high = _mm512_add_ps(high, high_half(row));
            }
            add_to(sums + c, mask, low, high);
        }
    }    for (long c = 0; c < columns; c += WIDTH) {
        __mmask32 mask = first(columns - c);
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, sums + c);
        __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), sums + c + 16);
        _mm512_mask_storeu_epi16(to + c, mask, narrow(low, high));
    }
}
