/* Folded depthwise layers on channels-last maps (AVX-512): product and norms row by row, and the response before they leave
   the cache. As cpu_kernels.c says. */

/* Whether a layer is one of these: with windows of which loops know the size, and the cosine or a curve. */
int can_convolve_rows(const Layer *layer) {
#ifdef __AVX512F__
    const Window *w = &layer->window;
    const Elementwise *e = &layer->response;
    long size = w->window[1], step = w->stride[1];
    int is_known = w->window[0] == size && ((size == 7 && step == 1) || ((size == 3 || size == 5) && step <= 2));
    int is_depthwise = w->channels_last && w->groups == w->channels && w->groups > 1 && e->filters == w->channels;
    int is_dense = w->dilation[0] == 1 && w->dilation[1] == 1 && e->channels_last;
    return is_known && is_depthwise && is_dense && (e->operator == CURVE || e->operator == COSINE);
#else
    return layer == NULL; /* no */
#endif
}

/* Cosines of a row of patches, with gains and biases where there are some. */
INLINE void finish_cosines(const Across *a, long count, const Elementwise *e, const int is_full) {
    for (long q = 0; q < count; q++) {
        const float *product = a->from + q * a->from_step, *norms = a->inverse + q * a->norm_step, *gain = e->gain;
        const float *bias = e->bias;
        float *out = a->out + q * a->step, guard = e->guard, low = e->low, high = e->high;
#pragma omp simd
        for (long o = 0; o < e->filters; o++) {
            float c = within(product[o] * norms[o], guard);
            out[o] = is_full ? finish(c, gain[o], bias[o], low, high) : finish(c, 1.0f, 0.0f, low, high);
        }
    }
}

/* out = response to the patches of x, (N, H, W, C). The filters (C, 1, U, V) have no lengths: unit filters over `scale`. */
int convolve_rows_and_respond(const float *x, const float *weight, float *out, const Layer *layer) {
    const Window *w = &layer->window;
    const Elementwise *e = &layer->response;
    const Depthwise d = {.weight = weight};
    long channels = w->channels, wide = wide_of(channels), taps = w->window[0] * w->window[1];
    long line = w->width * channels, size = w->height * line, row = w->out_width * channels;
    float *terms = calloc(wide * (taps + 1) + BLOCK, sizeof(float)), *packed = on_line(terms);
    int failed = 0;
    if (terms == NULL) return 1;
    pack_filters(&d, w, 0.0f, packed, packed + wide * taps, 0);
    for (long i = 0; i < wide * taps; i++) packed[i] *= layer->scale;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        Band band = band_of_input(w);
        const float **rows = malloc(w->window[0] * sizeof(float *));
        long held = numbers_of(&band), edge = band.columns * wide, outputs = w->out_width * wide, next = 0, top;
        float *room = calloc(held + edge + 2 * outputs + BLOCK, sizeof(float));
        float *product = on_line(room), *norms = product + outputs;
        failed |= rows == NULL || room == NULL;
        band.zeros = norms + outputs;
        band.numbers = norms + outputs + edge;
#pragma omp for schedule(static)
        for (long task = 0; task < w->images * w->out_height; task++) {
            if (rows == NULL || room == NULL) continue;
            long p = task % w->out_height;
            const float *from = x + task / w->out_height * size;
            const Across a = {product, norms, out + task * row, wide, wide, channels};
            next = hold_rows(&band, from, w, p, p == 0 ? 0 : next);
            Shape s = shape_at(&band, w, p, rows, &top);
            for (long c = 0; c < channels; c += BLOCK) {
                Along along = {.rows = rows, .to = product + c, .norms = norms + c, .first = c, .wide = wide,
                               .count = w->out_width, .apart = channels, .taken = channels - c, .eps = layer->eps};
                along.ahead[0] = ahead_of(from + next * line, w->stride[0] * line, w->out_width, c, channels);
                along.ahead[1] = ahead_of(a.out, row, w->out_width, c, channels);
                products_of_row(&along, (const Block *)(packed + c * taps) + top * s.size, &s);
            }
            if (e->operator == CURVE && e->curves > 1) curve_rows_of(&a, w->out_width, e, 1, 1);
            else if (e->operator == CURVE) curve_rows_of(&a, w->out_width, e, 1, 0);
            else if (e->gain && e->bias) finish_cosines(&a, w->out_width, e, 1);
            else finish_cosines(&a, w->out_width, e, 0);
            if (e->is_gelu) gelu_run(a.out, row);
        }
        free(room);
        free(rows);
    }
    free(terms);
    return failed;
}
