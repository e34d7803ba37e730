/* Folded depthwise layers with 3x3 windows and padding 1 on planes (AVX-512): product, norms and response in one pass over
   the input. As cpu_kernels.c says. */

/* Whether a layer is one of these. */
int can_convolve(const Window *w, long filters) {
#ifdef __AVX512F__
    return (is_three_by_three(w, 1) || is_three_by_three(w, 2)) && filters == w->channels;
#else
    return w == NULL && filters < 0; /* no */
#endif
}

#ifdef __AVX512F__
/* What is known of one filter; `inverse` takes the norms where they are wanted, else the response is all there is. */
typedef struct {
    __m512 weight[9], gain, bias;
    float eps, scale, guard, low, high;
} Filter;

/* Of sixteen patches, from row to row. */
typedef struct { __m512 product, other, energy, more; } Patches;

INLINE void add_row(Patches *sums, __m512 left, __m512 own, __m512 right, const __m512 *weight) {
    sums->product = _mm512_fmadd_ps(right, weight[2], _mm512_fmadd_ps(left, weight[0], sums->product));
    sums->other = _mm512_fmadd_ps(own, weight[1], sums->other);
    sums->energy = _mm512_fmadd_ps(right, right, _mm512_fmadd_ps(left, left, sums->energy));
    sums->more = _mm512_fmadd_ps(own, own, sums->more);
}

INLINE void put(float *out, float *inverse, __mmask16 taken, Patches sums, const Filter *f) {
    __m512 product = _mm512_add_ps(sums.product, sums.other), energy = _mm512_add_ps(sums.energy, sums.more);
    __m512 norm = inverse_root(_mm512_add_ps(energy, lanes(f->eps)), f->scale);
    if (inverse != NULL) _mm512_mask_storeu_ps(inverse, taken, norm);
    else product = finished(within_lanes(_mm512_mul_ps(product, norm), f->guard), f->gain, f->bias, f->low, f->high);
    _mm512_mask_storeu_ps(out, taken, product);
}

/* One map, stride 1. */
INLINE void convolve(const float *x, float *out, float *inverse, const Neighbours *has, const Window *w, const Filter *f) {
    long count = w->height * w->width;
    for (long s = 0; s < count; s += 16, has++) {
        __mmask16 taken = first_of(count - s), rows[] = {has->above & taken, taken, has->below & taken};
        Patches sums = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int u = 0; u < 3; u++) {
            const float *row = x + s + (u - 1) * w->width;
            __m512 left = _mm512_maskz_loadu_ps(rows[u] & has->left, row - 1), own = _mm512_maskz_loadu_ps(rows[u], row);
            add_row(&sums, left, own, _mm512_maskz_loadu_ps(rows[u] & has->right, row + 1), f->weight + 3 * u);
        }
        put(out + s, inverse ? inverse + s : NULL, taken, sums, f);
    }
}

/* One map, stride 2: an output's columns are an odd one, the even one behind it and the next odd one. */
INLINE void convolve_halving(const float *x, float *out, float *inverse, const Window *w, const Filter *f) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i before = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
    for (long p = 0; p < w->out_height; p++)
        for (long q = 0; q < w->out_width; q += 16) {
            __mmask16 low = some_of(w->width - 2 * q), high = some_of(w->width - 2 * q - 16);
            Patches sums = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int u = 0; u < 3; u++) {
                long h = 2 * p + u - 1;
                if (h < 0 || h >= w->height) continue;
                const float *row = x + h * w->width + 2 * q;
                __m512 one = _mm512_maskz_loadu_ps(low, row), two = _mm512_maskz_loadu_ps(high, row + 16);
                __m512 right = _mm512_permutex2var_ps(one, odd, two), left = _mm512_maskz_permutexvar_ps(0xfffe, before, right);
                if (q > 0) left = _mm512_mask_broadcastss_ps(left, 1, _mm_load_ss(row - 1));
                add_row(&sums, left, _mm512_permutex2var_ps(one, even, two), right, f->weight + 3 * u);
            }
            long s = p * w->out_width + q;
            put(out + s, inverse ? inverse + s : NULL, first_of(w->out_width - q), sums, f);
        }
}

/* All maps: product and norms, or without norms the response `e`. */
static int convolve_maps(const float *x, const float *weight, float *out, float *norms, const Window *w,
                         const Elementwise *e, float eps, float scale) {
    long maps = w->images * w->channels, size = w->height * w->width, out_size = w->out_height * w->out_width;
    Neighbours *has = neighbours_of((size + 15) / 16, w->height, w->width);
    if (has == NULL) return 1;
#pragma omp parallel for schedule(static) num_threads(w->threads) if (w->threads > 1)
    for (long map = 0; map < maps; map++) {
        long o = map % w->channels;
        Filter f = {.eps = eps, .scale = scale};
        if (norms == NULL) {
            f.gain = lanes(at(e->gain, o, 1.0f)), f.bias = lanes(at(e->bias, o, 0.0f));
            f.guard = e->guard, f.low = e->low, f.high = e->high;
        }
        for (int i = 0; i < 9; i++) f.weight[i] = lanes(weight[o * 9 + i]);
        const float *from = x + map * size;
        float *to = out + map * out_size, *inverse = norms ? norms + map * out_size : NULL;
        if (w->stride[0] == 1) convolve(from, to, inverse, has, w, &f);
        else convolve_halving(from, to, inverse, w, &f);
    }
    free(has);
    return 0;
}
#endif

/* Product and norms, scale / |patch|, where can_convolve. */
int convolve_with_norms(const float *x, const float *weight, float *out, float *norms, const Window *w, float eps,
                        float scale) {
#ifdef __AVX512F__
    return convolve_maps(x, weight, out, norms, w, NULL, eps, scale);
#else
    return x && weight && out && norms && w && eps + scale > 0.0f;
#endif
}

/* out = response to the patches of x. The filters (O, 1, 3, 3) have no lengths: unit filters over `scale`. */
int convolve_and_respond(const float *x, const float *weight, float *out, const Layer *layer) {
    const Window *w = &layer->window;
    const Elementwise *e = &layer->response;
#ifdef __AVX512F__
    if (e->operator == COSINE && !e->is_gelu) return convolve_maps(x, weight, out, NULL, w, e, layer->eps, layer->scale);
#endif
    int is_held = can_hold(layer);
    float *norms = is_held ? held : malloc(w->images * e->filters * e->positions * sizeof(float));
    int failed = norms == NULL || convolve_with_norms(x, weight, out, norms, w, layer->eps, layer->scale);
    if (!failed) respond_to_norms(norms, out, layer);
    if (!is_held) free(norms);
    return failed;
}
