/* Adam's step with everything that an update does to a parameter, in one pass over memory. Called by
 * moe_train/kernels/cpu/adam.py. */
#include "bf16.h"

/* One parameter with what belongs to it; `end`: numbers of all parameters up to and with this one. */
typedef struct {
    float *parameter;
    const char *gradient; /* bfloat16 if `half`, else fp32 */
    float *first, *second; /* moments */
    bf16 *copy; /* gets the new parameter; NULL: there is none */
    int64_t end, half;
    float kept;  /* the parameter is multiplied by it before the step (decoupled weight decay) */
    float decay; /* times the parameter is added to the gradient (L2) */
    float step;  /* learning rate over the first moment's bias correction */
    float root;  /* square root of the second moment's bias correction */
} Part;

typedef struct {
    __m512 divisor, kept, decay, share1, beta2, share2, step, root, eps;
} Settings;

/* 16 numbers; the order of operations is that of torch's fused kernel. */
INLINE void step_numbers(__m512 *w, __m512 *m, __m512 *v, __m512 gradient, const Settings *s) {
    __m512 g = _mm512_fmadd_ps(*w, s->decay, _mm512_div_ps(gradient, s->divisor));
    *m = _mm512_fmadd_ps(s->share1, _mm512_sub_ps(g, *m), *m);
    *v = _mm512_fmadd_ps(_mm512_mul_ps(s->share2, g), g, _mm512_mul_ps(*v, s->beta2));
    __m512 denominator = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(*v), s->root), s->eps);
    *w = _mm512_sub_ps(_mm512_mul_ps(*w, s->kept), _mm512_div_ps(_mm512_mul_ps(s->step, *m), denominator));
}

/* Numbers from .. upto - 1 of one part. */
INLINE void step_part(const Part *p, const Settings *settings, long from, long upto, int half) {
    for (long i = from; i < upto; i += WIDTH) {
        __mmask32 mask = first(upto - i);
        Pair g = load_pair(p->gradient, i, mask, half, 0);
        Pair w = load_pair((const char *)p->parameter, i, mask, 0, 0);
        Pair m = load_pair((const char *)p->first, i, mask, 0, 0);
        Pair v = load_pair((const char *)p->second, i, mask, 0, 0);
        step_numbers(&w.low, &m.low, &v.low, g.low, settings);
        step_numbers(&w.high, &m.high, &v.high, g.high, settings);
        store_pair((char *)p->parameter, i, mask, 0, w);
        store_pair((char *)p->first, i, mask, 0, m);
        store_pair((char *)p->second, i, mask, 0, v);
        if (p->copy) {
            store_pair((char *)p->copy, i, mask, 1, w);
        }
    }
}

/* Numbers from .. upto - 1 of all parts, counted through. share1, share2: 1 - beta1, 1 - beta2, computed in fp64. */
void moe_adam(const Part *parts, float share1, float beta2, float share2, float eps, float divisor, long from, long upto) {
    long begin = 0;
    for (const Part *p = parts; begin < upto; begin = p->end, p++) {
        long start = from > begin ? from - begin : 0, end = (upto < p->end ? upto : p->end) - begin;
        Settings settings = {
            _mm512_set1_ps(divisor),   _mm512_set1_ps(p->kept),   _mm512_set1_ps(p->decay),
            _mm512_set1_ps(share1),    _mm512_set1_ps(beta2),     _mm512_set1_ps(share2),
            _mm512_set1_ps(p->step),   _mm512_set1_ps(p->root),   _mm512_set1_ps(eps),
        };
        if (p->half) {
            step_part(p, &settings, start, end, 1);
        } else {
            step_part(p, &settings, start, end, 0);
        }
    }
}

INLINE double squares(const char *gradient, long from, long upto, int half) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (long start = from; start < upto; start += 4096) { /* fp32 sums of few numbers, added up in fp64 */
        __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
        long end = start + 4096 < upto ? start + 4096 : upto;
        for (long i = start; i < end; i += WIDTH) {
            Pair g = load_pair(gradient, i, first(end - i), half, 0);
            sum0 = _mm512_fmadd_ps(g.low, g.low, sum0);
            sum1 = _mm512_fmadd_ps(g.high, g.high, sum1);
        }
        __m512 sum = _mm512_add_ps(sum0, sum1);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1))));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

/* sums[b]: squares of numbers b * block .. (b + 1) * block - 1 of all gradients, counted through. */
void moe_square_sums(const Part *parts, double *sums, long block, long total, long from, long upto) {
    const Part *p = parts;
    long begin = 0;
    for (long b = from; b < upto; b++) {
        long start = b * block, end = start + block < total ? start + block : total;
        double sum = 0;
        while (start < end) {
            while (p->end <= start) {
                begin = p->end;
                p++;
            }
            long stop = end < p->end ? end : p->end;
            sum += p->half ? squares(p->gradient, start - begin, stop - begin, 1)
                           : squares(p->gradient, start - begin, stop - begin, 0);
            start = stop;
        }
        sums[b] = sum;
    }
}
