/* Products of bfloat16 matrices on the matrix unit of x86 processors (AMX), with fp32 sums.
 *
 * The unit multiplies tiles: 16 rows of 64 bytes. A tile of A [M, K] holds 16 rows of 32 numbers; a tile of B [K, N]
 * holds 16 columns, in one row for each pair of neighbours in K. So a matrix is packed first, in patches of 32 x 32
 * numbers, two tiles each, padded with zeros at the edges.
 *
 * One operand of a product is held: packed whole, or as much of it as fits in the second-level cache. The other passes
 * in panels of 32 rows or columns; while some are multiplied the next are prefetched, since small products are bound by
 * memory latency.
 */
#ifndef MOE_TRAIN_MATRIX_H
#define MOE_TRAIN_MATRIX_H

#include "bf16.h"

enum {
    BLOCK = WIDTH,
    PATCH = BLOCK * BLOCK,
    TILE = 1024,
    PAIR = 2 * TILE,
    SUMS = 4 * PATCH,
    HELD = 1 << 20, /* half of a second-level cache (2 MB a core since Sapphire Rapids) */
    SHALLOW = 8,    /* two panels of so many pairs are two thirds of a first-level cache (48 KB) */
};

/* One operand of a product, in patches. `down`: distance to the patch below; `across`: to the patch on the right. */
typedef struct {
    const bf16 *at;
    long stride, down, across; /* in numbers; stride: from row to row within a patch */
    long rows, columns;        /* as stored */
    int turned;                /* the operand is the transpose of the stored matrix */
    int left;                  /* it is A, not B */
    const char *packed;        /* its tiles, if it is stored as tiles */
} Operand;

/* Destination of a product, and operations applied before it is written. */
typedef struct {
    bf16 *at;
    long stride, down, across, rows, columns;
    int patched;       /* whole blocks are written, padding included */
    const bf16 *bias;  /* [columns], added */
    const bf16 *scale; /* [rows, columns], multiplied after ReLU */
    const bf16 *kept;  /* laid out like `at`: the result is 0 where this is 0, else multiplied by `factor` */
    float factor;
    const float *row_weight; /* [rows], multiplied last */
    float *row_dots;         /* [rows, 16]: parts of the dot product of each row, not yet masked, with that of `kept` */
    const int64_t *row;      /* [rows], the place of each row; NULL: in order */
    float *sums;             /* [columns], the sums over rows are added to it */
    int relu;
    int fresh; /* non-temporal stores: it is not read soon */
    float *wide;   /* the result is added to this fp32 matrix, with the same places, and nothing else is done */
    float *blocks; /* one block of 32 x 32 sums after another, if K is divided over several products; else NULL */
    int begun, unfinished; /* of these products: there was one before; there is one more */
} Result;

INLINE long blocks(long n) { return (n + BLOCK - 1) / BLOCK; }
INLINE long min_of(long a, long b) { return a < b ? a : b; }
INLINE long max_of(long a, long b) { return a > b ? a : b; }

/* A row-major matrix [rows, columns]. */
INLINE Operand plain(const bf16 *at, long rows, long columns, int turned, int left) {
    return (Operand){at, columns, BLOCK * columns, BLOCK, rows, columns, turned, left, 0};
}

/* A matrix stored patch after patch, in rows of patches: as operand A these are tiles already. */
INLINE Operand patched(const bf16 *at, long rows, long columns, int turned, int left) {
    long full = blocks(columns) * BLOCK;
    const char *packed = left && !turned ? (const char *)at : 0;
    return (Operand){at, BLOCK, BLOCK * full, PATCH, blocks(rows) * BLOCK, full, turned, left, packed};
}

INLINE Result to_plain(bf16 *at, long rows, long columns) {
    return (Result){at, columns, BLOCK * columns, BLOCK, rows, columns, .patched = 0};
}

INLINE Result to_patched(bf16 *at, long rows, long columns) {
    long full = blocks(columns) * BLOCK;
    return (Result){at, BLOCK, BLOCK * full, PATCH, rows, columns, .patched = 1};
}

/* 16 x 16 pairs of numbers, transposed. */
INLINE void turn(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

INLINE __m512i row_of_patch(const Operand *o, const bf16 *at, long i, long rows, __mmask32 mask) {
    return load(i < rows ? mask : 0, at + i * o->stride);
}

/* Packs the patch with index (down, across) as two tiles. */
INLINE void pack_patch(char *to, const Operand *o, long down, long across) {
    static const uint16_t ZIP[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const bf16 *at = o->at + down * o->down + across * o->across;
    long rows = o->rows - down * BLOCK;
    __mmask32 mask = first(o->columns - across * BLOCK);
    __m512i one[16], two[16];
    if (o->turned == o->left) { /* K is the stored row dimension: rows that are neighbours in K are interleaved */
        __m512i low = _mm512_loadu_si512(ZIP), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int i = 0; i < 16; i++) {
            __m512i even = row_of_patch(o, at, 2 * i, rows, mask), odd = row_of_patch(o, at, 2 * i + 1, rows, mask);
            one[i] = _mm512_permutex2var_epi16(even, low, odd);
            two[i] = _mm512_permutex2var_epi16(even, high, odd);
        }
    } else {
        for (int i = 0; i < 16; i++) {
            one[i] = row_of_patch(o, at, i, rows, mask);
            two[i] = row_of_patch(o, at, i + 16, rows, mask);
        }
    }
    if (o->turned) {
        turn(one);
        turn(two);
    }
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(to + 64 * i, one[i]);
        _mm512_store_si512(to + TILE + 64 * i, two[i]);
    }
}

/* Whether M (of A) or N (of B) is the stored row dimension; K is then the column dimension. */
INLINE int runs_down(const Operand *o) { return o->left != o->turned; }
INLINE long extent(const Operand *o) { return blocks(runs_down(o) ? o->rows : o->columns); } /* panels */
INLINE long depth(const Operand *o) { return blocks(runs_down(o) ? o->columns : o->rows); }  /* pairs of tiles in one */

/* Packs panels from .. upto - 1, in memory order. */
static inline void pack(char *to, const Operand *o, long from, long upto) {
    long deep = depth(o);
    if (runs_down(o)) {
        for (long x = from; x < upto; x++)
            for (long k = 0; k < deep; k++) pack_patch(to + ((x - from) * deep + k) * PAIR, o, x, k);
    } else {
        for (long k = 0; k < deep; k++)
            for (long x = from; x < upto; x++) pack_patch(to + ((x - from) * deep + k) * PAIR, o, k, x);
    }
}

/* Rows from .. upto - 1 of each patch of the panel to be packed next. */
typedef struct {
    const bf16 *at;
    long step, stride, from, upto;
} Ahead;

INLINE Ahead ahead(const Operand *o, long panel, long part, long parts) {
    if (o->packed || panel >= extent(o)) return (Ahead){0};
    const bf16 *at = o->at + panel * (runs_down(o) ? o->down : o->across);
    return (Ahead){at, runs_down(o) ? o->across : o->down, o->stride, part * BLOCK / parts, (part + 1) * BLOCK / parts};
}

INLINE void fetch(Ahead next, long k) {
    for (long i = next.from; i < next.upto; i++)
        _mm_prefetch((const char *)(next.at + k * next.step + i * next.stride), _MM_HINT_T1);
}

/* One block of 32 x 32 sums, from a panel of A and one of B; only the first 16 rows of A if the others are zero. `begun`:
 * the products are added to the sums.
 *
 * Each tile is loaded again as soon as its last product is issued: if another hardware thread shares the unit and the
 * caches, products and loads overlap less otherwise (a sixth faster there, the same elsewhere). */
INLINE void multiply(const char *a, const char *b, long deep, int whole, float *sums, int begun, Ahead next) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tile loads read memory */
    if (begun) {
        _tile_loadd(0, sums, 4 * BLOCK);
        _tile_loadd(1, sums + 16, 4 * BLOCK);
        _tile_loadd(2, sums + 16 * BLOCK, 4 * BLOCK);
        _tile_loadd(3, sums + 16 * BLOCK + 16, 4 * BLOCK);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + TILE, 64);
    if (whole) _tile_loadd(5, a + TILE, 64);
    for (long k = 1; k < deep; k++) {
        a += PAIR;
        b += PAIR;
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, a, 64);
        if (whole) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b, 64);
        if (whole) _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, b + TILE, 64);
        if (whole) _tile_loadd(5, a + TILE, 64);
        fetch(next, k - 1);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (whole) _tile_dpbf16ps(2, 5, 6);
    if (whole) _tile_dpbf16ps(3, 5, 7);
    fetch(next, deep - 1);
    _tile_stored(0, sums, 4 * BLOCK);
    _tile_stored(1, sums + 16, 4 * BLOCK);
    _tile_stored(2, sums + 16 * BLOCK, 4 * BLOCK);
    _tile_stored(3, sums + 16 * BLOCK + 16, 4 * BLOCK);
    __asm__ volatile("" ::: "memory");
}

INLINE void add_to(float *sums, __mmask32 mask, __m512 low, __m512 high) {
    __mmask16 mask_low = (__mmask16)mask, mask_high = (__mmask16)(mask >> 16);
    _mm512_mask_storeu_ps(sums, mask_low, _mm512_add_ps(_mm512_maskz_loadu_ps(mask_low, sums), low));
    _mm512_mask_storeu_ps(sums + 16, mask_high, _mm512_add_ps(_mm512_maskz_loadu_ps(mask_high, sums + 16), high));
}

/* Adds the block with index (down, across) to an fp32 matrix. */
INLINE void finish_wide(const Result *c, long down, long across, const float *block) {
    __mmask32 mask = first(c->columns - across * BLOCK);
    float *at = c->wide + down * c->down + across * c->across;
    for (long i = 0; i < min_of(c->rows - down * BLOCK, BLOCK); i++, block += BLOCK, at += c->stride)
        add_to(at, mask, _mm512_load_ps(block), _mm512_load_ps(block + 16));
}

/* Writes the block with index (down, across). */
INLINE void finish(const Result *c, long down, long across, const float *block) {
    long real = min_of(c->rows - down * BLOCK, BLOCK), rows = c->patched ? BLOCK : real;
    long place = down * c->down + across * c->across;
    __mmask32 mask = first(c->columns - across * BLOCK), written = c->patched ? first(BLOCK) : mask;
    __m512 zero = _mm512_setzero_ps(), sum_low = zero, sum_high = zero, factor = _mm512_set1_ps(c->factor);
    __m512i bias = c->bias ? load(mask, c->bias + across * BLOCK) : _mm512_setzero_si512();
    for (long i = 0; i < rows; i++, block += BLOCK, place += c->stride) {
        long number = down * BLOCK + i;
        if (c->row) place = c->row[number] * c->stride + across * c->across;
        __m512 low = _mm512_add_ps(_mm512_load_ps(block), low_half(bias));
        __m512 high = _mm512_add_ps(_mm512_load_ps(block + 16), high_half(bias));
        if (c->relu) { /* in this operand order NaN is kept */
            low = _mm512_max_ps(zero, low);
            high = _mm512_max_ps(zero, high);
        }
        if (c->scale) {
            long at = number * c->columns + across * BLOCK;
            __m512i scale = load(i < real ? mask : 0, c->scale + at);
            low = _mm512_mul_ps(low, low_half(scale));
            high = _mm512_mul_ps(high, high_half(scale));
        }
        if (c->kept) {
            __m512i kept = load(mask, c->kept + place);
            __mmask32 live = _mm512_test_epi16_mask(kept, _mm512_set1_epi16(0x7fff));
            if (c->row_dots) {
                float *dots = c->row_dots + number * 16;
                __m512 dot = _mm512_fmadd_ps(low, low_half(kept), _mm512_load_ps(dots));
                _mm512_store_ps(dots, _mm512_fmadd_ps(high, high_half(kept), dot));
            }
            low = _mm512_maskz_mul_ps((__mmask16)live, low, factor);
            high = _mm512_maskz_mul_ps((__mmask16)(live >> 16), high, factor);
        }
        if (c->row_weight) {
            __m512 weight = _mm512_set1_ps(i < real ? c->row_weight[number] : 0);
            low = _mm512_mul_ps(low, weight);
            high = _mm512_mul_ps(high, weight);
        }
        if (c->sums) {
            sum_low = _mm512_add_ps(sum_low, low);
            sum_high = _mm512_add_ps(sum_high, high);
        }
        __m512i both = narrow(low, high);
        if (c->fresh) {
            _mm512_stream_si512((__m512i *)(c->at + place), both);
        } else {
            _mm512_mask_storeu_epi16(c->at + place, written, both);
        }
    }
    if (c->sums) add_to(c->sums + across * BLOCK, mask, sum_low, sum_high);
}

INLINE long held_panels(const Operand *o) { return min_of(extent(o), max_of(1, HELD / (depth(o) * PAIR))); }

/* Panels of the passing operand per round: two if both fit in the first-level cache, which halves the reads of the held
 * operand from the second-level cache. */
INLINE long passing_panels(const Operand *o) { return depth(o) <= SHALLOW ? 2 : 1; }

/* Bytes of workspace that a product needs. */
INLINE long workspace_of_product(const Operand *held, const Operand *passing) {
    long kept = held->packed ? 0 : held_panels(held), passed = passing->packed ? 0 : passing_panels(passing);
    return SUMS + (kept + passed) * depth(held) * PAIR;
}

/* A B, with A held and B passing, or the other way round. `workspace` is aligned to 64 bytes. */
static inline void product(const Operand *held, const Operand *passing, const Result *c, char *workspace) {
    long deep = depth(held), panel = deep * PAIR, step = held_panels(held), group = passing_panels(passing);
    float *sums = (float *)workspace;
    char *of_held = workspace + SUMS, *of_passing = of_held + (held->packed ? 0 : step * panel);
    for (long from = 0; from < extent(held); from += step) {
        long count = min_of(step, extent(held) - from);
        const char *stay = held->packed ? held->packed + from * panel : of_held;
        if (!held->packed) pack(of_held, held, from, from + count);
        for (long x = 0; x < extent(passing); x += group) {
            long together = min_of(group, extent(passing) - x);
            const char *pass = passing->packed ? passing->packed + x * panel : of_passing;
            if (!passing->packed) pack(of_passing, passing, x, x + together);
            for (long j = 0; j < count; j++) {
                for (long i = 0; i < together; i++) {
                    long down = held->left ? from + j : x + i, across = held->left ? x + i : from + j;
                    const char *one = stay + j * panel, *other = pass + i * panel;
                    Ahead next = ahead(passing, x + group + i, j, count);
                    int whole = c->rows - down * BLOCK > BLOCK / 2;
                    float *block = c->blocks ? c->blocks + (down * blocks(c->columns) + across) * PATCH : sums;
                    multiply(held->left ? one : other, held->left ? other : one, deep, whole, block, c->begun, next);
                    if (c->unfinished) continue;
                    if (c->wide) {
                        finish_wide(c, down, across, block);
                    } else {
                        finish(c, down, across, block);
                    }
                }
            }
        }
    }
}

/* A B, with the operand of fewer panels held, so that the other is packed once more often. */
INLINE int left_stays(const Operand *left, const Operand *right) { return extent(left) < extent(right); }

INLINE long workspace_to_multiply(const Operand *left, const Operand *right) {
    return left_stays(left, right) ? workspace_of_product(left, right) : workspace_of_product(right, left);
}

INLINE void multiply_matrices(const Operand *left, const Operand *right, const Result *c, char *workspace) {
    if (left_stays(left, right)) {
        product(left, right, c, workspace);
    } else {
        product(right, left, c, workspace);
    }
}

/* Configures eight tiles of 16 rows of 64 bytes; undone by _tile_release. */
static inline void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t width[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.width[i] = 64;
        shape.rows[i] = 16;
    }
    __asm__ volatile("" ::"m"(shape)); /* all of it is read */
    _tile_loadconfig(&shape);
}

#endif
