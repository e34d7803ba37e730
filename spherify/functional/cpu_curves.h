/* Responses of folded layers: asin and what follows it as one polynomial near 0 and one far from it, fitted for the
   layer's k by curves.py. As cpu_kernels.c says. */

enum { NEAR_TERMS = 7, FAR_TERMS = 9, ROWS_OF_CURVES = 4 };
static const float CURVE_EDGE = 0.7f;

/* One filter's, or each filter's: `apart` numbers from one term to the next. */
typedef struct { const float *near, *far; long apart; } Curve;

INLINE Curve curve_of(const Elementwise *e, long o) {
    long own = e->curves > 1 ? o : 0;
    return (Curve){e->near + own, e->far + own, e->curves};
}

INLINE float polynomial(float x, const float *terms, long apart, long o, const int count) {
    float sum = terms[(count - 1) * apart + o];
    for (int t = count - 2; t >= 0; t--) sum = sum * x + terms[t * apart + o];
    return sum;
}

/* For |c| <= CURVE_EDGE, and NaN. */
INLINE float near_on(Curve curve, long o, float c) { return c * polynomial(c * c, curve.near, curve.apart, o, NEAR_TERMS); }

/* For every cosine; beyond the edge by the root of (1 - |c|) / 2, the sine of half the angle. */
INLINE float far_on(Curve curve, long o, float c) {
    float size = least(1.0f, fabsf(c));
    float near = size * polynomial(size * size, curve.near, curve.apart, o, NEAR_TERMS);
    float far = polynomial(sqrtf(0.5f - 0.5f * size), curve.far, curve.apart, o, FAR_TERMS);
    return copysignf(size > CURVE_EDGE ? far : near, c);
}

/* Rows and their norms, and the numbers from one to the next. */
typedef struct {
    const float *from, *inverse;
    float *out;
    long from_step, norm_step, step;
} Across;

#ifdef __AVX512F__
enum { AT_ONCE = 4 }; /* vectors; a branch for each would often be mispredicted */

/* What serves sixteen numbers: the values of one filter, or of sixteen. */
typedef struct {
    __m512 near[NEAR_TERMS], gain, bias;
    const float *far;
    long apart;
    float low, high;
} Curves;

INLINE __m512 term_at(const float *terms, __mmask16 taken, const int own) {
    return own ? _mm512_maskz_loadu_ps(taken, terms) : lanes(*terms);
}

INLINE Curves curves_at(Curve curve, long o, __mmask16 taken, float low, float high, const int own) {
    Curves found = {.far = curve.far + o, .apart = curve.apart, .low = low, .high = high};
    for (int t = 0; t < NEAR_TERMS; t++) found.near[t] = term_at(curve.near + t * curve.apart + o, taken, own);
    return found;
}

INLINE __m512 near_lanes(__m512 c, const __m512 *near) {
    __m512 z = _mm512_mul_ps(c, c), sum = near[NEAR_TERMS - 1];
    for (int t = NEAR_TERMS - 2; t >= 0; t--) sum = _mm512_fmadd_ps(sum, z, near[t]);
    return _mm512_mul_ps(c, sum);
}

/* `near`, and what is beyond the edge in its place. */
INLINE __m512 far_lanes(__m512 c, __m512 near, const float *far, long apart, __mmask16 taken, const int own) {
    __m512 size = _mm512_min_ps(lanes(1.0f), _mm512_abs_ps(c));
    __mmask16 is_far = _mm512_cmp_ps_mask(size, lanes(CURVE_EDGE), _CMP_GT_OQ);
    __m512 root = _mm512_sqrt_ps(_mm512_fnmadd_ps(size, lanes(0.5f), lanes(0.5f)));
    __m512 sum = term_at(far + (FAR_TERMS - 1) * apart, taken, own);
    for (int t = FAR_TERMS - 2; t >= 0; t--) sum = _mm512_fmadd_ps(sum, root, term_at(far + t * apart, taken, own));
    return _mm512_mask_or_ps(near, is_far, sum, _mm512_and_ps(c, lanes(-0.0f)));
}

INLINE __mmask16 any_far(const __m512 *c, const int vectors) {
    __mmask16 far = 0;
    for (int v = 0; v < vectors; v++) far |= _mm512_cmp_ps_mask(_mm512_abs_ps(c[v]), lanes(CURVE_EDGE), _CMP_GT_OQ);
    return far;
}

/* The response to cosines, in their place. */
INLINE void curve_cosines(__m512 *c, __mmask16 taken, const Curves *curves, const int vectors, const int own) {
    __m512 found[AT_ONCE];
    for (int v = 0; v < vectors; v++) found[v] = near_lanes(c[v], curves->near);
    if (any_far(c, vectors))
        for (int v = 0; v < vectors; v++) found[v] = far_lanes(c[v], found[v], curves->far, curves->apart, taken, own);
    for (int v = 0; v < vectors; v++) c[v] = finished(found[v], curves->gain, curves->bias, curves->low, curves->high);
}

/* Some vectors that one filter serves, one behind the other. */
INLINE void curve_along(float *out, const float *inverse, __mmask16 last, const Curves *curves, const int vectors) {
    __m512 c[AT_ONCE];
    for (int v = 0; v < vectors; v++) {
        __mmask16 taken = v < vectors - 1 ? 0xffff : last;
        c[v] = _mm512_mul_ps(_mm512_maskz_loadu_ps(taken, out + 16 * v), _mm512_maskz_loadu_ps(taken, inverse + 16 * v));
    }
    curve_cosines(c, 0xffff, curves, vectors, 0);
    for (int v = 0; v < vectors; v++) _mm512_mask_storeu_ps(out + 16 * v, v < vectors - 1 ? 0xffff : last, c[v]);
}

/* One filter over some positions, in place. */
static void curve_run(float *restrict out, const float *inverse, long count, Curve curve, float gain, float bias,
                      float low, float high) {
    Curves curves = curves_at(curve, 0, 0xffff, low, high, 0);
    curves.gain = lanes(gain), curves.bias = lanes(bias);
    for (; count > 16 * (AT_ONCE - 1); count -= 16 * AT_ONCE, out += 16 * AT_ONCE, inverse += 16 * AT_ONCE)
        curve_along(out, inverse, first_of(count - 16 * (AT_ONCE - 1)), &curves, AT_ONCE);
    if (count > 32) curve_along(out, inverse, first_of(count - 32), &curves, 3);
    else if (count > 16) curve_along(out, inverse, first_of(count - 16), &curves, 2);
    else if (count > 0) curve_along(out, inverse, first_of(count), &curves, 1);
}

/* Some maps one behind the other, each of so many vectors, from a copy. What a whole vector writes beyond its map, of
   `left` numbers, is written over by the next. */
INLINE void curve_some_maps(float *out, const float *copied, const float *inverse, long left, const Elementwise *e, long o,
                            const int maps, const int vectors, const int own_norms) {
    long count = e->positions;
    __mmask16 last = first_of(count - 16 * (vectors - 1));
    const Curve curve = curve_of(e, o);
    const long step = e->curves > 1;
    __m512 c[AT_ONCE], found[AT_ONCE];
    for (int i = 0; i < maps * vectors; i++) {
        int v = i % vectors;
        __mmask16 taken = v < vectors - 1 ? 0xffff : last;
        __m512 norms = _mm512_maskz_loadu_ps(taken, inverse + (own_norms ? i / vectors * count : 0) + 16 * v);
        c[i] = _mm512_mul_ps(_mm512_loadu_ps(copied + i / vectors * count + 16 * v), norms);
        found[i] = lanes(curve.near[(NEAR_TERMS - 1) * curve.apart + i / vectors * step]);
    }
    for (int t = NEAR_TERMS - 2; t >= 0; t--)
        for (int i = 0; i < maps * vectors; i++)
            found[i] = plus(found[i], _mm512_mul_ps(c[i], c[i]), curve.near[t * curve.apart + i / vectors * step]);
    for (int i = 0; i < maps * vectors; i++) found[i] = _mm512_mul_ps(c[i], found[i]);
    if (any_far(c, maps * vectors))
        for (int i = 0; i < maps * vectors; i++)
            found[i] = far_lanes(c[i], found[i], curve.far + i / vectors * step, curve.apart, 0xffff, 0);
    for (int i = 0; i < maps * vectors; i++) {
        long f = o + i / vectors;
        c[i] = finished(found[i], lanes(at(e->gain, f, 1.0f)), lanes(at(e->bias, f, 0.0f)), e->low, e->high);
    }
    for (int m = 0; m < maps; m++, left -= count)
        for (int v = 0; v < vectors; v++) {
            float *to = out + m * count + 16 * v;
            if (left >= 16 * vectors || v < vectors - 1) _mm512_storeu_ps(to, c[m * vectors + v]);
            else _mm512_mask_storeu_ps(to, last, c[m * vectors + v]);
        }
}

/* Maps of few positions one behind the other, from the o-th filter's on. They are copied, since a load waits for a store
   by a mask that it touches. */
INLINE void curve_maps(float *out, const float *inverse, long maps, const Elementwise *e, long o, const int vectors,
                       const int own_norms) {
    const int at_once = AT_ONCE / vectors;
    float copied[CHUNK + 16];
    long count = e->positions, together = CHUNK / count;
    for (long first = 0; first < maps; first += together) {
        long some = maps - first < together ? maps - first : together, left = some * count, m = 0;
        const float *from = copied, *norms = inverse + (own_norms ? first * count : 0);
        float *to = out + first * count;
        memcpy(copied, to, left * sizeof(float));
#define SOME(MAPS)                                                                                  \
    do {                                                                                            \
        curve_some_maps(to, from, norms, left, e, o + first + m, MAPS, vectors, own_norms);         \
        m += MAPS, left -= MAPS * count, to += MAPS * count, from += MAPS * count;                  \
        norms += own_norms ? MAPS * count : 0;                                                      \
    } while (0)
        while (some - m >= at_once) SOME(at_once);
        while (some > m) SOME(1);
#undef SOME
        if (e->is_gelu) gelu_run(out + first * count, some * count);
    }
}

/* Returns 0 where it does not serve: for maps of so few positions that most lanes would be empty. */
enum { FEWEST = 5 };
static int curve_small_planes(float *product, const Elementwise *e) {
    long count = e->positions;
    if (count < FEWEST) return 0;
    int is_depthwise = e->groups > 1 && e->groups == e->filters;
    long outers = is_depthwise ? e->images : e->images * e->groups, maps = e->images * e->filters / outers;
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long outer = 0; outer < outers; outer++) {
        float *out = product + outer * maps * count;
        const float *inverse = e->inverse + outer * (is_depthwise ? maps : 1) * count;
        long o = outer * maps % e->filters;
        if (is_depthwise && count > 48) curve_maps(out, inverse, maps, e, o, 4, 1);
        else if (is_depthwise && count > 32) curve_maps(out, inverse, maps, e, o, 3, 1);
        else if (is_depthwise && count > 16) curve_maps(out, inverse, maps, e, o, 2, 1);
        else if (is_depthwise) curve_maps(out, inverse, maps, e, o, 1, 1);
        else if (count > 48) curve_maps(out, inverse, maps, e, o, 4, 0);
        else if (count > 32) curve_maps(out, inverse, maps, e, o, 3, 0);
        else if (count > 16) curve_maps(out, inverse, maps, e, o, 2, 0);
        else curve_maps(out, inverse, maps, e, o, 1, 0);
    }
    return 1;
}

/* Sixteen filters, or fewer, at some positions. */
INLINE void curve_across(const Across *a, long row, long o, __mmask16 taken, const Curves *curves, const int rows,
                         const int own_norms, const int own_curves) {
    const float *from = a->from + row * a->from_step + o, *inverse = a->inverse + row * a->norm_step + (own_norms ? o : 0);
    float *out = a->out + row * a->step + o;
    __m512 c[AT_ONCE];
    for (int r = 0; r < rows; r++) {
        __m512 norm = own_norms ? _mm512_maskz_loadu_ps(taken, inverse + r * a->norm_step) : lanes(inverse[r * a->norm_step]);
        c[r] = _mm512_mul_ps(_mm512_maskz_loadu_ps(taken, from + r * a->from_step), norm);
    }
    curve_cosines(c, taken, curves, rows, own_curves);
    for (int r = 0; r < rows; r++) _mm512_mask_storeu_ps(out + r * a->step, taken, c[r]);
}

/* Some rows, with gains and biases of each filter's own; with norms and curves of their own, or all with the first. */
INLINE void curve_rows_of(const Across *a, long rows, const Elementwise *e, const int own_norms, const int own_curves) {
    for (long o = 0; o < e->filters; o += 16) {
        __mmask16 taken = first_of(e->filters - o);
        Curves curves = curves_at(curve_of(e, 0), own_curves ? o : 0, taken, e->low, e->high, own_curves);
        curves.gain = _mm512_maskz_loadu_ps(taken, e->gain + o), curves.bias = _mm512_maskz_loadu_ps(taken, e->bias + o);
        long row = 0;
        for (; rows - row >= AT_ONCE; row += AT_ONCE)
            curve_across(a, row, o, taken, &curves, AT_ONCE, own_norms, own_curves);
        for (; row < rows; row++) curve_across(a, row, o, taken, &curves, 1, own_norms, own_curves);
    }
}
#else
/* One filter over some positions, in place. */
static void curve_run(float *restrict out, const float *inverse, long count, Curve curve, float gain, float bias,
                      float low, float high) {
    for (long first = 0; first < count; first += RUN) {
        float *part = out + first, largest = 0.0f;
        long some = count - first < RUN ? count - first : RUN;
#pragma omp simd reduction(max : largest)
        for (long s = 0; s < some; s++) {
            part[s] *= inverse[first + s];
            largest = most(fabsf(part[s]), largest);
        }
        if (largest <= CURVE_EDGE) {
#pragma omp simd
            for (long s = 0; s < some; s++) part[s] = finish(near_on(curve, 0, part[s]), gain, bias, low, high);
        } else {
#pragma omp simd
            for (long s = 0; s < some; s++) part[s] = finish(far_on(curve, 0, part[s]), gain, bias, low, high);
        }
    }
}

/* Numbers with gains and biases of their own; with norms and curves of their own, or all with the first. */
INLINE void curve_row(float *restrict out, const float *inverse, long count, Curve curve, const float *gain,
                      const float *bias, float low, float high, const int own_norms, const int own_curves) {
    for (long first = 0; first < count; first += RUN) {
        long last = count - first < RUN ? count : first + RUN;
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (long o = first; o < last; o++) {
            out[o] *= inverse[own_norms ? o : 0];
            largest = most(fabsf(out[o]), largest);
        }
        if (largest <= CURVE_EDGE) {
#pragma omp simd
            for (long o = first; o < last; o++)
                out[o] = finish(near_on(curve, own_curves ? o : 0, out[o]), gain[o], bias[o], low, high);
        } else {
#pragma omp simd
            for (long o = first; o < last; o++)
                out[o] = finish(far_on(curve, own_curves ? o : 0, out[o]), gain[o], bias[o], low, high);
        }
    }
}

/* In place alone. */
INLINE void curve_rows_of(const Across *a, long rows, const Elementwise *e, const int own_norms, const int own_curves) {
    for (long row = 0; row < rows; row++)
        curve_row(a->out + row * a->step, a->inverse + row * a->norm_step, e->filters, curve_of(e, 0), e->gain, e->bias,
                  e->low, e->high, own_norms, own_curves);
}

static int curve_small_planes(float *product, const Elementwise *e) { return product == NULL && e == NULL; /* no */ }
#endif
