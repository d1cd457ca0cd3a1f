/* Steps of a Transformer decoder, one token for each of N hypotheses, as a list of stages. Called by
 * moe_train/kernels/decoder/program.py.
 *
 * A step of torch operators is a hundred calls on small tensors, and copies of keys and values. Here a step is one call,
 * weights are packed once, and every hypothesis has a list of the slots of its ancestors' keys and values in a table of
 * its sentence (docs/decisions/0005), so that nothing but the list moves when hypotheses are reordered.
 *
 * Threads take the parts of a stage from a counter, and wait for each other between stages.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "products.h"

enum { EMBED, PRODUCT, NORM, SELF_ATTENTION, CROSS_ATTENTION };
enum { PARTS = 4, SPINS = 2000 }; /* parts of a stage per thread; pauses before a waiting thread lets others run */

typedef struct {
    long kind, format, inputs, outputs;
    const float *from; /* [N, inputs] */
    float *to;         /* [N, outputs] */
    const void *weight; /* packed; EMBED: the table [V, outputs] */
    const float *bias, *scale;
    const float *norm, *shift; /* of the layer norm of the product's rows, or of NORM; NULL: none */
    float *keys, *values;      /* SELF_ATTENTION: [sentences, slots, d]; CROSS_ATTENTION: rows of stride 2 d */
    long relu, add;
    float factor, eps; /* EMBED: of the table */
} Stage;

typedef struct {
    atomic_long next, done; /* parts of the stage */
} Progress;

typedef struct {
    long sentences, beam, position, heads, dim, room, slots, threads;
    long *place;    /* [sentences] row of each sentence in the tables below */
    int32_t *table; /* [places, beam, room] slot of each position of a hypothesis */
    const long *source_start, *source_length; /* [places] rows of the sentence's keys and values in CROSS_ATTENTION */
    const long *token;                        /* [N] */
} State;

/* to [n] = layer norm of x. */
INLINE void norm_row(float *to, const float *x, const float *weight, const float *shift, long n, float eps) {
    __m512 sum = _mm512_setzero_ps(), square = sum;
    for (long c = 0; c < n; c += 16) sum = _mm512_add_ps(sum, load16(x + c, n - c));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n);
    for (long c = 0; c < n; c += 16) {
        __m512 off = _mm512_maskz_sub_ps(first16(n - c), load16(x + c, n - c), mean);
        square = _mm512_fmadd_ps(off, off, square);
    }
    __m512 rate = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(square) / n + eps));
    for (long c = 0; c < n; c += 16) {
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(load16(x + c, n - c), mean), rate);
        y = _mm512_fmadd_ps(y, load16(weight + c, n - c), load16(shift + c, n - c));
        _mm512_mask_storeu_ps(to + c, first16(n - c), y);
    }
}

/* The rows of a product in the form of its weights, in this thread's `scratch`: tiles or fp32 rows, then a row, then
 * scales. */
static const float *prepare(const Stage *g, long rows, char *scratch, float *scales, float *row) {
    if (g->format == FP32 && !g->norm) return g->from;
    for (long r = 0; r < rows; r++) {
        const float *x = g->from + r * g->inputs;
        float *to = g->format == FP32 ? (float *)scratch + r * g->inputs : row;
        if (g->norm) norm_row(to, x, g->norm, g->shift, g->inputs, g->eps);
        if (g->format != FP32) scales[r] = pack_row(scratch, g->norm ? row : x, r, g->inputs, (int)g->format);
    }
    return (const float *)scratch;
}

static void run_product(const Stage *g, long rows, const float *x, const float *scales, long from, long upto) {
    Target y = {g->to, g->outputs, g->bias, g->scale, (int)g->relu, (int)g->add};
    if (g->format == FP32) fp32_product(x, g->inputs, rows, g->weight, g->inputs, &y, from, upto);
    if (g->format == BF16) tiled_product((const char *)x, scales, rows, g->weight, g->inputs, &y, from, upto, BF16);
    if (g->format == INT8) tiled_product((const char *)x, scales, rows, g->weight, g->inputs, &y, from, upto, INT8);
}

/* One query q [d] over `count` keys and values, at row ids[t] or t of stride `stride`: out [d]. */
INLINE void attend(float *out, const float *q, const float *keys, const float *values, const int32_t *ids, long stride,
                   long count, long heads, long dim) {
    float weights[(count + 15) / 16 * 16];
    long width = dim / heads;
    float scale = 1 / sqrtf(width);
    for (long h = 0; h < heads; h++) {
        const float *at = q + h * width;
        for (long t = 0; t < count; t++) {
            const float *key = keys + (ids ? ids[t] : t) * stride + h * width;
            __m512 sum = _mm512_setzero_ps();
            for (long c = 0; c < width; c += 16) sum = _mm512_fmadd_ps(load16(at + c, width - c), load16(key + c, width - c), sum);
            weights[t] = _mm512_reduce_add_ps(sum) * scale;
        }
        __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (long t = 0; t < count; t += 16)
            largest = _mm512_mask_max_ps(largest, first16(count - t), largest, _mm512_loadu_ps(weights + t));
        __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        for (long t = 0; t < count; t += 16) {
            __mmask16 mask = first16(count - t);
            __m512 e = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, weights + t), top)));
            total = _mm512_add_ps(total, e);
            _mm512_storeu_ps(weights + t, e);
        }
        __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
        for (long c = 0; c < width; c += 16) {
            __mmask16 mask = first16(width - c);
            __m512 sum = _mm512_setzero_ps();
            for (long t = 0; t < count; t++) {
                const float *value = values + (ids ? ids[t] : t) * stride + h * width + c;
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[t]), _mm512_maskz_loadu_ps(mask, value), sum);
            }
            _mm512_mask_storeu_ps(out + h * width + c, mask, _mm512_mul_ps(sum, share));
        }
    }
}

/* from [N, 3 d]: query, key and value of the position. */
static void self_attention(const Stage *g, const State *s, long from, long upto) {
    long d = s->dim;
    for (long b = from; b < upto; b++) {
        const int32_t *table = s->table + s->place[b] * s->beam * s->room;
        float *keys = g->keys + s->place[b] * s->slots * d, *values = g->values + s->place[b] * s->slots * d;
        for (long j = 0; j < s->beam; j++) {
            const float *row = g->from + (b * s->beam + j) * 3 * d;
            long slot = table[j * s->room + s->position];
            memcpy(keys + slot * d, row + d, d * sizeof(float));
            memcpy(values + slot * d, row + 2 * d, d * sizeof(float));
        }
        for (long j = 0; j < s->beam; j++) {
            long row = b * s->beam + j;
            attend(g->to + row * d, g->from + row * 3 * d, keys, values, table + j * s->room, d, s->position + 1, s->heads, d);
        }
    }
}

static void cross_attention(const Stage *g, const State *s, long from, long upto) {
    long d = s->dim;
    for (long row = from * s->beam; row < upto * s->beam; row++) {
        long place = s->place[row / s->beam], start = s->source_start[place] * 2 * d;
        attend(g->to + row * d, g->from + row * d, g->keys + start, g->values + start, 0, 2 * d, s->source_length[place],
               s->heads, d);
    }
}

static void embed(const Stage *g, const State *s, long from, long upto) {
    const float *position = g->bias + s->position * g->outputs;
    for (long row = from; row < upto; row++) {
        const float *word = (const float *)g->weight + s->token[row] * g->outputs;
        for (long c = 0; c < g->outputs; c++) g->to[row * g->outputs + c] = g->factor * word[c] + position[c];
    }
}

/* Parts into which a stage is divided, of `units` panels, rows or sentences. */
static long units_of(const Stage *g, const State *s) {
    if (g->kind == PRODUCT) return (g->outputs + STRIP - 1) / STRIP;
    return g->kind == EMBED || g->kind == NORM ? s->sentences * s->beam : s->sentences;
}

static void run_part(const Stage *g, const State *s, const float *x, const float *scales, long from, long upto) {
    switch (g->kind) {
    case EMBED: embed(g, s, from, upto); break;
    case PRODUCT: run_product(g, s->sentences * s->beam, x, scales, from, upto); break;
    case NORM:
        for (long r = from; r < upto; r++)
            norm_row(g->to + r * g->outputs, g->from + r * g->outputs, g->norm, g->shift, g->outputs, g->eps);
        break;
    case SELF_ATTENTION: self_attention(g, s, from, upto); break;
    case CROSS_ATTENTION: cross_attention(g, s, from, upto); break;
    }
}

/* Runs `count` stages; called by each thread with the same `progress` [count], zero at the start, and with its own
 * scratch memory: `scratch` aligned to 64 bytes, `scales` [N], `row` [inputs]. */
void moe_run_stages(const Stage *stages, Progress *progress, long count, const State *s, char *scratch, float *scales,
                    float *row) {
    int tiled = 0;
    for (long i = 0; i < count; i++) tiled |= stages[i].kind == PRODUCT && stages[i].format != FP32;
    if (tiled) configure();
    for (long i = 0; i < count; i++) {
        const Stage *g = stages + i;
        long units = units_of(g, s), parts = s->threads == 1 ? 1 : min_of(units, s->threads * PARTS), part, spins = 0;
        const float *x = 0;
        while ((part = atomic_fetch_add(&progress[i].next, 1)) < parts) {
            if (g->kind == PRODUCT && !x) x = prepare(g, s->sentences * s->beam, scratch, scales, row);
            run_part(g, s, x, scales, part * units / parts, (part + 1) * units / parts);
            atomic_fetch_add(&progress[i].done, 1);
        }
        while (atomic_load(&progress[i].done) < parts) {
            _mm_pause();
            if (++spins % SPINS == 0) sched_yield();
        }
    }
    if (tiled) _tile_release();
}

/* Hypothesis i continues the former hypothesis rows[i]; NULL: itself. The hypotheses of a sentence are adjacent, and some
 * sentences may be left out. Gives every hypothesis a free slot for `position`. `old` [beam, room] and `used` [slots] are
 * scratch. Returns the number of sentences, or -1 if hypotheses of one sentence continue those of different ones. */
long moe_continue(State *s, const long *rows, long sentences, int32_t *old, char *used) {
    long k = s->beam, length = s->position;
    for (long b = 0; rows && b < sentences; b++)
        for (long j = 0; j < k; j++)
            if (rows[b * k + j] / k != rows[b * k] / k || (b && rows[b * k] / k <= rows[(b - 1) * k] / k)) return -1;
    for (long b = 0; b < sentences; b++) {
        if (rows) s->place[b] = s->place[rows[b * k] / k];
        int32_t *table = s->table + s->place[b] * k * s->room;
        for (long j = 0; rows && j < k; j++) memcpy(old + j * length, table + rows[b * k + j] % k * s->room, length * sizeof *old);
        memset(used, 0, s->slots);
        for (long j = 0; j < k; j++) {
            if (rows) memcpy(table + j * s->room, old + j * length, length * sizeof *old);
            for (long t = 0; t < length; t++) used[table[j * s->room + t]] = 1;
        }
        for (long j = 0, slot = 0; j < k; j++, slot++) {
            while (used[slot]) slot++;
            table[j * s->room + length] = (int32_t)slot;
        }
    }
    s->sentences = sentences;
    return sentences;
}

/* y [rows, d] = relu(x W1^T + b1) W2^T + b2 of one expert. `hidden` [rows, h] and what moe_run_stages has are scratch. */
void moe_run_expert(const Stage *first, const Stage *second, long rows, const float *x, float *hidden, float *y, char *scratch,
                    float *scales) {
    Stage stages[2] = {*first, *second};
    stages[0].from = x;
    stages[0].to = hidden;
    stages[1].from = hidden;
    stages[1].to = y;
    if (first->format != FP32) configure();
    for (int i = 0; i < 2; i++) {
        const float *ready = prepare(stages + i, rows, scratch, scales, 0);
        run_product(stages + i, rows, ready, scales, 0, units_of(stages + i, 0));
    }
    if (first->format != FP32) _tile_release();
}
