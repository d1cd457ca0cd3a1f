/* A step of beam search: the best continuations from logits, and the beams that follow. Called by moe_train/kernels/decoder/best_continuations.py.
 *
 * torch's operators for the same pass over the [N, V] numbers six times. Here a row is read twice: for its largest numbers,
 * block by block, and for the sum of exponentials; then only blocks that can hold a candidate are searched.
 */
#include <math.h>
#include <string.h>

#include "bf16.h"

enum { SPAN = 64 }; /* numbers of a block */

typedef struct {
    long vocabulary, beam, count; /* count: candidates of a sentence */
    long pad, unk, eos;           /* pad is never chosen */
    float unk_penalty;
    long may_end; /* 0: eos is not chosen */
} Choice;

typedef struct {
    float *score;
    long *token, *beam;
    long found;
} Best;

/* Keeps the `count` best, best first; equal ones in the order in which they come. */
INLINE void keep(Best *best, long count, float score, long token, long beam) {
    if (!(score > -INFINITY) || (best->found == count && !(score > best->score[count - 1]))) return;
    long i = best->found < count ? best->found++ : count - 1;
    for (; i > 0 && best->score[i - 1] < score; i--) {
        best->score[i] = best->score[i - 1];
        best->token[i] = best->token[i - 1];
        best->beam[i] = best->beam[i - 1];
    }
    best->score[i] = score;
    best->token[i] = token;
    best->beam[i] = beam;
}

INLINE __m512 or_low(const float *x, long n) {
    __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), mask, x);
}

/* For sentences from .. upto - 1: score, token and beam [sentences, count] of the best continuations, best first; rest:
 * -infinity, pad, 0. `scores` [sentences, beam]: of the hypotheses so far. `must_end` [sentences] bytes or NULL. Returns
 * whether all numbers were finite or -infinity. `largest` [ceil(V / SPAN)] is scratch; logits are overwritten. */
long moe_best_continuations(float *logits, const float *scores, const char *must_end, const Choice *c, float *score, long *token,
                    long *beam, float *largest, long from, long upto) {
    long blocks = (c->vocabulary + SPAN - 1) / SPAN, sound = 1;
    for (long s = from; s < upto; s++) {
        Best best = {score + s * c->count, token + s * c->count, beam + s * c->count, 0};
        for (long j = 0; j < c->beam; j++) {
            float before = scores[s * c->beam + j], *row = logits + (s * c->beam + j) * c->vocabulary;
            if (before == -INFINITY) continue;
            __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (long v = 0; v < c->vocabulary; v += 16) top = _mm512_max_ps(or_low(row + v, c->vocabulary - v), top);
            __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top));
            for (long v = 0; v < c->vocabulary; v += 16)
                sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(or_low(row + v, c->vocabulary - v), shift)));
            float offset = before - _mm512_cvtss_f32(shift) - logf(_mm512_reduce_add_ps(sum));
            if (!(offset - offset == 0)) {
                sound = 0;
                continue;
            }
            if (must_end && must_end[s]) {
                if (c->may_end) keep(&best, c->count, row[c->eos] + offset, c->eos, j);
                continue;
            }
            row[c->pad] = -INFINITY;
            row[c->unk] -= c->unk_penalty;
            if (!c->may_end) row[c->eos] = -INFINITY;
            for (long b = 0; b < blocks; b++) {
                long v = b * SPAN, n = c->vocabulary - v;
                __m512 one = _mm512_max_ps(or_low(row + v, n), or_low(row + v + 16, n - 16));
                __m512 two = _mm512_max_ps(or_low(row + v + 32, n - 32), or_low(row + v + 48, n - 48));
                largest[b] = _mm512_reduce_max_ps(_mm512_max_ps(one, two));
            }
            for (;;) { /* the block with the largest number, until no block can have a candidate */
                long b = 0;
                for (long i = 1; i < blocks; i++)
                    if (largest[i] > largest[b]) b = i;
                float worst = best.found == c->count ? best.score[c->count - 1] : -INFINITY;
                if (!(largest[b] + offset > worst)) break;
                for (long v = b * SPAN; v < (b + 1) * SPAN && v < c->vocabulary; v++)
                    keep(&best, c->count, row[v] + offset, v, j);
                largest[b] = -INFINITY;
            }
        }
        for (long i = best.found; i < c->count; i++) {
            best.score[i] = -INFINITY;
            best.token[i] = c->pad;
            best.beam[i] = 0;
        }
    }
    return sound;
}

/* Hypotheses that have ended, and those that continue. */
typedef struct {
    long beam, eos, step, room, length; /* room: of `tokens`; length: of `ended_tokens` */
    float divisor;                           /* of the scores of hypotheses that end now */
    long *sentence, *limit;                  /* [sentences] row in `ended_*`, longest length */
    float *scores;                           /* [sentences, beam] */
    long *tokens;                            /* [sentences, beam, room] */
    long *ended_tokens, *ended_lengths;      /* [rows, beam, length], [rows, beam] */
    float *ended_scores;
    long *ended_count; /* [rows] */
} Tables;

/* Takes the candidates [sentences, 2 beam] of a step: hypotheses that end are kept, sentences that are done leave, and the
 * others move forward in all tables. rows [beam of the sentences that stay]: the former hypothesis that each continues;
 * next: its new symbol. `old` [beam, room] is scratch. Returns the number of sentences that stay. */
long moe_advance_beams(Tables *b, const float *score, const long *token, const long *beam, long sentences, long *rows,
                       long *next, long *old) {
    long k = b->beam, size = b->step * sizeof(long), kept = 0;
    for (long s = 0; s < sentences; s++, score += 2 * k, token += 2 * k, beam += 2 * k) {
        long row = b->sentence[s], *count = b->ended_count + row, *from = b->tokens + s * k * b->room;
        for (long i = 0; i < k && *count < k; i++) {
            if (token[i] != b->eos || !(score[i] > -INFINITY)) continue;
            long at = row * k + (*count)++;
            memcpy(b->ended_tokens + at * b->length, from + beam[i] * b->room, size);
            b->ended_lengths[at] = b->step;
            b->ended_scores[at] = score[i] / b->divisor;
        }
        if (*count >= k || b->limit[s] <= b->step) continue;
        for (long j = 0; j < k; j++) memcpy(old + j * b->room, from + j * b->room, size);
        long *to = b->tokens + kept * k * b->room, j = 0;
        for (int ends = 0; ends < 2; ends++) /* if too few continue, the others get -infinity */
            for (long i = 0; i < 2 * k && j < k; i++) {
                if ((token[i] == b->eos) != ends) continue;
                memcpy(to + j * b->room, old + beam[i] * b->room, size);
                to[j * b->room + b->step] = next[kept * k + j] = token[i];
                b->scores[kept * k + j] = ends ? -INFINITY : score[i];
                rows[kept * k + j++] = s * k + beam[i];
            }
        b->sentence[kept] = row;
        b->limit[kept++] = b->limit[s];
    }
    return kept;
}
