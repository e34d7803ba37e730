/* 1x1 convolutions as compiled graphs call them, whole: products of matrices by torch's own BLAS, some
   rows at a time, and while those are in the cache what else the layer does with them. As cpu_kernels.c says. */

/* As Fortran declares it. Sizes are read as 32 or 64 bits: the upper halves of ours are 0. */
typedef void (*Sgemm)(const char *, const char *, const long *, const long *, const long *, const float *, const float *,
                      const long *, const float *, const long *, const float *, float *, const long *);

typedef struct {
    Sgemm sgemm;
    const float *x, *weight; /* (R, C), (O, C) */
    const float *gradient, *saved; /* (R, O): by the response, and the response; in the forward pass NULL */
    const float *k; /* (O); NULL where it is a number */
    float *norms, *lengths; /* (R) 1 / |row| and (O) 1 / |filter|; the forward pass writes them */
    float *out; /* (R, O): the response; or (R, C): the gradient by the rows; NULL if not wanted */
    float *by_weight, *sums; /* (O, C), and (2, O): of the gradient with the response, and for k; NULL if not wanted */
    long rows, channels, filters, some; /* `some` rows are computed at once */
    float eps, fixed_k, guard, step;
    int operator, threads;
    const struct Fit *fit; /* of the operator, where k is a number; or NULL */
    const struct Family *family; /* where it is learned; or NULL */
} Pointwise;

/* (rows, columns) = first (rows, inner) second (inner, columns), either of them read as the transpose of what lies there,
   plus `kept` times what is there already. Fortran reads rows as columns, so that the factors change places. */
INLINE void multiply(const Pointwise *d, const float *first, int first_lies_across, const float *second,
                     int second_lies_across, float *out, long rows, long inner, long columns, float kept) {
    float one = 1.0f;
    long apart = second_lies_across ? inner : columns, own = first_lies_across ? rows : inner;
    d->sgemm(second_lies_across ? "T" : "N", first_lies_across ? "T" : "N", &columns, &rows, &inner, &one, second, &apart,
             first, &own, &kept, out, &columns);
}

enum { OF_FILTERS = 8 }; /* numbers by filter: what k makes, one, zero, and what the gradient needs near the equator */

INLINE Elementwise response_by(const Pointwise *d, float *terms) {
    long filters = d->filters;
    float fixed[3] = {1.0f, d->operator == LINEAR ? TWO_OVER_PI : 1.0f, 1.0f}; /* steep, rise, end */
    if (d->operator == SIGMOID && d->k) softness_terms(d->k, terms, filters);
    else if (d->operator == SIGMOID) softness_terms(&d->fixed_k, fixed, 1);
    for (long o = 0; o < filters; o++) {
        for (int i = 0; i < 3 && !(d->operator == SIGMOID && d->k); i++) terms[i * filters + o] = fixed[i];
        terms[3 * filters + o] = 1.0f;
        terms[4 * filters + o] = 0.0f;
    }
    return (Elementwise){.length = d->lengths, .steep = terms, .rise = terms + filters, .end = terms + 2 * filters,
                         .gain = terms + 3 * filters, .bias = terms + 4 * filters, .filters = filters, .groups = 1,
                         .guard = d->guard, .step = d->step, .low = -INFINITY, .high = INFINITY,
                         .operator = d->operator, .threads = d->threads, .fit = d->fit,
                         .family = d->family};
}

static int pointwise_respond(const Pointwise *d) {
    long filters = d->filters, channels = d->channels;
    float *product = malloc((d->some + OF_FILTERS) * filters * sizeof(float));
    if (product == NULL) return 1;
    Elementwise e = response_by(d, product + d->some * filters);
    inverse_lengths(d->weight, d->lengths, filters, channels, d->eps, 1.0f, d->threads);
    OwnTerms own = forward_terms(&e, d->rows);
    for (long first = 0; first < d->rows; first += d->some) {
        long count = d->rows - first < d->some ? d->rows - first : d->some;
        const float *x = d->x + first * channels;
        multiply(d, x, 0, d->weight, 1, product, count, channels, filters, 0.0f);
#pragma omp parallel for schedule(static) num_threads(d->threads) if (d->threads > 1)
        for (long block = 0; block < count; block += ROWS_A_BLOCK) {
            long last = count - block < ROWS_A_BLOCK ? count : block + ROWS_A_BLOCK;
            float *norms = d->norms + first;
            for (long row = block; row < last; row++)
                norms[row] = 1.0f / sqrtf(squares_of_row(x + row * channels, channels) + d->eps);
            respond_to_rows(product + block * filters, d->out + (first + block) * filters, norms + block, &e, &own,
                            filters, last - block, 0);
        }
    }
    free(own.edge);
    free(product);
    return 0;
}

/* Some rows' gradients by the product, and, where it is wanted, what the gradient by the rows has through their norms. */
static int gradients_of_rows(const Pointwise *d, const Elementwise *e, const Near *near, const OwnTerms *own, float *product,
                             double *totals, long begin, long count) {
    long filters = d->filters, channels = d->channels, blocks = (count + ROWS_A_SUM - 1) / ROWS_A_SUM;
    int failed = 0;
#pragma omp parallel num_threads(d->threads) if (d->threads > 1) reduction(| : failed)
    {
        double *sums = totals ? totals + omp_get_thread_num() * 2 * filters : NULL;
        float *part = sums ? malloc(2 * filters * sizeof(float)) : NULL;
        failed |= sums != NULL && part == NULL;
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            if (failed) continue;
            if (part) memset(part, 0, 2 * filters * sizeof(float));
            long first = block * ROWS_A_SUM, some = count - first < ROWS_A_SUM ? count - first : ROWS_A_SUM;
            long place = begin + first;
            float along[ROWS_A_SUM];
            respond_backward_rows(d->gradient + place * filters, d->saved + place * filters, d->norms + place,
                                  product + first * filters, along, part, e, near, own, filters, some, 0);
            for (long row = 0; row < some && d->out; row++) {
                const float *x = d->x + (place + row) * channels;
                float norm = d->norms[place + row], *to = d->out + (place + row) * channels;
                float factor = along[row] * -norm * norm;
#pragma omp simd
                for (long c = 0; c < channels; c++) to[c] = x[c] * factor;
            }
            for (long i = 0; i < 2 * filters && sums; i++) sums[i] += part[i];
        }
        free(part);
    }
    return failed;
}

static int pointwise_backward(const Pointwise *d) {
    long filters = d->filters, channels = d->channels;
    float *room = malloc((d->some + OF_FILTERS) * filters * sizeof(float)), *terms = room + d->some * filters;
    double *totals = d->sums ? calloc(2 * filters * d->threads, sizeof(double)) : NULL;
    int failed = room == NULL || (d->sums && totals == NULL);
    if (!failed) {
        Elementwise e = response_by(d, terms);
        Near near = {terms + 5 * filters, terms + 6 * filters, terms + 7 * filters};
        near_of(&near, &e, e.operator);
        OwnTerms own = backward_terms(&e, d->rows);
        for (long first = 0; first < d->rows && !failed; first += d->some) {
            long count = d->rows - first < d->some ? d->rows - first : d->some;
            failed = gradients_of_rows(d, &e, &near, &own, room, totals, first, count);
            if (d->out) multiply(d, room, 0, d->weight, 0, d->out + first * channels, count, filters, channels, 1.0f);
            if (d->by_weight)
                multiply(d, room, 1, d->x + first * channels, 0, d->by_weight, filters, count, channels, first > 0);
        }
        free(own.back);
    }
    if (!failed && d->by_weight) subtract_own(d->by_weight, d->weight, d->lengths, terms, filters, channels, d->threads);
    if (!failed && d->sums) add_up(totals, 2 * filters, d->threads, d->sums);
    free(totals);
    free(room);
    return failed;
}

/* As Python calls them: `held` serves every call of a shape, and each has places of its own. */
int pointwise_respond_at(const Pointwise *held, const float *x, const float *weight, const float *k, float *norms,
                         float *lengths, float *out) {
    Pointwise d = *held;
    d.x = x, d.weight = weight, d.k = k, d.norms = norms, d.lengths = lengths, d.out = out;
    return pointwise_respond(&d);
}

int pointwise_backward_at(const Pointwise *held, const float *gradient, const float *saved, const float *x,
                          const float *weight, const float *k, float *norms, float *lengths, float *by_x, float *by_weight,
                          float *sums) {
    Pointwise d = *held;
    d.gradient = gradient, d.saved = saved, d.x = x, d.weight = weight, d.k = k, d.norms = norms, d.lengths = lengths;
    d.out = by_x, d.by_weight = by_weight, d.sums = sums;
    return pointwise_backward(&d);
}

/* 0 if what is given multiplies as it should. */
int pointwise_check(Sgemm sgemm) {
    const float first[6] = {1, 2, 3, 4, 5, 6}, second[6] = {1, -1, 2, 3, 0, 5}, wanted[4] = {5, 18, 11, 42};
    float out[4] = {0}; /* (2, 3) with the transpose of (2, 3) */
    Pointwise d = {.sgemm = sgemm};
    multiply(&d, first, 0, second, 1, out, 2, 3, 2, 0.0f);
    return memcmp(out, wanted, sizeof(out)) != 0;
}
