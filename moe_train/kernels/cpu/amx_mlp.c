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

/* The rows `token` of x, as patches [n, d]; each in turn the token's row of a larger matrix. `dots` [n, 16]: NULL, or
 * parts of the dot products of the rows with `other` [d] (NULL: 0). */
static void gather(bf16 *to, const bf16 *x, const int64_t *token, long n, long d, const bf16 *other, float *dots) {
    long full = blocks(d) * BLOCK;
    for (long i = 0; i < blocks(n) * BLOCK; i++) {
        const bf16 *row = i < n ? x + token[i] * d : x;
        bf16 *at = to + i / BLOCK * BLOCK * full + i % BLOCK * BLOCK;
        if (i + 2 < n)
            for (long c = 0; c < d; c += BLOCK) _mm_prefetch((const char *)(x + token[i + 2] * d + c), _MM_HINT_T0);
        __m512 dot = _mm512_setzero_ps();
        for (long c = 0; c < d; c += BLOCK, at += PATCH) {
            __mmask32 mask = i < n ? first(d - c) : 0;
            __m512i part = load(mask, row + c);
            _mm512_store_si512(at, part);
            if (!other) continue;
            __m512i factor = load(mask, other + c);
            dot = _mm512_fmadd_ps(low_half(part), low_half(factor), dot);
            dot = _mm512_fmadd_ps(high_half(part), high_half(factor), dot);
        }
        if (dots) _mm512_store_ps(dots + 16 * i, dot);
    }
}

/* Multiplies the rows of patches [n, d] by their weights; sums [d], if not NULL, += the products. */
static void weigh(bf16 *x, const float *weight, float *sums, long n, long d) {
    long full = blocks(d) * BLOCK;
    for (long c = 0; c < d; c += BLOCK) {
        __m512 sum_low = _mm512_setzero_ps(), sum_high = sum_low;
        for (long i = 0; i < n; i++) {
            bf16 *at = x + i / BLOCK * BLOCK * full + c * BLOCK + i % BLOCK * BLOCK;
            __m512i row = _mm512_load_si512(at);
            __m512 by = _mm512_set1_ps(weight[i]);
            __m512 low = _mm512_mul_ps(by, low_half(row)), high = _mm512_mul_ps(by, high_half(row));
            sum_low = _mm512_add_ps(sum_low, low);
            sum_high = _mm512_add_ps(sum_high, high);
            _mm512_store_si512(at, narrow(low, high));
        }
        if (sums) add_to(sums + c, first(d - c), sum_low, sum_high);
    }
}

/* y [n, d]. `hidden`: NULL if there is no backward. `scale` [n, h]: factors of dropout, or NULL. `token` [n]: the rows
 * of x that are taken, or NULL: all in order. `weight` [n]: rows of y are multiplied by it and written to the places
 * `token`, or NULL. */
int moe_forward(bf16 *y, bf16 *hidden, const bf16 *x, const bf16 *w1, const bf16 *b1, const bf16 *w2, const bf16 *b2,
                const bf16 *scale, const int64_t *token, const float *weight, long n, long d, long h) {
    long of_hidden = hidden ? 0 : blocks(n) * blocks(h) * PAIR, of_rows = token ? blocks(n) * blocks(d) * PAIR : 0;
    long size = of_hidden + of_rows;
    Operand by_rows = plain(x, n, d, 0, 1), first_weight = plain(w1, d, h, 0, 0), second_weight = plain(w2, h, d, 0, 0);
    Operand like_hidden = patched(x, n, h, 0, 1); /* of its size */
    long need = workspace_to_multiply(&by_rows, &first_weight);
    need = max_of(need, workspace_to_multiply(&like_hidden, &second_weight));
    char *workspace = workspace_of(size + need);
    if (!workspace) return NO_MEMORY;
    if (!hidden) hidden = (bf16 *)workspace;
    if (token) {
        bf16 *rows = (bf16 *)(workspace + of_hidden);
        gather(rows, x, token, n, d, 0, 0);
        by_rows = patched(rows, n, d, 0, 1);
    }
    Operand by_hidden = patched(hidden, n, h, 0, 1);
    Result between = to_patched(hidden, n, h), last = to_plain(y, n, d);
    between.bias = b1;
    between.scale = scale;
    between.relu = 1;
    last.bias = b2;
    last.row_weight = weight;
    last.row = weight ? token : 0;
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
 * computed. `factor`: 1 / (1 - p) of dropout.
 *
 * With `token` [n], gy and x are matrices of which these rows are taken, y's rows were multiplied by `weight` [n], whose
 * gradient is `by_weight` [n], and b2 is read (NULL: none); `placed`: the rows of gx are written to the places `token`. */
int moe_backward(bf16 *gx, bf16 *gw1, float *gb1, bf16 *gw2, float *gb2, const bf16 *gy, const bf16 *hidden,
                 const bf16 *x, const bf16 *w1, const bf16 *w2, const bf16 *b2, const int64_t *token,
                 const float *weight, float *by_weight, float factor, int placed, long n, long d, long h) {
    long of_g = blocks(n) * blocks(h) * PAIR, of_rows = token ? blocks(n) * blocks(d) * PAIR : 0;
    long of_dots = token ? blocks(n) * BLOCK * 64 : 0, size = of_g + 2 * of_rows + of_dots;
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
    bf16 *taken = (bf16 *)((char *)g + of_g), *taken_x = (bf16 *)((char *)taken + of_rows);
    float *dots = (float *)((char *)taken_x + of_rows);
    if (token) {
        gather(taken, gy, token, n, d, b2, dots);
        gy_left = patched(taken, n, d, 0, 1);
        gy_right = patched(taken, n, d, 0, 0);
        to_g.row_weight = weight;
        to_g.row_dots = dots;
    }
    configure();
    multiply_matrices(&gy_left, &w2_turned, &to_g, workspace);
    if (token) {
        for (long i = 0; i < n; i++) by_weight[i] = _mm512_reduce_add_ps(_mm512_load_ps(dots + 16 * i));
        if (gw2 || gb2) weigh(taken, weight, gb2, n, d);
    } else if (gb2) {
        add_rows(gb2, gy, n, d);
    }
    if (gw2) {
        Result to_w2 = to_plain(gw2, h, d);
        to_w2.fresh = d % BLOCK == 0 && (uintptr_t)gw2 % 64 == 0;
        product(&gy_right, &hidden_turned, &to_w2, workspace);
    }
    if (gx) {
        Result to_x = to_plain(gx, n, d);
        to_x.row = placed ? token : 0;
        multiply_matrices(&g_left, &w1_turned, &to_x, workspace);
    }
    if (gw1) {
        Result to_w1 = to_plain(gw1, d, h);
        to_w1.fresh = h % BLOCK == 0 && (uintptr_t)gw1 % 64 == 0;
        if (token) {
            gather(taken_x, x, token, n, d, 0, 0);
            x_turned = patched(taken_x, n, d, 1, 1);
        }
        product(&g_right, &x_turned, &to_w1, workspace);
    }
    _mm_sfence();
    release();
    return 0;
}
