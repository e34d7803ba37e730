/* Responses of layers whose filters lie innermost, as compiled graphs call them: written beside the product, not over it,
   and without gain and bias. As cpu_kernels.c says. */

typedef struct {
    const float *product; /* in the backward pass NULL */
    const float *gradient, *saved; /* by the response, and the response; in the forward pass NULL */
    float *out, *along; /* the response; or the gradient by the product, and the sum along each patch */
    float *sums; /* (2, O): of the gradient with the response, and for k; NULL where they are not wanted */
} Rows;

/* For |t| <= NEAR_ATANH and |angle| <= NEAR_SECANT; the greatest relative error of the polynomials is 1.3e-8. */
static const float NEAR_ATANH = 0.6f, NEAR_SECANT = 0.8f;
INLINE float atanh_near(float t) {
    float z = t * t;
    float p = (((((2.4474643171e-1f * z - 3.4449916333e-2f) * z + 1.2165009975e-1f) * z + 1.0694789141e-1f) * z
                + 1.4311957359e-1f) * z + 1.9999387860e-1f) * z + 3.3333334327e-1f;
    return t + t * z * p;
}
INLINE float secant_near(float angle) {
    float z = angle * angle;
    float p = (((((6.3238609582e-3f * z + 1.3622355182e-3f) * z + 1.5972269699e-2f) * z + 3.3864121884e-2f) * z
                + 8.4776110947e-2f) * z + 2.0833112299e-1f) * z + 5.0e-1f;
    return 1.0f + z * p;
}

/* By filter: up to which response the short polynomials serve, the angle of atanh(t) = 1, and the slope at the equator. */
typedef struct { float *limit, *flat, *rate; } Near;

static void near_of(Near *n, const Elementwise *e, int operator) {
    for (long o = 0; o < e->filters; o++) {
        int is_sigmoid = operator == SIGMOID;
        n->flat[o] = is_sigmoid ? 1.0f / e->steep[o] : HALF_PI;
        n->rate[o] = is_sigmoid ? e->steep[o] / e->end[o] : TWO_OVER_PI;
        n->limit[o] = NEAR_SECANT * TWO_OVER_PI;
#ifndef __AVX512F__ /* where nothing asks for that of a sigmoid */
        if (is_sigmoid) n->limit[o] = least(NEAR_ATANH, tanhf(NEAR_SECANT * e->steep[o])) / e->end[o];
#endif
    }
}

#include "cpu_row_lanes.h"

/* All filters at one position; depthwise: each filter has a norm of its own. */
INLINE void respond_to_row(const float *product, float *restrict out, const float *inverse, const Elementwise *e,
                           const int operator, const int is_depthwise) {
    const float *length = e->length, *steep = e->steep;
    long filters = e->filters;
    float guard = e->guard;
    if (respond_by_lanes(product, out, inverse, e, operator, is_depthwise)) return;
    if (operator == COSINE) {
#pragma omp simd
        for (long o = 0; o < filters; o++)
            out[o] = within(product[o] * inverse[is_depthwise ? o : 0] * length[o], guard);
        return;
    }
    for (long first = 0; first < filters; first += RUN) {
        long last = filters - first < RUN ? filters : first + RUN;
        int far = 0;
#pragma omp simd reduction(| : far)
        for (long o = first; o < last; o++) {
            float c = product[o] * inverse[is_depthwise ? o : 0] * length[o];
            out[o] = c;
            far |= is_far(c, operator, operator == SIGMOID ? steep[o] : 1.0f);
        }
        if (far) respond_row(out + first, NULL, last - first, e, first, operator, 0, 1, 0);
        else respond_row(out + first, NULL, last - first, e, first, operator, 0, 1, 1);
    }
}

/* All filters at one position: the gradient by the product, and cosine times slope, which depthwise layers get filter by
   filter and times inverse^2 in place of their norms. Returns its sum. `part`, (2, O), takes what belongs to k. */
INLINE float respond_backward_row(const float *gradient, const float *saved, float *restrict inverse,
                                  float *restrict product, float *restrict part, const Elementwise *e, const Near *n,
                                  const int operator, const int for_k, const int is_depthwise) {
    const float *length = e->length, *steep = e->steep, *end = e->end; /* named here, or the compiler gathers them */
    const float *limit = n->limit, *flat = n->flat, *rate = n->rate;
    float guard = e->guard, step = e->step, sum = 0.0f;
    long filters = e->filters;
#define STEP(SLOPE, COSINE_HERE, RISE, ANGLE)                                                                            \
    do {                                                                                                                 \
        float norm = inverse[is_depthwise ? o : 0], a = (COSINE_HERE) * (SLOPE);                                        \
        product[o] = (SLOPE) * length[o] * norm;                                                                         \
        if (is_depthwise) inverse[o] = a * (norm * norm);                                                                \
        else sum += a;                                                                                                   \
        if (for_k) part[o] += gradient[o] * saved[o], part[filters + o] += (RISE) * (ANGLE);                             \
    } while (0)
    for (long first = 0; first < filters; first += RUN) {
        long last = filters - first < RUN ? filters : first + RUN;
        int far = 0;
        if (operator != COSINE) {
#pragma omp simd reduction(| : far)
            for (long o = first; o < last; o++) far |= !(fabsf(saved[o]) <= limit[o]); /* a NaN is far */
        }
        if (far || operator == COSINE) {
#pragma omp simd reduction(+ : sum)
            for (long o = first; o < last; o++) {
                Slope found = slope_at(saved[o], gradient[o], operator, guard, step, operator == SIGMOID ? steep[o] : 1.0f,
                                       operator == SIGMOID ? end[o] : 1.0f);
                STEP(found.slope, found.cosine, found.rise, found.angle);
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (long o = first; o < last; o++) {
                float t = operator == SIGMOID ? saved[o] * end[o] : saved[o];
                float found = operator == SIGMOID ? atanh_near(t) : t, angle = found * flat[o];
                float rise = operator == SIGMOID ? (1.0f - t * t) * gradient[o] : gradient[o];
                float slope = rise * rate[o] * secant_near(angle);
                STEP(slope, sin_of(angle), rise, found);
            }
        }
    }
#undef STEP
    return sum;
}

INLINE float respond_backward_row_of(const float *gradient, const float *saved, float *inverse, float *product,
                                     float *part, const Elementwise *e, const Near *n, const int is_depthwise) {
    float along;
    if (backward_by_lanes(gradient, saved, inverse, product, part, e, n, is_depthwise, &along)) return along;
#define ROW(OPERATOR, FOR_K) \
    respond_backward_row(gradient, saved, inverse, product, part, e, n, OPERATOR, FOR_K, is_depthwise)
    if (e->operator == COSINE) return ROW(COSINE, 0);
    if (e->operator == LINEAR) return ROW(LINEAR, 0);
    return part == NULL ? ROW(SIGMOID, 0) : ROW(SIGMOID, 1);
#undef ROW
}

#include "cpu_learned_rows.h"

/* out = response to product inverse length. */
static void respond_rows(const Rows *r, const Elementwise *e) {
    long rows = e->images * e->positions, filters = e->filters;
    OwnTerms own = forward_terms(e, rows);
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long first = 0; first < rows; first += ROWS_A_BLOCK) {
        long count = rows - first < ROWS_A_BLOCK ? rows - first : ROWS_A_BLOCK;
        respond_to_rows(r->product + first * filters, r->out + first * filters, e->inverse + first, e, &own, filters,
                        count, 0);
    }
    free(own.edge);
}

/* The gradients by the product and along the patches. */
static int respond_rows_backward(const Rows *r, const Elementwise *e) {
    long rows = e->images * e->positions, filters = e->filters, blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    double *totals = calloc(2 * filters * e->threads, sizeof(double));
    float *terms = malloc(3 * filters * sizeof(float));
    OwnTerms own = backward_terms(e, rows);
    Near near = {terms, terms + filters, terms + 2 * filters};
    int failed = totals == NULL || terms == NULL;
    if (!failed) near_of(&near, e, e->operator);
#pragma omp parallel num_threads(e->threads) if (e->threads > 1) reduction(| : failed)
    {
        double *sums = totals + omp_get_thread_num() * 2 * filters;
        float *part = malloc(2 * filters * sizeof(float));
        failed |= part == NULL;
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            if (failed || totals == NULL || terms == NULL) continue;
            memset(part, 0, 2 * filters * sizeof(float));
            long first = block * ROWS_A_SUM, count = rows - first < ROWS_A_SUM ? rows - first : ROWS_A_SUM;
            respond_backward_rows(r->gradient + first * filters, r->saved + first * filters, e->inverse + first,
                                  r->out + first * filters, r->along + first, r->sums ? part : NULL, e, &near, &own, filters,
                                  count, 0);
            for (long i = 0; i < 2 * filters && r->sums; i++) sums[i] += part[i];
        }
        free(part);
    }
    if (!failed && r->sums) add_up(totals, 2 * filters, e->threads, r->sums);
    free(own.back);
    free(terms);
    free(totals);
    return failed;
}

/* What a learned k makes of the response put into `e`; 0 where there is no room. Must be freed. */
INLINE int put_softness(Elementwise *e, const float *k, float **terms) {
    *terms = k ? malloc(3 * e->filters * sizeof(float)) : NULL;
    if (k == NULL) return 1;
    if (*terms == NULL) return 0;
    softness_terms(k, *terms, e->filters);
    e->steep = *terms, e->rise = *terms + e->filters, e->end = *terms + 2 * e->filters;
    return 1;
}

/* As Python calls them: `held` serves every call of a shape, and each has places of its own. */
int respond_rows_at(const Elementwise *held, const float *product, const float *inverse, const float *length,
                    const float *k, float *out) {
    Elementwise e = *held;
    const Rows r = {.product = product, .out = out};
    float *terms;
    if (!put_softness(&e, k, &terms)) return 1;
    e.inverse = inverse, e.length = length;
    respond_rows(&r, &e);
    free(terms);
    return 0;
}

int respond_rows_backward_at(const Elementwise *held, const float *gradient, const float *saved, const float *inverse,
                             const float *length, const float *k, float *product, float *along, float *sums) {
    Elementwise e = *held;
    const Rows r = {.gradient = gradient, .saved = saved, .out = product, .along = along, .sums = k ? sums : NULL};
    float *terms;
    if (!put_softness(&e, k, &terms)) return 1;
    e.inverse = inverse, e.length = length;
    int failed = respond_rows_backward(&r, &e);
    free(terms);
    return failed;
}
