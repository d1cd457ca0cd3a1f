/* Feed-forward of one expert in bfloat16: act(X W1 + b1) W2 + b2 with ReLU and dropout, and all gradients.
 *
 * X [n, d], W1 [d, h], b1 [h], W2 [h, d], b2 [d]. `hidden` [n, h] are the rows between the products; they are kept from
 * forward to backward in patches, n and h padded to multiples of 32. Called by moe_train/kernels/cpu/amx_mlp.py.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_workspace.h"

enum { ASK_FOR_UNIT = 0x1023, TILE_DATA = 18 };

/* Requests permission to use the matrix unit, for the process and all threads started later. 0: permitted. */
int moe_request_amx(void) { return (int)syscall(SYS_arch_prctl, ASK_FOR_UNIT, TILE_DATA); }

/* y [n, d]. `hidden`: NULL if there is no backward. `scale` [n, h]: factors of dropout, or NULL. */
int moe_forward(bf16 *y, bf16 *hidden, const bf16 *x, const bf16 *w1, const bf16 *b1, const bf16 *w2, const bf16 *b2,
                const bf16 *scale, long n, long d, long h) {
    long size = hidden ? 0 : blocks(n) * blocks(h) * PAIR;
    Operand by_rows = plain(x, n, d, 0, 1), first_weight = plain(w1, d, h, 0, 0), second_weight = plain(w2, h, d, 0, 0);
    Operand like_hidden = patched(x, n, h, 0, 1); /* of its size */
    long need = workspace_to_multiply(&by_rows, &first_weight);
    need = max_of(need, workspace_to_multiply(&like_hidden, &second_weight));
    char *workspace = workspace_of(size + need);
    if (!workspace) return NO_MEMORY;
    if (!hidden) hidden = (bf16 *)workspace;
    Operand by_hidden = patched(hidden, n, h, 0, 1);
    Result between = to_patched(hidden, n, h), last = to_plain(y, n, d);
    between.bias = b1;
    between.scale = scale;
    between.relu = 1;
    last.bias = b2;
    configure();
    multiply_matrices(&by_rows, &first_weight, &between, workspace + size);
    multiply_matrices(&by_hidden, &second_weight, &last, workspace + size);
    release();
    return 0;
}

/* sums [columns] += the rows of x. */
static void add_rows(float *sums, const bf16 *x, long rows, long columns) {
    for (long c = 0; c < columns; c += WIDTH) {
        __mmask32 mask = first(columns - c);
        __m512 low = _mm512_setzero_ps(), high = low;
        for (long i = 0; i < rows; i++) {
            __m512i row = load(mask, x + i * columns + c);
            low = _mm512_add_ps(low, low_half(row));
            high = _mm512_add_ps(high, high_half(row));
        }
        add_to(sums + c, mask, low, high);
    }
}

/* Gradients of x, w1, b1, w2 and b2, from the gradient of y; those of biases are fp32 and accumulated. NULL: not
 * computed. `factor`: 1 / (1 - p) of dropout. */
int moe_backward(bf16 *gx, bf16 *gw1, float *gb1, bf16 *gw2, float *gb2, const bf16 *gy, const bf16 *hidden,
                 const bf16 *x, const bf16 *w1, const bf16 *w2, float factor, long n, long d, long h) {
    long size = blocks(n) * blocks(h) * PAIR;
    Operand gy_left = plain(gy, n, d, 0, 1), w2_turned = plain(w2, h, d, 1, 0);
    Operand hidden_turned = patched(hidden, n, h, 1, 1), gy_right = plain(gy, n, d, 0, 0);
    Operand w1_turned = plain(w1, d, h, 1, 0), x_turned = plain(x, n, d, 1, 1);
    Operand like_g_left = patched(hidden, n, h, 0, 1), like_g_right = patched(hidden, n, h, 0, 0);
    long need = max_of(workspace_to_multiply(&gy_left, &w2_turned), workspace_of_product(&gy_right, &hidden_turned));
    need = max_of(need, workspace_to_multiply(&like_g_left, &w1_turned));
    need = max_of(need, workspace_of_product(&like_g_right, &x_turned));
    bf16 *g = (bf16 *)workspace_of(size + need); /* gradient of ReLU's input */
    if (!g) return NO_MEMORY;
    char *workspace = (char *)g + size;
    Operand g_left = patched(g, n, h, 0, 1), g_right = patched(g, n, h, 0, 0);
    Result to_g = to_patched(g, n, h);
    to_g.kept = hidden;
    to_g.factor = factor;
    to_g.sums = gb1;
    configure();
    multiply_matrices(&gy_left, &w2_turned, &to_g, workspace);
    if (gb2) add_rows(gb2, gy, n, d);
    if (gw2) {
        Result to_w2 = to_plain(gw2, h, d);
        to_w2.fresh = d % BLOCK == 0 && (uintptr_t)gw2 % 64 == 0;
        product(&gy_right, &hidden_turned, &to_w2, workspace);
    }
    if (gx) {
        Result to_x = to_plain(gx, n, d);
        multiply_matrices(&g_left, &w1_turned, &to_x, workspace);
    }
    if (gw1) {
        Result to_w1 = to_plain(gw1, d, h);
        to_w1.fresh = h % BLOCK == 0 && (uintptr_t)gw1 % 64 == 0;
        product(&g_right, &x_turned, &to_w1, workspace);
    }
    _mm_sfence();
    release();
    return 0;
}
