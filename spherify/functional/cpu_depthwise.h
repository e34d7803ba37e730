/* Depthwise layers on channels-last maps as compiled graphs call them: norms and what needs them row by row, so that they
   stay in the cache and are never written out. As cpu_kernels.c says. */

typedef struct {
    const float *x, *product; /* the product of the convolution; in the backward pass NULL */
    const float *gradient, *saved; /* by the response, and the response; in the forward pass NULL */
    float *out, *by_x; /* the response; or the gradient by the product, and that by the input through the norms */
    float *sums; /* (2, C): of the gradient with the response, and for k; NULL where they are not wanted */
} Depthwise;

/* 1 / |patch| of a row of patches. */
INLINE void norms_of_row(const float *x, float *columns, float *norms, const Window *w, long p, float eps) {
    rows_of_sums(x, columns, norms, w, p, w->height, w->width, w->out_width, w->padding, w->stride, 1);
    inverse_roots(norms, norms, w->out_width * w->channels, eps, 1.0f);
}

/* out = response to product inverse length, before any gain and bias. */
int depthwise_respond(const Depthwise *d, const Window *w, const Elementwise *e, float eps) {
    long channels = w->channels, row = w->out_width * channels, size = w->height * w->width * channels;
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *columns = malloc((w->width + w->out_width) * channels * sizeof(float)), *norms = columns + w->width * channels;
        failed |= columns == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < w->images * w->out_height; task++) {
            if (columns == NULL) continue;
            norms_of_row(d->x + task / w->out_height * size, columns, norms, w, task % w->out_height, eps);
            float *out = d->out + task * row;
            memcpy(out, d->product + task * row, row * sizeof(float));
            for (long first = 0; first < row; first += channels) {
                if (e->operator == COSINE) forward_row(out + first, NULL, norms + first, e, COSINE, 0, 1, 1);
                else if (e->operator == LINEAR) forward_row(out + first, NULL, norms + first, e, LINEAR, 0, 1, 1);
                else forward_row(out + first, NULL, norms + first, e, SIGMOID, 0, 1, 1);
            }
        }
        free(columns);
    }
    return failed;
}

/* All channels at one position: by_product, and along inverse^2 in place of the norms. */
INLINE void depthwise_backward_row(const float *gradient, const float *saved, float *restrict norms,
                                   float *restrict by_product, float *restrict sums, const Elementwise *e,
                                   const int operator) {
    const float *length = e->length, *steep = e->steep, *end = e->end;
    float guard = e->guard, step = e->step;
    long filters = e->filters;
#pragma omp simd
    for (long o = 0; o < filters; o++) {
        float inverse = norms[o], answer = saved[o];
        Slope found = slope_at(answer, gradient[o], operator, guard, step, operator == SIGMOID ? steep[o] : 1.0f,
                               operator == SIGMOID ? end[o] : 1.0f);
        if (operator == SIGMOID) {
            sums[o] += gradient[o] * answer;
            sums[filters + o] += found.rise * found.angle;
        }
        by_product[o] = found.slope * length[o] * inverse;
        norms[o] = found.cosine * found.slope * (inverse * inverse);
    }
}

/* Of the patches, along one axis, that hold the pixel `h`: the first, how many there are, and how far apart. */
INLINE long holders(long h, const Window *w, int axis, long patches, long *first, long *apart) {
    long step = w->stride[axis], gap = w->dilation[axis], many = 0;
    *first = 0;
    *apart = 1;
    for (long u = w->window[axis] - 1; u >= 0; u--) { /* patches in rising order */
        long place = h + w->padding[axis] - u * gap;
        if (place < 0 || place % step || place / step >= patches) continue;
        if (many == 0) *first = place / step;
        else if (many == 1) *apart = place / step - *first;
        many++;
    }
    return many;
}

/* by_x = -x times the sum of the map's numbers of all patches that hold the pixel. */
INLINE void minus_along(const float *x, const float *map, float *columns, float *spread, float *restrict by_x,
                        const Window *w) {
    long channels = w->channels, row = w->width * channels, out_row = w->out_width * channels, first, apart;
    for (long h = 0; h < w->height; h++) {
        long many = holders(h, w, 0, w->out_height, &first, &apart);
        sum_rows(map + first * out_row, many, apart * out_row, columns, out_row, 0);
        for (long column = 0; column < w->width; column++) {
            many = holders(column, w, 1, w->out_width, &first, &apart);
            sum_rows(columns + first * channels, many, apart * channels, spread + column * channels, channels, 0);
        }
        const float *from = x + h * row;
        float *to = by_x + h * row;
#pragma omp simd
        for (long c = 0; c < row; c++) to[c] = -from[c] * spread[c];
    }
}

/* The gradients by the product and, through the norms, by the input. */
int depthwise_backward(const Depthwise *d, const Window *w, const Elementwise *e, float eps) {
    long channels = w->channels, row = w->out_width * channels, out_size = w->out_height * row;
    long size = w->height * w->width * channels, wide = (w->width > w->out_width ? w->width : w->out_width) * channels;
    double *totals = calloc(2 * channels * w->threads, sizeof(double));
    int failed = totals == NULL;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = malloc((out_size + 2 * wide + 2 * channels) * sizeof(float));
        float *columns = map + out_size, *spread = columns + wide, *part = spread + wide;
        failed |= map == NULL;
#pragma omp for schedule(static)
        for (long n = 0; n < w->images; n++) {
            if (map == NULL || totals == NULL) continue;
            memset(part, 0, 2 * channels * sizeof(float));
            for (long p = 0; p < w->out_height; p++) {
                norms_of_row(d->x + n * size, columns, map + p * row, w, p, eps);
                for (long first = p * row; first < (p + 1) * row; first += channels) {
                    const float *gradient = d->gradient + n * out_size + first, *saved = d->saved + n * out_size + first;
                    float *to = d->out + n * out_size + first;
                    if (e->operator == COSINE) depthwise_backward_row(gradient, saved, map + first, to, part, e, COSINE);
                    else if (e->operator == LINEAR) depthwise_backward_row(gradient, saved, map + first, to, part, e, LINEAR);
                    else depthwise_backward_row(gradient, saved, map + first, to, part, e, SIGMOID);
                }
            }
            minus_along(d->x + n * size, map, columns, spread, d->by_x + n * size, w);
            double *sums = totals + omp_get_thread_num() * 2 * channels;
            for (long i = 0; i < 2 * channels; i++) sums[i] += part[i];
        }
        free(map);
    }
    for (long i = 0; i < 2 * channels && !failed; i++) {
        double total = 0.0;
        for (long t = 0; t < w->threads; t++) total += totals[t * 2 * channels + i];
        d->sums[i] = (float)total;
    }
    free(totals);
    return failed;
}
