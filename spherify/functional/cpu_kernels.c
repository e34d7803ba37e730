/* The elementwise part of SphereConv on the CPU, in float32, each in one pass over its tensors.

   Compiled on first use and called by cpu_kernels.py. A tensor (N, O, S) lies either with its positions innermost
   ("planes": strides O S, S, 1) or with its filters innermost ("rows": linear layers and channels-last maps, with
   one group or depthwise, strides S O, 1, O). Loops over the innermost dimension are written for the compiler to vectorise; no
   -ffast-math, so that a NaN stays one. Sums over many numbers end in double. One loop is written for AVX-512 besides. */

#include "cpu_functions.h"
#include "cpu_vectors.h"
#include "cpu_norms.h"

#ifndef BUILT_WITH
#define BUILT_WITH "options that nobody told"
#endif
const char *const built_with = BUILT_WITH; /* read by c_library.py */

INLINE float at(const float *values, long o, float otherwise) { return values ? values[o] : otherwise; }

/* ---- forward ---- */

typedef struct {
    const float *inverse, *length, *steep, *rise, *end, *gain, *bias; /* NULL where there is none */
    const float *offset, *unscale; /* what was saved less offset, times unscale, is the response; backward alone */
    const float *near, *far; /* terms of curves (terms, `curves`), one or one for each filter; forward of folded layers */
    long curves, images, filters, positions, groups;
    float guard, step, low, high;
    int operator, channels_last, is_gelu, threads; /* `is_gelu`: of what comes out, besides */
    const struct Fit *fit; /* see cpu_row_lanes.h; NULL where there is none */
    const struct Family *family; /* see cpu_learned_rows.h; likewise */
} Elementwise;

INLINE float finish(float response, float gain, float bias, float low, float high) {
    return least(high, most(low, response * gain + bias));
}

/* In place; a run's numbers are still in the cache. */
INLINE void gelu_run(float *x, long count) {
#pragma omp simd
    for (long s = 0; s < count; s++) x[s] = 0.5f * x[s] * (1.0f + erf_of(x[s] * 0.70710678118654752f));
}

#include "cpu_curves.h"

/* Numbers that hold their cosines already: one filter over some positions. */
INLINE void respond_run(float *restrict out, float *restrict kept, long count, const Elementwise *e, long o,
                        const int operator, const int keeps, const int is_near) {
    float steep = at(e->steep, o, 1.0f), rise = at(e->rise, o, 1.0f);
    float gain = at(e->gain, o, 1.0f), bias = at(e->bias, o, 0.0f);
    float guard = e->guard, low = e->low, high = e->high;
#ifdef __AVX512F__
    const int by_lanes = operator == SIGMOID && !is_near;
    for (long s = 0; s < count && by_lanes; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 c = _mm512_maskz_loadu_ps(taken, out + s), r = sigmoids_of(c, guard, lanes(steep), lanes(rise));
        if (keeps) _mm512_mask_storeu_ps(kept + s, taken, r);
        _mm512_mask_storeu_ps(out + s, taken, finished(r, lanes(gain), lanes(bias), low, high));
    }
    if (by_lanes) return;
#endif
#pragma omp simd
    for (long s = 0; s < count; s++) {
        float r = respond(out[s], operator, guard, steep, rise, is_near);
        if (keeps) kept[s] = r;
        out[s] = finish(r, gain, bias, low, high);
    }
}

/* One filter over some positions. Most cosines are small, and runs of small ones are answered by less arithmetic. */
INLINE void forward_run(float *restrict out, float *restrict kept, const float *inverse, long count,
                        const Elementwise *e, long o, const int operator, const int keeps) {
    float length = at(e->length, o, 1.0f), steep = at(e->steep, o, 1.0f);
    if (operator == COSINE) {
        float gain = at(e->gain, o, 1.0f), bias = at(e->bias, o, 0.0f), guard = e->guard, low = e->low, high = e->high;
#pragma omp simd
        for (long s = 0; s < count; s++)
            out[s] = finish(within(out[s] * inverse[s] * length, guard), gain, bias, low, high);
        return;
    }
    for (long first = 0; first < count; first += RUN) {
        float *part = out + first, *also = keeps ? kept + first : NULL;
        const float *norms = inverse + first;
        long some = count - first < RUN ? count - first : RUN;
        int far = 0;
#pragma omp simd reduction(| : far)
        for (long s = 0; s < some; s++) {
            float c = part[s] * norms[s] * length;
            part[s] = c;
            far |= is_far(c, operator, steep);
        }
        if (far) respond_run(part, also, some, e, o, operator, keeps, 0);
        else respond_run(part, also, some, e, o, operator, keeps, 1);
    }
}

/* Numbers that hold their cosines already: some filters at one position, from the o-th on. */
INLINE void respond_row(float *restrict out, float *restrict kept, long count, const Elementwise *e, long o,
                        const int operator, const int keeps, const int is_full, const int is_near) {
    float guard = e->guard, low = e->low, high = e->high;
    const float *gain = e->gain + o, *bias = e->bias + o, *steep = e->steep + o, *rise = e->rise + o;
#ifdef __AVX512F__
    const int by_lanes = operator == SIGMOID && !is_near;
    const __m512 one = lanes(1.0f), zero = _mm512_setzero_ps();
    for (long f = 0; f < count && by_lanes; f += 16) {
        __mmask16 taken = first_of(count - f);
        __m512 c = _mm512_maskz_loadu_ps(taken, out + f), own_rise = is_full ? _mm512_maskz_loadu_ps(taken, rise + f) : one;
        __m512 r = sigmoids_of(c, guard, _mm512_maskz_loadu_ps(taken, steep + f), own_rise);
        if (keeps) _mm512_mask_storeu_ps(kept + f, taken, r);
        r = is_full ? finished(r, _mm512_maskz_loadu_ps(taken, gain + f), _mm512_maskz_loadu_ps(taken, bias + f), low, high)
                    : finished(r, one, zero, low, high);
        _mm512_mask_storeu_ps(out + f, taken, r);
    }
    if (by_lanes) return;
#endif
#pragma omp simd
    for (long f = 0; f < count; f++) {
        float r = respond(out[f], operator, guard, operator == SIGMOID ? steep[f] : 1.0f,
                          operator != COSINE && is_full ? rise[f] : 1.0f, is_near);
        if (keeps) kept[f] = r;
        out[f] = is_full ? finish(r, gain[f], bias[f], low, high) : finish(r, 1.0f, 0.0f, low, high);
    }
}

/* All filters at one position; depthwise: each filter has a norm of its own. */
INLINE void forward_row(float *restrict out, float *restrict kept, const float *inverse, const Elementwise *e,
                        const int operator, const int keeps, const int is_full, const int is_depthwise) {
    const float *length = e->length, *gain = e->gain, *bias = e->bias, *steep = e->steep;
    float guard = e->guard, low = e->low, high = e->high;
    if (operator == COSINE) {
#pragma omp simd
        for (long o = 0; o < e->filters; o++) {
            float c = within(out[o] * inverse[is_depthwise ? o : 0] * (is_full ? length[o] : 1.0f), guard);
            if (keeps) kept[o] = c;
            out[o] = is_full ? finish(c, gain[o], bias[o], low, high) : finish(c, 1.0f, 0.0f, low, high);
        }
        return;
    }
    for (long first = 0; first < e->filters; first += RUN) {
        float *part = out + first, *also = keeps ? kept + first : NULL;
        long some = e->filters - first < RUN ? e->filters - first : RUN;
        int far = 0;
#pragma omp simd reduction(| : far)
        for (long f = 0; f < some; f++) {
            long o = first + f;
            float c = part[f] * inverse[is_depthwise ? o : 0] * (is_full ? length[o] : 1.0f);
            part[f] = c;
            far |= is_far(c, operator, operator == SIGMOID ? steep[o] : 1.0f);
        }
        if (far) respond_row(part, also, some, e, first, operator, keeps, is_full, 0);
        else respond_row(part, also, some, e, first, operator, keeps, is_full, 1);
    }
}

INLINE void forward_row_of(float *out, float *kept, const float *inverse, const Elementwise *e, const int operator) {
    int is_full = e->length && e->gain && e->bias;
    if (e->groups > 1) {
        if (kept != NULL) forward_row(out, kept, inverse, e, operator, 1, 1, 1);
        else if (is_full) forward_row(out, kept, inverse, e, operator, 0, 1, 1);
        else forward_row(out, kept, inverse, e, operator, 0, 0, 1);
    } else if (kept != NULL) forward_row(out, kept, inverse, e, operator, 1, 1, 0);
    else if (is_full) forward_row(out, kept, inverse, e, operator, 0, 1, 0);
    else forward_row(out, kept, inverse, e, operator, 0, 0, 0);
}

static void forward_planes(float *product, float *kept, const Elementwise *e) {
    long filters = e->filters / e->groups, tiles = (e->positions + TILE - 1) / TILE;
    long tasks = e->images * e->groups * tiles;
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long task = 0; task < tasks; task++) {
        long outer = task / tiles, first = (task % tiles) * TILE, g = outer % e->groups;
        long count = e->positions - first < TILE ? e->positions - first : TILE;
        const float *inverse = e->inverse + outer * e->positions + first;
        for (long f = 0; f < filters; f++) {
            long o = g * filters + f, place = (outer * filters + f) * e->positions + first;
            float *out = product + place, *also = kept == NULL ? NULL : kept + place;
            if (e->operator == CURVE)
                curve_run(out, inverse, count, curve_of(e, o), at(e->gain, o, 1.0f), at(e->bias, o, 0.0f), e->low, e->high);
            else if (e->operator == COSINE) forward_run(out, also, inverse, count, e, o, COSINE, 0);
            else if (e->operator == LINEAR && also == NULL) forward_run(out, also, inverse, count, e, o, LINEAR, 0);
            else if (e->operator == LINEAR) forward_run(out, also, inverse, count, e, o, LINEAR, 1);
            else if (also == NULL) forward_run(out, also, inverse, count, e, o, SIGMOID, 0);
            else forward_run(out, also, inverse, count, e, o, SIGMOID, 1);
            if (e->is_gelu) gelu_run(out, count);
        }
    }
}

typedef struct { float *numbers; long step; } Repeated; /* `step` 0: the same numbers serve every place */

/* values[o], `count` times each; where there are none, what stands for them as often as a chunk needs it. */
static Repeated repeated(const float *values, float otherwise, long filters, long count, long chunk) {
    long size = values ? filters * count : chunk;
    Repeated to = {malloc(size * sizeof(float)), values != NULL};
    for (long o = 0; to.numbers != NULL && o < size / count; o++)
        for (long s = 0; s < count; s++) to.numbers[o * count + s] = at(values, o, otherwise);
    return to;
}

static void curve_some_rows(const Across *a, long rows, const Elementwise *e) {
    if (e->groups > 1 && e->curves > 1) curve_rows_of(a, rows, e, 1, 1);
    else if (e->groups > 1) curve_rows_of(a, rows, e, 1, 0);
    else if (e->curves > 1) curve_rows_of(a, rows, e, 0, 1);
    else curve_rows_of(a, rows, e, 0, 0);
}

/* Maps too small to fill a vector: many of them are one row, in which each number has its own norm, gain, bias.
   Returns 0 where there is no room for that. */
static int forward_small_planes(float *product, float *kept, const Elementwise *e) {
    int is_depthwise = e->groups > 1 && e->groups == e->filters;
    long outers = is_depthwise ? e->images : e->images * e->groups, count = e->positions;
    long size = (is_depthwise ? e->filters : e->filters / e->groups) * count;
    long chunk = size < CHUNK ? size : CHUNK / count * count;
    const float *given[] = {e->length, e->gain, e->bias, e->steep, e->rise};
    Repeated values[5];
    int has_room = 1;
    for (int i = 0; i < 5; i++) {
        values[i] = repeated(given[i], i == 2 ? 0.0f : 1.0f, e->filters, count, chunk);
        has_room = has_room && values[i].numbers != NULL;
    }
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long outer = 0; outer < outers; outer++) {
        if (!has_room) continue;
        float norms[CHUNK];
        const float *inverse = e->inverse + outer * (is_depthwise ? size : count);
        for (long first = 0; first < chunk && !is_depthwise; first += count)
            for (long s = 0; s < count; s++) norms[first + s] = inverse[s];
        for (long first = 0; first < size; first += chunk) {
            long place = outer * size + first, value = (is_depthwise ? 0 : outer % e->groups * size) + first;
            Elementwise part = *e;
            part.filters = size - first < chunk ? size - first : chunk;
            part.groups = part.filters; /* each number has its own norm */
            part.length = values[0].numbers + values[0].step * value;
            part.gain = values[1].numbers + values[1].step * value;
            part.bias = values[2].numbers + values[2].step * value;
            part.steep = values[3].numbers + values[3].step * value;
            part.rise = values[4].numbers + values[4].step * value;
            float *out = product + place, *also = kept == NULL ? NULL : kept + place;
            const float *own = is_depthwise ? inverse + first : norms;
            const Across row = {out, own, out, 0, 0, 0};
            if (e->operator == CURVE) curve_some_rows(&row, 1, &part);
            else if (e->operator == COSINE) forward_row(out, also, own, &part, COSINE, 0, 1, 1);
            else if (e->operator == LINEAR && kept == NULL) forward_row(out, also, own, &part, LINEAR, 0, 1, 1);
            else if (e->operator == LINEAR) forward_row(out, also, own, &part, LINEAR, 1, 1, 1);
            else if (kept == NULL) forward_row(out, also, own, &part, SIGMOID, 0, 1, 1);
            else forward_row(out, also, own, &part, SIGMOID, 1, 1, 1);
            if (e->is_gelu) gelu_run(out, part.filters);
        }
    }
    for (int i = 0; i < 5; i++) free(values[i].numbers);
    return has_room;
}

static void curve_rows(float *product, const Elementwise *e) {
    long rows = e->images * e->positions, blocks = (rows + ROWS_OF_CURVES - 1) / ROWS_OF_CURVES;
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long block = 0; block < blocks; block++) {
        long row = block * ROWS_OF_CURVES, some = rows - row < ROWS_OF_CURVES ? rows - row : ROWS_OF_CURVES;
        float *out = product + row * e->filters;
        const Across a = {out, e->inverse + row * e->groups, out, e->filters, e->groups, e->filters};
        curve_some_rows(&a, some, e);
        if (e->is_gelu) gelu_run(out, some * e->filters);
    }
}

static void forward_rows(float *product, float *kept, const Elementwise *e) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long row = 0; row < e->images * e->positions; row++) {
        float *out = product + row * e->filters, *also = kept == NULL ? NULL : kept + row * e->filters;
        const float *inverse = e->inverse + row * e->groups;
        if (e->operator == COSINE) forward_row_of(out, also, inverse, e, COSINE);
        else if (e->operator == LINEAR) forward_row_of(out, also, inverse, e, LINEAR);
        else forward_row_of(out, also, inverse, e, SIGMOID);
        if (e->is_gelu) gelu_run(out, e->filters);
    }
}

/* product = g(product inverse length) gain + bias, clamped to [low, high]; `kept` takes the response before that.
   Nothing is kept for the cosine, nor for curves, which have no length. Rows want all of length, gain and bias, or none
   of them and then nothing kept. */
void forward(float *product, float *kept, const Elementwise *e) {
    int is_small = !e->channels_last && e->positions < FEW && e->images > 1;
    Elementwise same = *e;
    if (is_small && e->operator == CURVE && curve_small_planes(product, e)) return;
    if (is_small && e->curves > 1) same.operator = SIGMOID; /* too many terms to repeat for each number */
    if (e->channels_last && e->operator == CURVE) curve_rows(product, e);
    else if (e->channels_last) forward_rows(product, kept, e);
    else if (!is_small || !forward_small_planes(product, kept, &same)) forward_planes(product, kept, e);
}

#include "cpu_folded.h"
#include "cpu_convolve.h"

/* ---- backward ---- */

typedef struct {
    const float *gradient;
    const float *saved; /* the output; NULL where it is not needed */
    float *product, *along;
    float *sums; /* (4, O): of the gradient, with the response, for k, along the filter */
} Backward;

typedef struct { float total, with_answer, for_k, along; } Sums;

#ifdef __AVX512F__
/* One filter over some positions: `along` takes what is along each patch; shared, it is added to, and has room for whole
   vectors. */
INLINE Sums backward_run(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, long count, const Elementwise *e, long o, const int operator,
                         const int shares) {
    float steep = at(e->steep, o, 1.0f), end = at(e->end, o, 1.0f), gain = at(e->gain, o, 1.0f);
    __m512 offset = lanes(at(e->offset, o, 0.0f)), unscale = lanes(at(e->unscale, o, 1.0f));
    __m512 factor = lanes(at(e->length, o, 1.0f) * (operator == COSINE ? gain : 1.0f)), before = lanes(gain);
    __m512 ends = lanes(end), flat = lanes(1.0f / steep), slope = lanes(steep / end), zero = _mm512_setzero_ps();
    __m512 total = zero, with_answer = zero, for_k = zero, along_filter = zero;
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 d = _mm512_maskz_loadu_ps(taken, gradient + s), held = _mm512_mask_loadu_ps(offset, taken, saved + s);
        __m512 answer = _mm512_mul_ps(_mm512_sub_ps(held, offset), unscale);
        __m512 by = operator == COSINE ? d : _mm512_mul_ps(d, before);
        Slopes found = slopes_at(answer, by, operator, e->guard, e->step, ends, flat, slope);
        __m512 a = _mm512_mul_ps(found.cosine, found.slope);
        total = _mm512_add_ps(total, d);
        if (operator != COSINE) with_answer = _mm512_fmadd_ps(d, answer, with_answer);
        if (operator == SIGMOID) for_k = _mm512_fmadd_ps(found.rise, found.angle, for_k);
        along_filter = _mm512_add_ps(along_filter, a);
        if (shares) _mm512_store_ps(along + s, _mm512_add_ps(_mm512_load_ps(along + s), a));
        else _mm512_mask_storeu_ps(along + s, taken, a);
        __m512 to = _mm512_mul_ps(_mm512_mul_ps(found.slope, factor), _mm512_maskz_loadu_ps(taken, inverse + s));
        _mm512_mask_storeu_ps(product + s, taken, to);
    }
    return (Sums){_mm512_reduce_add_ps(total), _mm512_reduce_add_ps(with_answer), _mm512_reduce_add_ps(for_k),
                  _mm512_reduce_add_ps(along_filter)};
}
#else
/* One filter over some positions: `along` takes what is along each patch; shared, it is added to. */
INLINE Sums backward_run(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, long count, const Elementwise *e, long o, const int operator,
                         const int shares) {
    float steep = at(e->steep, o, 1.0f), end = at(e->end, o, 1.0f), gain = at(e->gain, o, 1.0f);
    float offset = at(e->offset, o, 0.0f), unscale = at(e->unscale, o, 1.0f), guard = e->guard, step = e->step;
    float factor = at(e->length, o, 1.0f) * (operator == COSINE ? gain : 1.0f);
    float before = operator == COSINE ? 1.0f : gain;
    float total = 0.0f, with_answer = 0.0f, for_k = 0.0f, along_filter = 0.0f;
#pragma omp simd reduction(+ : total, with_answer, for_k, along_filter)
    for (long s = 0; s < count; s++) {
        float d = gradient[s], answer = (saved[s] - offset) * unscale;
        Slope at_s = slope_at(answer, d * before, operator, guard, step, steep, end);
        float a = at_s.cosine * at_s.slope;
        total += d;
        if (operator != COSINE) with_answer += d * answer;
        if (operator == SIGMOID) for_k += at_s.rise * at_s.angle;
        along_filter += a;
        along[s] = shares ? along[s] + a : a;
        product[s] = at_s.slope * factor * inverse[s];
    }
    return (Sums){total, with_answer, for_k, along_filter};
}
#endif

/* Some maps one behind the other, the first of filter `o`: of one group, whose norms they share, or each with its own. */
INLINE void backward_maps(const Backward *b, double *sums, const Elementwise *e, long place, long o, long maps, long count,
                          const float *inverse, float *to, const int operator, const int shares) {
    float spread[TILE] __attribute__((aligned(64)));
    if (shares) memset(spread, 0, (count + 15) / 16 * 16 * sizeof(float));
    for (long m = 0; m < maps; m++, o = o + 1 == e->filters ? 0 : o + 1) {
        long s = place + m * e->positions, own = shares ? 0 : m * count;
        Sums found = backward_run(b->gradient + s, b->saved + s, inverse + own, b->product + s, shares ? spread : to + own,
                                  count, e, o, operator, shares);
        sums[o] += found.total;
        if (operator != COSINE) sums[e->filters + o] += found.with_answer;
        if (operator == SIGMOID) sums[2 * e->filters + o] += found.for_k;
        sums[3 * e->filters + o] += found.along;
    }
    if (shares) memcpy(to, spread, count * sizeof(float));
}

static void backward_planes(const Backward *b, double *totals, const Elementwise *e) {
    int shares = e->groups != e->filters;
    long filters = e->filters / e->groups, tiles = (e->positions + TILE - 1) / TILE, norms = e->images * e->groups;
    long together = shares || tiles > 1 ? 1 : TILE / e->positions, tasks = (norms + together - 1) / together * tiles;
#pragma omp parallel num_threads(e->threads) if (e->threads > 1)
    {
        double *sums = totals + omp_get_thread_num() * 4 * e->filters;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            long outer = task / tiles * together, first = (task % tiles) * TILE;
            long count = e->positions - first < TILE ? e->positions - first : TILE;
            long maps = shares ? filters : norms - outer < together ? norms - outer : together;
            long place = outer * filters * e->positions + first, o = outer * filters % e->filters;
            const float *inverse = e->inverse + outer * e->positions + first;
            float *along = b->along + outer * e->positions + first;
            if (e->operator == COSINE && shares) backward_maps(b, sums, e, place, o, maps, count, inverse, along, COSINE, 1);
            else if (e->operator == COSINE) backward_maps(b, sums, e, place, o, maps, count, inverse, along, COSINE, 0);
            else if (e->operator == LINEAR && shares) backward_maps(b, sums, e, place, o, maps, count, inverse, along, LINEAR, 1);
            else if (e->operator == LINEAR) backward_maps(b, sums, e, place, o, maps, count, inverse, along, LINEAR, 0);
            else if (shares) backward_maps(b, sums, e, place, o, maps, count, inverse, along, SIGMOID, 1);
            else backward_maps(b, sums, e, place, o, maps, count, inverse, along, SIGMOID, 0);
        }
    }
}

/* All filters at one position; sums over positions are added to `part`, (4, O). Returns what is along the patch. */
#ifdef __AVX512F__
INLINE void add_to(float *to, __mmask16 taken, __m512 x) {
    _mm512_mask_storeu_ps(to, taken, _mm512_add_ps(_mm512_maskz_loadu_ps(taken, to), x));
}

INLINE void backward_row(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, float *restrict part, const Elementwise *e, const int operator,
                         const int has_saved, const int is_depthwise) {
    long filters = e->filters;
    __m512 sum = _mm512_setzero_ps(), one = lanes(1.0f), end = one, flat = one, factor = one, answer = sum;
    __m512 norm = lanes(*inverse);
    for (long o = 0; o < filters; o += 16) {
        __mmask16 taken = first_of(filters - o);
        __m512 d = _mm512_maskz_loadu_ps(taken, gradient + o), gain = _mm512_maskz_loadu_ps(taken, e->gain + o);
        __m512 length = _mm512_maskz_loadu_ps(taken, e->length + o);
        if (has_saved) {
            __m512 offset = _mm512_maskz_loadu_ps(taken, e->offset + o), held = _mm512_maskz_loadu_ps(taken, saved + o);
            answer = _mm512_mul_ps(_mm512_sub_ps(held, offset), _mm512_maskz_loadu_ps(taken, e->unscale + o));
        }
        if (operator == SIGMOID) {
            __m512 steep = _mm512_mask_loadu_ps(one, taken, e->steep + o);
            end = _mm512_mask_loadu_ps(one, taken, e->end + o);
            flat = reciprocal_of(steep);
            factor = _mm512_mul_ps(steep, reciprocal_of(end));
        }
        __m512 by = operator == COSINE ? d : _mm512_mul_ps(d, gain);
        Slopes found = slopes_at(answer, by, operator, e->guard, e->step, end, flat, factor);
        add_to(part + o, taken, d);
        if (operator != COSINE) add_to(part + filters + o, taken, _mm512_mul_ps(d, answer));
        if (operator == SIGMOID) add_to(part + 2 * filters + o, taken, _mm512_mul_ps(found.rise, found.angle));
        if (has_saved) {
            __m512 a = _mm512_mul_ps(found.cosine, found.slope);
            add_to(part + 3 * filters + o, taken, a);
            if (is_depthwise) _mm512_mask_storeu_ps(along + o, taken, a);
            else sum = _mm512_mask_add_ps(sum, taken, sum, a);
        }
        if (is_depthwise) norm = _mm512_maskz_loadu_ps(taken, inverse + o);
        __m512 to = _mm512_mul_ps(_mm512_mul_ps(found.slope, operator == COSINE ? _mm512_mul_ps(length, gain) : length), norm);
        _mm512_mask_storeu_ps(product + o, taken, to);
    }
    if (has_saved && !is_depthwise) *along = _mm512_reduce_add_ps(sum);
}
#else
INLINE void backward_row(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, float *restrict part, const Elementwise *e, const int operator,
                         const int has_saved, const int is_depthwise) {
    const float *length = e->length, *gains = e->gain, *steep = e->steep, *end = e->end;
    const float *offset = e->offset, *unscale = e->unscale;
    float *restrict total = part, *restrict with_answer = part + e->filters;
    float *restrict for_k = part + 2 * e->filters, *restrict along_filter = part + 3 * e->filters;
    float sum = 0.0f, guard = e->guard, step = e->step;
#pragma omp simd reduction(+ : sum)
    for (long o = 0; o < e->filters; o++) {
        float d = gradient[o], answer = has_saved ? (saved[o] - offset[o]) * unscale[o] : 0.0f;
        Slope at_o = slope_at(answer, operator == COSINE ? d : d * gains[o], operator, guard, step,
                              operator == SIGMOID ? steep[o] : 1.0f, operator == SIGMOID ? end[o] : 1.0f);
        total[o] += d;
        if (operator != COSINE) with_answer[o] += d * answer;
        if (operator == SIGMOID) for_k[o] += at_o.rise * at_o.angle;
        if (has_saved) {
            float a = at_o.cosine * at_o.slope;
            along_filter[o] += a;
            if (is_depthwise) along[o] = a;
            else sum += a;
        }
        product[o] = at_o.slope * length[o] * (operator == COSINE ? gains[o] : 1.0f) * inverse[is_depthwise ? o : 0];
    }
    if (has_saved && !is_depthwise) *along = sum;
}
#endif

INLINE void backward_row_of(const float *gradient, const float *saved, const float *inverse, float *product, float *along,
                            float *part, const Elementwise *e, const int operator) {
    if (e->groups > 1) backward_row(gradient, saved, inverse, product, along, part, e, operator, 1, 1);
    else backward_row(gradient, saved, inverse, product, along, part, e, operator, 1, 0);
}

static int backward_rows(const Backward *b, double *totals, const Elementwise *e) {
    long rows = e->images * e->positions, filters = e->filters, blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    int failed = 0;
#pragma omp parallel num_threads(e->threads) if (e->threads > 1) reduction(| : failed)
    {
        double *sums = totals + omp_get_thread_num() * 4 * filters;
        float *part = malloc(4 * filters * sizeof(float));
        failed |= part == NULL;
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            if (part == NULL) continue;
            memset(part, 0, 4 * filters * sizeof(float));
            long last = (block + 1) * ROWS_A_SUM < rows ? (block + 1) * ROWS_A_SUM : rows;
            for (long row = block * ROWS_A_SUM; row < last; row++) {
                const float *gradient = b->gradient + row * filters;
                const float *saved = b->saved == NULL ? NULL : b->saved + row * filters;
                const float *inverse = e->inverse + row * e->groups;
                float *product = b->product + row * filters, *along = b->along + row * e->groups;
                if (saved == NULL) backward_row(gradient, saved, inverse, product, along, part, e, COSINE, 0, 0);
                else if (e->operator == COSINE) backward_row_of(gradient, saved, inverse, product, along, part, e, COSINE);
                else if (e->operator == LINEAR) backward_row_of(gradient, saved, inverse, product, along, part, e, LINEAR);
                else backward_row_of(gradient, saved, inverse, product, along, part, e, SIGMOID);
            }
            for (long i = 0; i < 4 * filters; i++) sums[i] += part[i];
        }
        free(part);
    }
    return failed;
}

/* What respond_backward of blocks.py finds. For the cosine, what was saved keeps its gain: unscale is 1. Rows want all
   of length, gain, offset and unscale. */
int backward(const Backward *b, const Elementwise *e) {
    double *totals = calloc(e->threads * 4 * e->filters, sizeof(double));
    if (totals == NULL) return 1;
    int failed = 0;
    if (e->channels_last) failed = backward_rows(b, totals, e);
    else backward_planes(b, totals, e);
    add_up(totals, 4 * e->filters, e->threads, b->sums);
    free(totals);
    return failed;
}

/* by_filters -= weight length^2 along, filter by filter: what the gradient has along each filter is taken off. */
void subtract_along_filters(float *by_filters, const float *weight, const float *length, const float *along,
                            long filters, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < filters; o++) {
        float factor = length[o] * length[o] * along[o];
        float *to = by_filters + o * size;
        const float *from = weight + o * size;
#pragma omp simd
        for (long d = 0; d < size; d++) to[d] -= from[d] * factor;
    }
}

/* along[row] = <by[row], x[row]>, and by[row] -= x[row] along inverse^2: for linear layers with the cosine, whose
   gradient by input and weight tells what lies along them. */
void subtract_own(float *by, const float *x, const float *inverse, float *along, long rows, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        float *to = by + row * size;
        const float *from = x + row * size;
        double total = 0.0;
        for (long first = 0; first < size; first += 512) {
            long count = size - first < 512 ? size - first : 512;
            total += dot_of(to + first, from + first, count);
        }
        along[row] = (float)total;
        float factor = (float)total * inverse[row] * inverse[row];
#pragma omp simd
        for (long d = 0; d < size; d++) to[d] -= from[d] * factor;
    }
}

#include "cpu_depthwise.h"
#include "cpu_depthwise_folded.h"
#include "cpu_depthwise_gradient.h"
#include "cpu_training.h"
#include "cpu_pointwise.h"
