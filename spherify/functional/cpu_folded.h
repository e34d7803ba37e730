/* What a folded layer does besides its product, in one call. As cpu_kernels.c says. */

typedef struct {
    Window window;
    Elementwise response; /* its norms are put in by the call */
    float eps, scale;
} Layer;

/* Between the two calls of a layer, each thread's own: the input is read before the product throws it out of the cache. */
enum { MOST_HELD = 1 << 15 };
static __thread float held[MOST_HELD] __attribute__((aligned(64)));

/* Whether this layer's norms find room there. */
int can_hold(const Layer *layer) {
    const Window *w = &layer->window;
    return w->images * w->groups * w->out_height * w->out_width <= MOST_HELD;
}

int hold_norms(const float *x, const Layer *layer) {
    return patch_inverse_norm(x, held, &layer->window, layer->eps, layer->scale);
}

/* product = the response to it, by the norms held or those given. */
void respond_to_norms(const float *inverse, float *product, const Layer *layer) {
    Elementwise response = layer->response;
    response.inverse = inverse ? inverse : held;
    forward(product, NULL, &response);
}

void gelu(float *x, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long first = 0; first < count; first += TILE) gelu_run(x + first, count - first < TILE ? count - first : TILE);
}

/* Both in one, where there are too many to hold. */
int respond_to_patches(const float *x, float *product, const Layer *layer) {
    const Window *w = &layer->window;
    long size = w->images * w->groups * w->out_height * w->out_width * sizeof(float);
    float *room = aligned_alloc(64, (size + 63) / 64 * 64);
    int failed = room == NULL || patch_inverse_norm(x, room, w, layer->eps, layer->scale);
    if (!failed) respond_to_norms(room, product, layer);
    free(room);
    return failed;
}
