/* What a layer does around its product, and around its product's gradient, in a call each. As cpu_kernels.c says. */

typedef struct {
    Window window;
    Elementwise response; /* without its tensors */
    float eps, k; /* `k` where it is no tensor; 0 where there is none */
    int threads; /* at most */
} Trained;

typedef struct { /* NULL where there is none */
    const float *x, *weight, *gain, *bias, *k;
    float *terms; /* (TERMS, O): what the filters alone decide */
    float *inverse; /* 1 / |patch|; in the backward pass NULL where they are to be computed again */
    float *product, *kept; /* the product and in its place the output; the response before gain and bias */
    const float *gradient, *saved; /* by the output; what the forward pass kept */
    float *by_product, *along, *norms; /* of some images; `norms` is room for theirs */
    float *sums; /* (4, O) */
    float *by_x, *by_weight; /* `by_x` of some images */
} Places;

enum { LENGTH, STEEP, RISE, END, UNSCALE, ONE, ZERO, TERMS };
enum { NO_MEMORY = 1, KEEPS = 2, DIVIDES = 4 };

INLINE int threads_of(const Trained *t, long numbers) {
    long wanted = numbers >> 15;
    return wanted < 1 ? 1 : wanted < t->threads ? (int)wanted : t->threads;
}

INLINE long filter_size(const Window *w) { return w->channels / w->groups * w->window[0] * w->window[1]; }

/* 1 / |patch|, 1 / |filter|, what k makes of the response; the product, where there is room for it and can_convolve. Tells whether the response must be kept beside the output,
   which has it to within two rounding steps where no bias is larger than its gain, and whether the gradient by the
   cosine's gain may be had by dividing by the gain. */
int before_product(const Trained *t, const Places *p) {
    const Window *w = &t->window;
    long filters = t->response.filters, size = filter_size(w);
    int operator = t->response.operator, found = 0;
    float smallest = INFINITY, largest = 0.0f, *terms = p->terms;
    float fixed[3] = {1.0f, operator == LINEAR ? TWO_OVER_PI : 1.0f, 1.0f}; /* steep, rise, end */
    if (p->product ? convolve_with_norms(p->x, p->weight, p->product, p->inverse, w, t->eps, 1.0f)
                   : patch_inverse_norm(p->x, p->inverse, w, t->eps, 1.0f))
        return NO_MEMORY;
    inverse_lengths(p->weight, terms + LENGTH * filters, filters, size, t->eps, 1.0f, threads_of(t, filters * size));
    if (operator == SIGMOID && p->k) softness_terms(p->k, terms + STEEP * filters, filters);
    else if (operator == SIGMOID) softness_terms(&t->k, fixed, 1);
    for (long o = 0; o < filters; o++) {
        float gain = at(p->gain, o, 1.0f), height = fabsf(gain);
        for (int i = 0; i < 3 && !(operator == SIGMOID && p->k); i++) terms[(STEEP + i) * filters + o] = fixed[i];
        terms[UNSCALE * filters + o] = operator == COSINE ? 1.0f : 1.0f / gain;
        terms[ONE * filters + o] = 1.0f;
        terms[ZERO * filters + o] = 0.0f;
        if (!(height >= FLT_MIN && fabsf(at(p->bias, o, 0.0f)) <= height)) found |= KEEPS;
        if (height < smallest || isnan(height)) smallest = height;
        if (height > largest) largest = height;
    }
    return (operator == COSINE ? 0 : found & KEEPS) | (smallest > 1e-4f * largest ? DIVIDES : 0);
}

INLINE Elementwise response_of(const Trained *t, const Places *p, long count) {
    Elementwise e = t->response;
    long filters = e.filters;
    int is_all = e.channels_last, is_sigmoid = e.operator == SIGMOID; /* rows want all of them */
    const float *one = is_all ? p->terms + ONE * filters : NULL, *zero = is_all ? p->terms + ZERO * filters : NULL;
    e.images = count;
    e.length = p->terms + LENGTH * filters;
    e.steep = is_sigmoid ? p->terms + STEEP * filters : one;
    e.rise = e.operator != COSINE ? p->terms + RISE * filters : one;
    e.end = is_sigmoid ? p->terms + END * filters : one;
    e.gain = p->gain ? p->gain : one;
    e.bias = p->bias ? p->bias : zero;
    e.offset = p->bias && p->kept == NULL ? p->bias : zero;
    e.unscale = p->gain && p->kept == NULL && e.operator != COSINE ? p->terms + UNSCALE * filters : one;
    e.threads = threads_of(t, count * filters * e.positions);
    return e;
}

void after_product(const Trained *t, const Places *p) {
    Elementwise e = response_of(t, p, t->window.images);
    e.inverse = p->inverse;
    forward(p->product, p->kept, &e);
}

INLINE Window window_of_some(const Trained *t, long count) {
    Window w = t->window;
    w.images = count;
    w.threads = threads_of(t, count * w.channels * w.height * w.width);
    return w;
}

INLINE const float *norms_of_some(const Trained *t, const Places *p, long first) {
    return p->inverse ? p->inverse + first * t->response.groups * t->response.positions : p->norms;
}

/* The gradient by the product and along the patches, of `count` images from `first` on; the sums are of all so far. */
int before_gradients(const Trained *t, const Places *p, long first, long count) {
    Window w = window_of_some(t, count);
    long filters = t->response.filters, numbers = filters * t->response.positions;
    const float *x = p->x + first * w.channels * w.height * w.width;
    float *sums = first ? malloc(4 * filters * sizeof(float)) : p->sums;
    int failed = sums == NULL || (p->inverse == NULL && patch_inverse_norm(x, p->norms, &w, t->eps, 1.0f));
    Elementwise e = response_of(t, p, count);
    e.inverse = norms_of_some(t, p, first);
    Backward b = {p->gradient + first * numbers, p->saved ? p->saved + first * numbers : NULL, p->by_product, p->along, sums};
    failed = failed || backward(&b, &e);
    for (long i = 0; i < 4 * filters && first && !failed; i++) p->sums[i] += sums[i];
    if (first) free(sums);
    return failed;
}

/* What the gradient by these images has along their patches is taken off. */
int after_gradients(const Trained *t, const Places *p, long first, long count) {
    Window w = window_of_some(t, count);
    const float *x = p->x + first * w.channels * w.height * w.width;
    if (p->saved) return subtract_along(p->by_x, x, p->along, norms_of_some(t, p, first), &w);
    subtract_own(p->by_x, x, norms_of_some(t, p, first), p->along, w.images, w.channels, w.threads);
    return 0;
}

/* The same for the weight's, if it is there; and in place of the sums with the response and for k, the gradients by gain
   and k. */
void finish_gradients(const Trained *t, const Places *p) {
    long filters = t->response.filters, size = filter_size(&t->window);
    float *by_gain = p->sums + filters, *by_k = by_gain + filters, *along = by_k + filters, *end = p->terms + END * filters;
    int threads = threads_of(t, filters * size);
    if (p->by_weight && p->saved == NULL) subtract_own(p->by_weight, p->weight, p->terms, along, filters, size, threads);
    else if (p->by_weight) subtract_along_filters(p->by_weight, p->weight, p->terms, along, filters, size, threads);
    for (long o = 0; o < filters; o++) {
        float gain = at(p->gain, o, 1.0f);
        if (p->k) { /* of tanh(a / 2k) / tanh(pi / 4k) */
            double k = p->k[o], e = end[o];
            by_k[o] = (float)(-by_k[o] / (k * e) + by_gain[o] * gain * (1.0 - e * e) * 0.78539816339744831 / (k * k * e));
        }
        if (t->response.operator == COSINE) by_gain[o] = along[o] / gain;
    }
}

/* A learned k = low (high / low)^share, share = 1 / (1 + exp(-logit)); where `gradient` is given, by k, that by the logit. */
void learned_k(const float *logit, const float *gradient, float *out, long count, float low, float high) {
    double span = log((double)high / low);
    for (long i = 0; i < count; i++) {
        double share = 1.0 / (1.0 + exp(-(double)logit[i])), k = low * exp(span * share);
        out[i] = (float)(gradient ? gradient[i] * k * span * share * (1.0 - share) : k);
        if (gradient == NULL) out[i] = least(high, most(low, out[i]));
    }
}
