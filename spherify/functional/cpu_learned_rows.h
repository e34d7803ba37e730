/* Responses of rows and their gradients where each filter has a k of its own (AVX-512): polynomials like those of
   cpu_row_lanes.h, whose terms are made for each filter when a call begins, and read once for four rows. Forward there is no
   asin or tanh, and near the equator no root; backward there is neither up to where they serve. As cpu_kernels.c says. */

/* Terms of polynomials, each a polynomial in u = 1 / 4k^2 itself, by powers of v, which goes from -1 at u = 0 to 1 at
   u = `most`; made by families.py. Of the cosine c: c near(c^2) is the response up to c^2 = `edge`, and beyond it is
   1 + h far(h) of h = sqrt((1 - |c|) / 2). Of the response over its slope at the equator, t: slope(t^2), t along(t^2), slope
   times cosine, and t angle(t^2), (1 - tanh^2) times the angle from the equator, up to t^2 = `limit`. */
enum { OF_U = 9, BEYOND_OF_U = 13, FORWARD_TERMS = 7, BEYOND_TERMS = 9, BACKWARD_TERMS = 7, ROWS_AT_ONCE = 4, ROWS_A_BLOCK = 16 };
typedef struct Family {
    float most, edge, near[FORWARD_TERMS][OF_U], far[BEYOND_TERMS][BEYOND_OF_U], limit[OF_U];
    float slope[BACKWARD_TERMS][OF_U], along[BACKWARD_TERMS][OF_U], angle[BACKWARD_TERMS][OF_U];
} Family;

/* Of each filter, (..., O): up to where, and the terms; backward the inverse slope at the equator first. */
typedef struct { float *edge, *near, *far, *back, *limit, *slope, *along, *angle; } OwnTerms;

INLINE void own_terms(const float *family, int count, const int of_u, const Elementwise *e, float *to) {
    const float *steep = e->steep;
    long filters = e->filters;
    float scale = 2.0f / e->family->most;
    for (int t = 0; t < count; t++) {
        const float *by_u = family + t * of_u;
#pragma omp simd
        for (long o = 0; o < filters; o++) {
            float v = steep[o] * steep[o] * scale - 1.0f, sum = by_u[of_u - 1];
            for (int j = of_u - 2; j >= 0; j--) sum = sum * v + by_u[j];
            to[t * filters + o] = sum;
        }
    }
}

/* Whether it is worth it to make terms for so many rows. */
INLINE int has_family(const Elementwise *e, long rows) {
    return e->operator == SIGMOID && e->fit == NULL && e->family != NULL && rows >= ROWS_A_BLOCK;
}

/* What was made must be freed. Without terms, `edge` or `limit` NULL, rows go one by one. */
static OwnTerms forward_terms(const Elementwise *e, long rows) {
    OwnTerms own = {NULL};
#ifdef __AVX512F__
    if (!has_family(e, rows)) return own;
    const Family *family = e->family;
    long filters = e->filters;
    if ((own.edge = malloc((1 + FORWARD_TERMS + BEYOND_TERMS) * filters * sizeof(float))) == NULL) return own;
    own.near = own.edge + filters;
    own.far = own.near + FORWARD_TERMS * filters;
    own_terms(family->near[0], FORWARD_TERMS, OF_U, e, own.near);
    own_terms(family->far[0], BEYOND_TERMS, BEYOND_OF_U, e, own.far);
    for (long o = 0; o < filters; o++) {
        own.edge[o] = e->steep[o] * e->steep[o] <= family->most ? family->edge : -1.0f;
        own.near[o] = e->steep[o] * e->rise[o];
    }
#endif
    return own;
}

static OwnTerms backward_terms(const Elementwise *e, long rows) {
    OwnTerms own = {NULL};
#ifdef __AVX512F__
    if (!has_family(e, rows)) return own;
    const Family *family = e->family;
    long filters = e->filters;
    if ((own.back = malloc((2 + 3 * BACKWARD_TERMS) * filters * sizeof(float))) == NULL) return own;
    own.limit = own.back + filters;
    own.slope = own.limit + filters;
    own.along = own.slope + BACKWARD_TERMS * filters;
    own.angle = own.along + BACKWARD_TERMS * filters;
    own_terms(family->limit, 1, OF_U, e, own.limit);
    own_terms(family->slope[0], BACKWARD_TERMS, OF_U, e, own.slope);
    own_terms(family->along[0], BACKWARD_TERMS, OF_U, e, own.along);
    own_terms(family->angle[0], BACKWARD_TERMS, OF_U, e, own.angle);
    for (long o = 0; o < filters; o++) {
        if (!(e->steep[o] * e->steep[o] <= family->most)) own.limit[o] = -1.0f;
        own.slope[o] = own.along[o] = e->steep[o] / e->end[o];
        own.back[o] = e->end[o] / e->steep[o];
    }
#endif
    return own;
}

#ifdef __AVX512F__
/* Asks for the rows after these in the order in which they lie, a part of them at every step: the processor by itself
   looks ahead along a row, not along four at once. */
INLINE void ask_ahead(const float *from, long filters, long o, const int rows, const int writes) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) __builtin_prefetch(from + rows * (filters + o) + 16 * r, writes);
}

/* Of sixteen filters at the r-th of some rows; depthwise, where each filter has its own, as far apart as products are. */
INLINE __m512 norms_at(const float *inverse, long r, long o, long wide, __mmask16 taken, const int is_depthwise) {
    return is_depthwise ? _mm512_maskz_loadu_ps(taken, inverse + r * wide + o) : lanes(inverse[r]);
}

INLINE __m512 cosine_at(const float *product, const float *inverse, __m512 length, long r, long o, long wide, __mmask16 taken,
                        const int is_depthwise) {
    __m512 c = _mm512_maskz_loadu_ps(taken, product + r * wide + o);
    return _mm512_mul_ps(_mm512_mul_ps(c, norms_at(inverse, r, o, wide, taken, is_depthwise)), length);
}

/* Sixteen filters of some rows at any cosines, where all of them have polynomials. */
INLINE void respond_anywhere(float *out, const float *product, const float *inverse, const Elementwise *e, const OwnTerms *own,
                             long o, long wide, const int rows, const int is_depthwise) {
    const float *near = own->near + o, *far = own->far + o;
    long filters = e->filters;
    __mmask16 taken = first_of(filters - o);
    __m512 length = _mm512_maskz_loadu_ps(taken, e->length + o), edge = _mm512_maskz_loadu_ps(taken, own->edge + o);
    __m512 c[ROWS_AT_ONCE], z[ROWS_AT_ONCE], h[ROWS_AT_ONCE], sum[ROWS_AT_ONCE], other[ROWS_AT_ONCE];
    __m512 term = _mm512_maskz_loadu_ps(taken, near + (FORWARD_TERMS - 1) * filters);
    __m512 beyond = _mm512_maskz_loadu_ps(taken, far + (BEYOND_TERMS - 1) * filters);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        c[r] = within_lanes(cosine_at(product, inverse, length, r, o, wide, taken, is_depthwise), e->guard);
        z[r] = _mm512_mul_ps(c[r], c[r]);
        h[r] = _mm512_sqrt_ps(_mm512_fnmadd_ps(_mm512_abs_ps(c[r]), lanes(0.5f), lanes(0.5f)));
        sum[r] = term;
        other[r] = beyond;
    }
#pragma GCC unroll 8
    for (int t = FORWARD_TERMS - 2; t >= 0; t--) {
        term = _mm512_maskz_loadu_ps(taken, near + t * filters);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = _mm512_fmadd_ps(sum[r], z[r], term);
    }
#pragma GCC unroll 8
    for (int t = BEYOND_TERMS - 2; t >= 0; t--) {
        beyond = _mm512_maskz_loadu_ps(taken, far + t * filters);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) other[r] = _mm512_fmadd_ps(other[r], h[r], beyond);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __mmask16 is_far = _mm512_cmp_ps_mask(z[r], edge, _CMP_GT_OQ); /* a NaN is near */
        other[r] = _mm512_fmadd_ps(other[r], h[r], lanes(1.0f));
        sum[r] = _mm512_mask_or_ps(_mm512_mul_ps(sum[r], c[r]), is_far, other[r], _mm512_and_ps(c[r], lanes(-0.0f)));
        _mm512_mask_storeu_ps(out + r * filters + o, taken, sum[r]);
    }
}

/* Sixteen filters of some rows where a cosine is far; apart, or the loops that call it would not be unrolled. */
static __attribute__((noinline)) void respond_far(float *out, const float *product, const float *inverse, const Elementwise *e,
                                                  const OwnTerms *own, long o, long wide, int rows, int is_depthwise) {
    long filters = e->filters;
    __mmask16 taken = first_of(filters - o);
    if (_mm512_mask_cmp_ps_mask(taken, _mm512_maskz_loadu_ps(taken, own->edge + o), _mm512_setzero_ps(), _CMP_GE_OQ) == taken) {
        if (rows == ROWS_AT_ONCE) respond_anywhere(out, product, inverse, e, own, o, wide, ROWS_AT_ONCE, is_depthwise);
        else respond_anywhere(out, product, inverse, e, own, o, wide, 1, is_depthwise);
        return;
    }
    __m512 length = _mm512_maskz_loadu_ps(taken, e->length + o), steep = _mm512_maskz_loadu_ps(taken, e->steep + o);
    __m512 rise = _mm512_maskz_loadu_ps(taken, e->rise + o);
    for (int r = 0; r < rows; r++) {
        __m512 c = cosine_at(product, inverse, length, r, o, wide, taken, is_depthwise);
        _mm512_mask_storeu_ps(out + r * filters + o, taken, sigmoids_of(c, e->guard, steep, rise));
    }
}

/* Some rows, whose products lie `wide` apart: of sixteen filters all by the polynomials, or none. A NaN is far. */
INLINE void respond_some_rows(const float *product, float *restrict out, const float *inverse, const Elementwise *e,
                              const OwnTerms *own, long wide, const int rows, const int is_depthwise) {
    const float *lengths = e->length, *edges = own->edge, *near = own->near;
    long filters = e->filters;
    for (long o = 0; o < filters; o += 16) {
        __mmask16 taken = first_of(filters - o), far = 0;
        if (!is_depthwise) { /* their products are in the cache, and who convolves asks for the rest */
            ask_ahead(product, filters, o, rows, 0);
            ask_ahead(out, filters, o, rows, 1);
        }
        __m512 c[ROWS_AT_ONCE], z[ROWS_AT_ONCE], sum[ROWS_AT_ONCE];
        __m512 length = _mm512_maskz_loadu_ps(taken, lengths + o), edge = _mm512_maskz_loadu_ps(taken, edges + o);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            c[r] = cosine_at(product, inverse, length, r, o, wide, taken, is_depthwise);
            z[r] = _mm512_mul_ps(c[r], c[r]);
            far |= _mm512_cmp_ps_mask(z[r], edge, _CMP_NLE_UQ);
        }
        if (__builtin_expect(far != 0, 0)) {
            respond_far(out, product, inverse, e, own, o, wide, rows, is_depthwise);
            continue;
        }
        __m512 term = _mm512_maskz_loadu_ps(taken, near + (FORWARD_TERMS - 1) * filters + o);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = term;
#pragma GCC unroll 8
        for (int t = FORWARD_TERMS - 2; t >= 0; t--) {
            term = _mm512_maskz_loadu_ps(taken, near + t * filters + o);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[r] = _mm512_fmadd_ps(sum[r], z[r], term);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) _mm512_mask_storeu_ps(out + r * filters + o, taken, _mm512_mul_ps(sum[r], c[r]));
    }
}

/* Two sums for k, of sixteen filters. */
INLINE void add_to_part(float *part, long filters, long o, __mmask16 taken, __m512 with_answer, __m512 with_angle) {
    float *with = part + o, *own = part + filters + o;
    _mm512_mask_storeu_ps(with, taken, _mm512_add_ps(with_answer, _mm512_maskz_loadu_ps(taken, with)));
    _mm512_mask_storeu_ps(own, taken, _mm512_add_ps(with_angle, _mm512_maskz_loadu_ps(taken, own)));
}

/* Sixteen filters of some rows at any responses; adds to what the near ones add to. */
INLINE void backward_anywhere(const float *gradient, const float *saved, const float *inverse, float *product, float *along,
                              float *part, const Elementwise *e, const Near *n, long o, long wide, const int rows,
                              const int is_depthwise) {
    long filters = e->filters;
    __mmask16 taken = first_of(filters - o);
    __m512 length = _mm512_maskz_loadu_ps(taken, e->length + o), end = _mm512_maskz_loadu_ps(taken, e->end + o);
    __m512 flat = _mm512_maskz_loadu_ps(taken, n->flat + o), rate = _mm512_maskz_loadu_ps(taken, n->rate + o);
    __m512 with_answer = _mm512_setzero_ps(), with_angle = with_answer;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m512 g = _mm512_maskz_loadu_ps(taken, gradient + r * filters + o);
        __m512 answer = _mm512_maskz_loadu_ps(taken, saved + r * filters + o);
        Slopes found = slopes_learned(answer, g, e->guard, e->step, end, flat, rate);
        __m512 norm = norms_at(inverse, r, o, wide, taken, is_depthwise), sum = _mm512_mul_ps(found.slope, found.cosine);
        if (is_depthwise) _mm512_mask_storeu_ps(along + r * wide + o, taken, _mm512_mul_ps(sum, _mm512_mul_ps(norm, norm)));
        else along[r] += _mm512_reduce_add_ps(sum);
        found.slope = _mm512_mul_ps(found.slope, _mm512_mul_ps(length, norm));
        _mm512_mask_storeu_ps(product + r * wide + o, taken, found.slope);
        with_answer = _mm512_fmadd_ps(g, answer, with_answer);
        with_angle = _mm512_fmadd_ps(found.rise, found.angle, with_angle);
    }
    if (part) add_to_part(part, filters, o, taken, with_answer, with_angle);
}

/* Where a response is far; apart as respond_far is. */
static __attribute__((noinline)) void backward_far(const float *gradient, const float *saved, const float *inverse,
                                                   float *product, float *along, float *part, const Elementwise *e,
                                                   const Near *n, long o, long wide, int rows, int is_depthwise) {
    if (rows == ROWS_AT_ONCE)
        backward_anywhere(gradient, saved, inverse, product, along, part, e, n, o, wide, ROWS_AT_ONCE, is_depthwise);
    else backward_anywhere(gradient, saved, inverse, product, along, part, e, n, o, wide, 1, is_depthwise);
}

INLINE void backward_some_rows(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                               float *along, float *restrict part, const Elementwise *e, const Near *n,
                               const OwnTerms *own, long wide, const int rows, const int for_k, const int is_depthwise) {
    const float *lengths = e->length, *steeps = e->steep, *backs = own->back, *limits = own->limit;
    const float *slopes = own->slope, *alongs = own->along, *angles = own->angle;
    long filters = e->filters;
    __m512 sums[ROWS_AT_ONCE], zero = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int r = 0; r < rows && !is_depthwise; r++) sums[r] = zero, along[r] = 0.0f;
    for (long o = 0; o < filters; o += 16) {
        __mmask16 taken = first_of(filters - o), far = 0;
        if (!is_depthwise) {
            ask_ahead(saved, filters, o, rows, 0);
            ask_ahead(gradient, filters, o, rows, 0);
            ask_ahead(product, filters, o, rows, 1);
        }
        __m512 answers[ROWS_AT_ONCE], t[ROWS_AT_ONCE], z[ROWS_AT_ONCE];
        __m512 back = _mm512_maskz_loadu_ps(taken, backs + o), limit = _mm512_maskz_loadu_ps(taken, limits + o);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            answers[r] = _mm512_maskz_loadu_ps(taken, saved + r * filters + o);
            t[r] = _mm512_mul_ps(answers[r], back);
            z[r] = _mm512_mul_ps(t[r], t[r]);
            far |= _mm512_cmp_ps_mask(z[r], limit, _CMP_NLE_UQ);
        }
        if (__builtin_expect(far != 0, 0)) {
            backward_far(gradient, saved, inverse, product, along, for_k ? part : NULL, e, n, o, wide, rows, is_depthwise);
            continue;
        }
        __m512 slope[ROWS_AT_ONCE], beside[ROWS_AT_ONCE], angle[ROWS_AT_ONCE], g[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            slope[r] = _mm512_maskz_loadu_ps(taken, slopes + (BACKWARD_TERMS - 1) * filters + o);
            beside[r] = _mm512_maskz_loadu_ps(taken, alongs + (BACKWARD_TERMS - 1) * filters + o);
            if (for_k) angle[r] = _mm512_maskz_loadu_ps(taken, angles + (BACKWARD_TERMS - 1) * filters + o);
        }
#pragma GCC unroll 8
        for (int i = BACKWARD_TERMS - 2; i >= 0; i--) {
            __m512 a = _mm512_maskz_loadu_ps(taken, slopes + i * filters + o);
            __m512 b = _mm512_maskz_loadu_ps(taken, alongs + i * filters + o);
            __m512 c = for_k ? _mm512_maskz_loadu_ps(taken, angles + i * filters + o) : zero;
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                slope[r] = _mm512_fmadd_ps(slope[r], z[r], a);
                beside[r] = _mm512_fmadd_ps(beside[r], z[r], b);
                if (for_k) angle[r] = _mm512_fmadd_ps(angle[r], z[r], c);
            }
        }
        __m512 length = _mm512_maskz_loadu_ps(taken, lengths + o), with_answer = zero, with_angle = zero;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            g[r] = _mm512_maskz_loadu_ps(taken, gradient + r * filters + o);
            __m512 norm = norms_at(inverse, r, o, wide, taken, is_depthwise), factor = _mm512_mul_ps(length, norm);
            _mm512_mask_storeu_ps(product + r * wide + o, taken, _mm512_mul_ps(_mm512_mul_ps(g[r], slope[r]), factor));
            t[r] = _mm512_mul_ps(g[r], t[r]);
            if (!is_depthwise) sums[r] = _mm512_fmadd_ps(t[r], beside[r], sums[r]);
            else _mm512_mask_storeu_ps(along + r * wide + o, taken,
                                       _mm512_mul_ps(_mm512_mul_ps(t[r], beside[r]), _mm512_mul_ps(norm, norm)));
            if (!for_k) continue;
            with_angle = _mm512_fmadd_ps(t[r], angle[r], with_angle);
            with_answer = _mm512_fmadd_ps(g[r], answers[r], with_answer);
        }
        if (!for_k) continue;
        with_angle = _mm512_mul_ps(with_angle, _mm512_maskz_loadu_ps(taken, steeps + o)); /* of atanh now */
        add_to_part(part, filters, o, taken, with_answer, with_angle);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows && !is_depthwise; r++) along[r] += _mm512_reduce_add_ps(sums[r]);
}
#endif

/* `rows` rows: of `product`, and of norms in depthwise layers, `wide` apart; else norms follow one another. */
INLINE void respond_to_rows(const float *product, float *restrict out, const float *inverse, const Elementwise *e,
                            const OwnTerms *own, long wide, long rows, const int is_depthwise) {
    long row = 0, filters = e->filters, apart = is_depthwise ? wide : 1;
#ifdef __AVX512F__
#define SOME(ROWS)                                                                                                \
    respond_some_rows(product + row * wide, out + row * filters, inverse + row * apart, e, own, wide, ROWS, is_depthwise)
    for (; own->edge && row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE) SOME(ROWS_AT_ONCE);
    for (; own->edge && row < rows; row++) SOME(1);
#undef SOME
#endif
#define ROW(OPERATOR) respond_to_row(from, out + row * filters, norms, e, OPERATOR, is_depthwise)
    for (; row < rows; row++) {
        const float *from = product + row * wide, *norms = inverse + row * apart;
        if (e->operator == COSINE) ROW(COSINE);
        else if (e->operator == LINEAR) ROW(LINEAR);
        else ROW(SIGMOID);
    }
#undef ROW
}

/* Likewise the gradients by the product; `part` as for respond_backward_row. `along` takes the sum along each row, or, in
   depthwise layers, what that one writes over the norms: there it is the norms. */
INLINE void respond_backward_rows(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                                  float *along, float *part, const Elementwise *e, const Near *n, const OwnTerms *own,
                                  long wide, long rows, const int is_depthwise) {
    long row = 0, filters = e->filters, apart = is_depthwise ? wide : 1;
#ifdef __AVX512F__
#define SOME(ROWS, FOR_K)                                                                                             \
    backward_some_rows(gradient + row * filters, saved + row * filters, inverse + row * apart, product + row * wide,  \
                       along + row * apart, part, e, n, own, wide, ROWS, FOR_K, is_depthwise)
    for (; own->limit && row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE) {
        if (part) SOME(ROWS_AT_ONCE, 1);
        else SOME(ROWS_AT_ONCE, 0);
    }
    for (; own->limit && row < rows; row++) {
        if (part) SOME(1, 1);
        else SOME(1, 0);
    }
#undef SOME
#endif
    for (; row < rows; row++) {
        float norm = inverse[row * apart], *norms = is_depthwise ? along + row * wide : &norm;
        float sum = respond_backward_row_of(gradient + row * filters, saved + row * filters, norms, product + row * wide,
                                            part, e, n, is_depthwise);
        if (!is_depthwise) along[row] = sum;
    }
}
