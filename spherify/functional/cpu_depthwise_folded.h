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

/* Cosines with gains and biases, where there are some. */
INLINE void finish_cosines(const float *product, const float *norms, float *out, const Window *w, const Elementwise *e,
                           const int is_full) {
    const float *gain = e->gain, *bias = e->bias;
    float guard = e->guard, low = e->low, high = e->high;
    for (long q = 0, wide = wide_of(w->channels); q < w->out_width; q++, product += wide, norms += wide, out += e->filters) {
#pragma omp simd
        for (long o = 0; o < e->filters; o++) {
            float c = within(product[o] * norms[o], guard);
            out[o] = is_full ? finish(c, gain[o], bias[o], low, high) : finish(c, 1.0f, 0.0f, low, high);
        }
    }
}

static void folded_row(const float *product, const float *norms, float *out, const Window *w, const Elementwise *e,
                       const OwnTerms *own) {
    (void)own;
    long wide = wide_of(w->channels);
    const Across a = {product, norms, out, wide, wide, e->filters};
    if (e->operator == CURVE) curve_some_rows(&a, w->out_width, e);
    else if (e->gain && e->bias) finish_cosines(product, norms, out, w, e, 1);
    else finish_cosines(product, norms, out, w, e, 0);
    if (e->is_gelu) gelu_run(out, w->out_width * e->filters);
}

/* out = response to the patches of x, (N, H, W, C). The filters (C, 1, U, V) have no lengths: unit filters over `scale`. */
int convolve_rows_and_respond(const float *x, const float *weight, float *out, const Layer *layer) {
    const Window *w = &layer->window;
    const Depthwise d = {.weight = weight};
    long numbers = wide_of(w->channels) * w->window[0] * w->window[1];
    float *terms = calloc(numbers + w->channels + BLOCK, sizeof(float)), *packed = on_line(terms), *length = packed + numbers;
    if (terms == NULL) return 1;
    pack_filters(&d, w, 0.0f, packed, length, 0);
    for (long i = 0; i < numbers; i++) packed[i] *= layer->scale;
    int failed = row_by_row(x, out, w, &layer->response, packed, length, layer->eps, folded_row, NULL);
    free(terms);
    return failed;
}
