/* What a folded layer does besides its product, in one call. As cpu_kernels.c says. */

typedef struct {
    Window window;
    Elementwise response; /* its norms are put in by the call */
    float eps, scale;
} Layer;

/* 64-byte lines, which the widest registers fill whole; NULL where there is no room. */
static float *room_for(long count) { return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }

/* The response to `product`, in place, by the norms of x's patches, or by those given. */
int respond_to_patches(const float *x, const float *inverse, float *product, const Layer *layer) {
    const Window *w = &layer->window;
    Elementwise response = layer->response;
    float *room = inverse ? NULL : room_for(w->images * w->groups * w->out_height * w->out_width);
    int failed = !inverse && (!room || patch_inverse_norm(x, room, w, layer->eps, layer->scale));
    response.inverse = inverse ? inverse : room;
    if (!failed) forward(product, NULL, &response);
    free(room);
    return failed;
}
