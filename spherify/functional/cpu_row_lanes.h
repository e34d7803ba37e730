/* Responses of rows and their gradients sixteen filters at a time (AVX-512), in one pass: where k is a number by polynomials
   fitted to it. Four vectors near the equator take a shorter way, since a branch for each would often be mispredicted.
   As cpu_kernels.c says. */

/* An operator with a k that is a number, fitted by fits.py. Of the cosine c: c near(c^2) is the response up to c^2 = `edge`,
   far(sqrt((1 - |c|) / 2)) beyond. Of the response r: slope(r^2), and r along(r^2), slope times cosine, up to r^2 = `limit`;
   r cosine(r^2) up to `reach`. */
enum { GROUP = 4, NEAR_FIT = 7, FAR_FIT = 9, SLOPE_FIT = 7, COSINE_FIT = 11 };
typedef struct Fit {
    float edge, limit, reach, near[NEAR_FIT], far[FAR_FIT], slope[SLOPE_FIT], along[SLOPE_FIT], cosine[COSINE_FIT];
} Fit;

#ifdef __AVX512F__
INLINE __m512 series(__m512 x, const float *terms, const int count) {
    __m512 sum = lanes(terms[count - 1]);
    for (int t = count - 2; t >= 0; t--) sum = plus(sum, x, terms[t]);
    return sum;
}

/* Any cosine's response. */
INLINE __m512 response_fitted(__m512 cosine, const Fit *fit, float guard) {
    __m512 c = within_lanes(cosine, guard), z = _mm512_mul_ps(c, c), near = _mm512_mul_ps(c, series(z, fit->near, NEAR_FIT));
    __mmask16 is_far = _mm512_cmp_ps_mask(z, lanes(fit->edge), _CMP_GT_OQ);
    __m512 half = _mm512_fnmadd_ps(_mm512_abs_ps(c), lanes(0.5f), lanes(0.5f));
    __m512 far = series(_mm512_sqrt_ps(half), fit->far, FAR_FIT);
    return _mm512_mask_or_ps(near, is_far, far, _mm512_and_ps(c, lanes(-0.0f)));
}

INLINE __m512 inverse_at(const float *inverse, long o, __m512 shared, __mmask16 taken, const int is_depthwise) {
    return is_depthwise ? _mm512_maskz_loadu_ps(taken, inverse + o) : shared;
}

INLINE __m512 cosines_at(const float *product, const float *inverse, const float *length, long o, __m512 shared,
                         __mmask16 taken, const int is_depthwise) {
    __m512 norm = inverse_at(inverse, o, shared, taken, is_depthwise);
    __m512 c = _mm512_mul_ps(_mm512_maskz_loadu_ps(taken, product + o), norm);
    return _mm512_mul_ps(c, _mm512_maskz_loadu_ps(taken, length + o));
}

/* SOME(vectors) for a whole row, from its `first` filter on. */
#define EACH_GROUP                                                                      \
    for (; filters - first > 16 * (GROUP - 1); first += 16 * GROUP) SOME(GROUP);        \
    if (filters - first > 32) SOME(3);                                                  \
    else if (filters - first > 16) SOME(2);                                             \
    else if (filters > first) SOME(1);

/* Some vectors of a row: all by the short polynomial, or none. A NaN is far. */
INLINE void respond_some(const float *product, float *restrict out, const float *inverse, const float *length, long first,
                         long filters, float guard, const Fit *fit, const int vectors, const int is_depthwise) {
    __m512 c[GROUP], shared = lanes(inverse[0]);
    __mmask16 far = 0, taken = first_of(filters - first - 16 * (vectors - 1));
    for (int v = 0; v < vectors; v++) {
        c[v] = cosines_at(product, inverse, length, first + 16 * v, shared, v < vectors - 1 ? 0xffff : taken, is_depthwise);
        far |= _mm512_cmp_ps_mask(_mm512_mul_ps(c[v], c[v]), lanes(fit->edge), _CMP_NLE_UQ);
    }
    if (far) {
        for (int v = 0; v < vectors; v++)
            _mm512_mask_storeu_ps(out + first + 16 * v, v < vectors - 1 ? 0xffff : taken, response_fitted(c[v], fit, guard));
    } else {
        for (int v = 0; v < vectors; v++) {
            __m512 r = _mm512_mul_ps(c[v], series(_mm512_mul_ps(c[v], c[v]), fit->near, NEAR_FIT));
            _mm512_mask_storeu_ps(out + first + 16 * v, v < vectors - 1 ? 0xffff : taken, r);
        }
    }
}

INLINE void respond_fitted(const float *product, float *restrict out, const float *inverse, const float *length,
                           long filters, float guard, const Fit *fit, const int is_depthwise) {
    long first = 0;
#define SOME(VECTORS) respond_some(product, out, inverse, length, first, filters, guard, fit, VECTORS, is_depthwise)
    EACH_GROUP
#undef SOME
}

/* For |x| <= EDGE; the greatest relative error of the polynomial is 8.0e-8. */
static const float EDGE = 0.65f;
INLINE __m512 asin_near_lanes(__m512 x) {
    __m512 z = _mm512_mul_ps(x, x), p = plus(lanes(5.8364793658e-2f), z, -1.8968229415e-3f);
    p = plus(plus(p, z, 3.6270767450e-2f), z, 4.4027395546e-2f);
    p = plus(plus(p, z, 7.5022876263e-2f), z, 1.6666653752e-1f);
    return _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
}

/* For |x| <= WIDE_TANH, likewise 8.7e-8. */
static const float WIDE_TANH = 1.1f;
INLINE __m512 tanh_near_lanes(__m512 x) {
    __m512 z = _mm512_mul_ps(x, x), p = plus(lanes(-3.3601038740e-4f), z, 2.2520767525e-3f);
    p = plus(plus(plus(p, z, -7.9243145883e-3f), z, 2.1506000310e-2f), z, -5.3898565471e-2f);
    p = plus(plus(p, z, 1.3332819939e-1f), z, -3.3333328366e-1f);
    return _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
}

/* As respond_some, with a k of each filter's own. */
INLINE void respond_some_learned(const float *product, float *restrict out, const float *inverse, const float *length,
                                 const float *steep, const float *rise, long first, long filters, float guard,
                                 const int vectors, const int is_depthwise) {
    __m512 x[GROUP], shared = lanes(inverse[0]);
    __mmask16 far = 0, sharp = 0, last = first_of(filters - first - 16 * (vectors - 1));
    for (int v = 0; v < vectors; v++) {
        x[v] = cosines_at(product, inverse, length, first + 16 * v, shared, v < vectors - 1 ? 0xffff : last, is_depthwise);
        far |= _mm512_cmp_ps_mask(_mm512_mul_ps(x[v], x[v]), lanes(EDGE * EDGE), _CMP_NLE_UQ);
    }
    for (int v = 0; v < vectors && far; v++) x[v] = asin_lanes(within_lanes(x[v], guard));
    for (int v = 0; v < vectors && !far; v++) x[v] = asin_near_lanes(x[v]);
    for (int v = 0; v < vectors; v++) {
        x[v] = _mm512_mul_ps(x[v], _mm512_maskz_loadu_ps(v < vectors - 1 ? 0xffff : last, steep + first + 16 * v));
        sharp |= _mm512_cmp_ps_mask(_mm512_mul_ps(x[v], x[v]), lanes(WIDE_TANH * WIDE_TANH), _CMP_GT_OQ);
    }
    for (int v = 0; v < vectors && sharp; v++) x[v] = tanh_lanes(x[v]);
    for (int v = 0; v < vectors && !sharp; v++) x[v] = tanh_near_lanes(x[v]);
    for (int v = 0; v < vectors; v++) {
        __mmask16 taken = v < vectors - 1 ? 0xffff : last;
        __m512 r = _mm512_mul_ps(x[v], _mm512_maskz_loadu_ps(taken, rise + first + 16 * v));
        _mm512_mask_storeu_ps(out + first + 16 * v, taken, r);
    }
}

INLINE void respond_learned(const float *product, float *restrict out, const float *inverse, const Elementwise *e,
                            const int is_depthwise) {
    const float *length = e->length, *steep = e->steep, *rise = e->rise;
    float guard = e->guard;
    long first = 0, filters = e->filters;
#define SOME(VECTORS) \
    respond_some_learned(product, out, inverse, length, steep, rise, first, filters, guard, VECTORS, is_depthwise)
    EACH_GROUP
#undef SOME
}

/* Writes a vector of gradients by the product, and what belongs to the patches: cosine times slope. */
#define LEAVE(SLOPE, ALONG)                                                                                          \
    do {                                                                                                             \
        __m512 norm = inverse_at(inverse, o, shared, taken, is_depthwise), along = (ALONG);                          \
        __m512 factor = _mm512_mul_ps(_mm512_maskz_loadu_ps(taken, length + o), norm);                               \
        _mm512_mask_storeu_ps(product + o, taken, _mm512_mul_ps(SLOPE, factor));                                     \
        if (is_depthwise) _mm512_mask_storeu_ps(inverse + o, taken, _mm512_mul_ps(along, _mm512_mul_ps(norm, norm))); \
        else sum = _mm512_add_ps(sum, along);                                                                        \
    } while (0)

/* The operator's constants as slopes_at wants them. */
typedef struct { float guard, step, end, flat, rate; } Constants;

INLINE Slopes slopes_fitted(__m512 answer, __m512 gradient, const Fit *fit, const Constants *k, const int operator) {
    __m512 z = _mm512_mul_ps(answer, answer);
    if (_mm512_cmp_ps_mask(z, lanes(fit->reach), _CMP_NLE_UQ))
        return slopes_at(answer, gradient, operator, k->guard, k->step, lanes(k->end), lanes(k->flat), lanes(k->rate));
    Slopes found = {.cosine = _mm512_mul_ps(answer, series(z, fit->cosine, COSINE_FIT))};
    found.slope = inverse_root_of(_mm512_fnmadd_ps(found.cosine, found.cosine, lanes(1.0f)));
    found.slope = _mm512_mul_ps(_mm512_mul_ps(gradient, lanes(k->rate)), found.slope);
    if (operator == LINEAR) return found;
    found.slope = _mm512_mul_ps(found.slope, _mm512_fnmadd_ps(z, lanes(k->end * k->end), lanes(1.0f)));
    return found;
}

/* Some vectors of a row. Returns the sum. */
INLINE __m512 backward_some(const float *gradient, const float *saved, float *restrict inverse, float *restrict product,
                            const float *length, long first, long filters, const Fit *fit, const Constants *k, __m512 sum,
                            const int vectors, const int operator, const int is_depthwise) {
    const __m512 shared = lanes(inverse[0]);
    __mmask16 far = 0, last = first_of(filters - first - 16 * (vectors - 1));
    __m512 answers[GROUP];
    for (int v = 0; v < vectors; v++) {
        answers[v] = _mm512_maskz_loadu_ps(v < vectors - 1 ? 0xffff : last, saved + first + 16 * v);
        far |= _mm512_cmp_ps_mask(_mm512_mul_ps(answers[v], answers[v]), lanes(fit->limit), _CMP_NLE_UQ);
    }
    for (int v = 0; v < vectors && far; v++) {
        long o = first + 16 * v;
        __mmask16 taken = v < vectors - 1 ? 0xffff : last;
        Slopes found = slopes_fitted(answers[v], _mm512_maskz_loadu_ps(taken, gradient + o), fit, k, operator);
        LEAVE(found.slope, _mm512_mul_ps(found.slope, found.cosine));
    }
    for (int v = 0; v < vectors && !far; v++) {
        long o = first + 16 * v;
        __mmask16 taken = v < vectors - 1 ? 0xffff : last;
        __m512 g = _mm512_maskz_loadu_ps(taken, gradient + o), z = _mm512_mul_ps(answers[v], answers[v]);
        __m512 a = _mm512_mul_ps(_mm512_mul_ps(g, answers[v]), series(z, fit->along, SLOPE_FIT));
        LEAVE(_mm512_mul_ps(g, series(z, fit->slope, SLOPE_FIT)), a);
    }
    return sum;
}

INLINE float backward_fitted(const float *gradient, const float *saved, float *restrict inverse, float *restrict product,
                             const Elementwise *e, const int operator, const int is_depthwise) {
    const int is_linear = operator == LINEAR;
    const Constants k = {e->guard, e->step, is_linear ? 1.0f : e->end[0], is_linear ? 1.0f : 1.0f / e->steep[0],
                         is_linear ? TWO_OVER_PI : e->steep[0] / e->end[0]};
    const float *length = e->length;
    const Fit *fit = e->fit;
    __m512 sum = _mm512_setzero_ps();
    long first = 0, filters = e->filters;
#define SOME(VECTORS)                                                                                               \
    sum = backward_some(gradient, saved, inverse, product, length, first, filters, fit, &k, sum, VECTORS, operator, \
                        is_depthwise)
    EACH_GROUP
#undef SOME
    return _mm512_reduce_add_ps(sum);
}

/* As slopes_at for a k of each filter's own; by one polynomial of atanh up to 0.75, with a relative error of 3.7e-8. */
INLINE Slopes slopes_learned(__m512 answer, __m512 gradient, float guard, float step, __m512 end, __m512 flat, __m512 rate) {
    __m512 t = _mm512_mul_ps(answer, end), z = _mm512_mul_ps(t, t);
    if (_mm512_cmp_ps_mask(z, lanes(0.5625f), _CMP_NLE_UQ))
        return slopes_at(answer, gradient, SIGMOID, guard, step, end, flat, rate);
    __m512 p = plus(lanes(1.0392630100f), z, -1.5049638748f);
    p = plus(plus(plus(p, z, 1.1536394358f), z, -3.2926642895e-1f), z, 1.7635117471e-1f);
    p = plus(plus(p, z, 1.0128106177e-1f), z, 1.4341303706e-1f);
    p = plus(plus(p, z, 1.9998808205e-1f), z, 3.3333337307e-1f);
    Slopes found = {.angle = _mm512_fmadd_ps(_mm512_mul_ps(t, z), p, t), .rise = _mm512_fnmadd_ps(z, gradient, gradient)};
    found.cosine = sin_lanes(_mm512_mul_ps(found.angle, flat));
    __m512 left = _mm512_max_ps(lanes(step), _mm512_fnmadd_ps(found.cosine, found.cosine, lanes(1.0f)));
    found.slope = _mm512_mul_ps(_mm512_mul_ps(found.rise, rate), inverse_root_of(left));
    return found;
}

INLINE float backward_learned(const float *gradient, const float *saved, float *restrict inverse, float *restrict product,
                              float *restrict part, const Elementwise *e, const Near *n, const int for_k,
                              const int is_depthwise) {
    const float *length = e->length, *ends = e->end, *flats = n->flat, *rates = n->rate;
    const __m512 shared = lanes(inverse[0]);
    float guard = e->guard, step = e->step;
    __m512 sum = _mm512_setzero_ps();
    long filters = e->filters;
    for (long o = 0; o < filters; o += 16) {
        __mmask16 taken = first_of(filters - o);
        __m512 g = _mm512_maskz_loadu_ps(taken, gradient + o), r = _mm512_maskz_loadu_ps(taken, saved + o);
        __m512 end = _mm512_maskz_loadu_ps(taken, ends + o), flat = _mm512_maskz_loadu_ps(taken, flats + o);
        Slopes found = slopes_learned(r, g, guard, step, end, flat, _mm512_maskz_loadu_ps(taken, rates + o));
        LEAVE(found.slope, _mm512_mul_ps(found.slope, found.cosine));
        if (!for_k) continue;
        float *with = part + o, *own = part + filters + o;
        _mm512_mask_storeu_ps(with, taken, _mm512_fmadd_ps(g, r, _mm512_maskz_loadu_ps(taken, with)));
        _mm512_mask_storeu_ps(own, taken, _mm512_fmadd_ps(found.rise, found.angle, _mm512_maskz_loadu_ps(taken, own)));
    }
    return _mm512_reduce_add_ps(sum);
}
#undef LEAVE
#endif

INLINE int respond_by_lanes(const float *product, float *restrict out, const float *inverse, const Elementwise *e,
                            const int operator, const int is_depthwise) {
#ifdef __AVX512F__
    if (operator != COSINE && e->fit != NULL)
        respond_fitted(product, out, inverse, e->length, e->filters, e->guard, e->fit, is_depthwise);
    else if (operator == SIGMOID) respond_learned(product, out, inverse, e, is_depthwise);
    else return 0;
    return 1;
#else
    return 0;
#endif
}

INLINE int backward_by_lanes(const float *gradient, const float *saved, float *inverse, float *product, float *part,
                             const Elementwise *e, const Near *n, const int is_depthwise, float *along) {
#ifdef __AVX512F__
    if (e->operator == LINEAR && e->fit != NULL)
        *along = backward_fitted(gradient, saved, inverse, product, e, LINEAR, is_depthwise);
    else if (e->operator == SIGMOID && e->fit != NULL && part == NULL)
        *along = backward_fitted(gradient, saved, inverse, product, e, SIGMOID, is_depthwise);
    else if (e->operator == SIGMOID && part == NULL)
        *along = backward_learned(gradient, saved, inverse, product, NULL, e, n, 0, is_depthwise);
    else if (e->operator == SIGMOID)
        *along = backward_learned(gradient, saved, inverse, product, part, e, n, 1, is_depthwise);
    else return 0;
    return 1;
#else
    return 0;
#endif
}
