/* Depthwise layers on channels-last maps as compiled graphs call them: product, norms and response row by row, so that
   the first two stay in the cache and are never written out. As cpu_kernels.c says. */

#include "cpu_rows.h"
#include "cpu_patches.h"

typedef struct {
    const float *x, *weight; /* (N, H, W, C) and (C, U, V) */
    const float *gradient, *saved; /* by the response, and the response; in the forward pass NULL */
    float *out; /* the response; in the backward pass NULL */
    float *by_x, *by_weight; /* of the backward pass; by_x is NULL where it is not wanted */
    float *sums; /* (2, C): of the gradient with the response, and for k; NULL where they are not wanted */
} Depthwise;

/* Filters block by block, (C / 16, U V, 16), for the gradient from their last number to their first, and 1 / |filter|. */
INLINE void pack_filters(const Depthwise *d, const Window *w, float eps, float *packed, float *length,
                         const int is_turned) {
    long taps = w->window[0] * w->window[1];
    for (long c = 0; c < w->channels; c++) {
        const float *from = d->weight + c * taps;
        float *to = packed + c / BLOCK * BLOCK * taps + c % BLOCK, energy = 0.0f;
        for (long i = 0; i < taps; i++) {
            to[(is_turned ? taps - 1 - i : i) * BLOCK] = from[i];
            energy += from[i] * from[i];
        }
        length[c] = 1.0f / sqrtf(energy + eps);
    }
}

INLINE float *on_line(float *room) { return (float *)(((size_t)room + 63) / 64 * 64); }

/* The rows of the input that patches need at once. */
INLINE Band band_of_input(const Window *w) {
    long needed = (w->out_width - 1) * w->stride[1] + (w->window[1] - 1) * w->dilation[1] + 1;
    long there = w->padding[1] + w->width, rows = (w->window[0] - 1) * w->dilation[0] + 1;
    return (Band){NULL, NULL, rows, needed > there ? needed : there, w->padding[1], wide_of(w->channels)};
}

/* Copies what the p-th row of patches needs from row `next` on; returns the first row that is not there. */
INLINE long hold_rows(const Band *b, const float *x, const Window *w, long p, long next) {
    long first = p * w->stride[0] - w->padding[0], last = first + b->many < w->height ? first + b->many : w->height;
    long channels = w->channels, whole = channels / BLOCK * BLOCK;
    for (next = next < first ? first : next; next < last; next++) {
        const float *from = x + next * w->width * channels;
        float *to = row_of(b, next) + b->left * b->wide;
        for (long column = 0; column < w->width; column++, from += channels, to += b->wide) {
            for (long c = 0; c < whole; c += BLOCK) *(Block *)(to + c) = block_at(from + c);
            if (whole < channels) memcpy(to + whole, from + whole, (channels - whole) * sizeof(float));
        }
    }
    return next;
}

/* Gives the rows of the p-th patches' window, and which is the first of them. */
INLINE Shape shape_at(const Band *b, const Window *w, long p, const float **rows, long *first) {
    Shape s = {0, w->window[1], w->stride[1], w->dilation[1]};
    *first = 0;
    for (long u = 0; u < w->window[0]; u++) {
        long h = p * w->stride[0] - w->padding[0] + u * w->dilation[0];
        int is_there = h >= 0 && h < w->height;
        if (!is_there && has_any_rows(s.size)) continue;
        if (s.many == 0) *first = u;
        rows[s.many++] = is_there ? row_of(b, h) : b->zeros;
    }
    return s;
}

/* What becomes of a row of products and norms, `wide_of` channels apart; `own`: terms of a k for each filter. */
typedef void Answer(const float *product, const float *norms, float *out, const Window *w, const Elementwise *e,
                    const OwnTerms *own);

static void response_row(const float *product, const float *norms, float *out, const Window *w, const Elementwise *e,
                         const OwnTerms *own) {
    respond_to_rows(product, out, norms, e, own, wide_of(w->channels), w->out_width, 1);
}

/* Every row of patches of x, by packed filters: the `answer` to products and norms, or, without one, cosines by `length`. */
static int row_by_row(const float *x, float *out, const Window *w, const Elementwise *e, const float *packed,
                      const float *length, float eps, Answer *answer, const OwnTerms *own) {
    long channels = w->channels, wide = wide_of(channels), taps = w->window[0] * w->window[1];
    long line = w->width * channels, size = w->height * line, row = w->out_width * channels;
    int failed = 0;
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
            float *to = out + task * row;
            const float *from = x + task / w->out_height * size;
            next = hold_rows(&band, from, w, p, p == 0 ? 0 : next);
            Shape s = shape_at(&band, w, p, rows, &top);
            for (long c = 0; c < channels; c += BLOCK) {
                Along a = {.rows = rows, .length = length + c, .norms = norms + c, .first = c, .wide = wide,
                           .count = w->out_width, .apart = channels, .taken = channels - c, .eps = eps};
                a.ahead[0] = ahead_of(from + next * line, w->stride[0] * line, w->out_width, c, channels);
                a.ahead[1] = ahead_of(to, row, w->out_width, c, channels);
                a.to = answer == NULL ? to + c : product + c;
                const Block *filters = (const Block *)(packed + c * taps) + top * s.size;
                if (answer == NULL) cosines_of_row(&a, filters, &s);
                else products_of_row(&a, filters, &s);
            }
            if (answer != NULL) answer(product, norms, to, w, e, own);
        }
        free(room);
        free(rows);
    }
    return failed;
}

/* out = the response of each patch's angle to its filter, before any gain and bias; `given` has no lengths. */
static int depthwise(const Depthwise *d, const Window *w, const Elementwise *given, float eps) {
    long wide = wide_of(w->channels), taps = w->window[0] * w->window[1];
    float *terms = calloc(wide * (taps + 1) + BLOCK, sizeof(float)), *packed = on_line(terms);
    float *length = packed + wide * taps;
    Elementwise e = *given;
    if (terms == NULL) return 1;
    e.length = length;
    pack_filters(d, w, eps, packed, length, 0);
    OwnTerms own = forward_terms(&e, w->images * w->out_height * w->out_width);
    int failed = row_by_row(d->x, d->out, w, &e, packed, length, eps, e.operator == COSINE ? NULL : response_row, &own);
    free(own.edge);
    free(terms);
    return failed;
}

/* As Python calls it: the first two serve every call of a shape. */
int depthwise_at(const Window *w, const Elementwise *held, const float *x, const float *weight, const float *k, float *out,
                 float eps) {
    const Depthwise d = {.x = x, .weight = weight, .out = out};
    Elementwise e = *held;
    float *terms;
    if (!put_softness(&e, k, &terms)) return 1;
    int failed = depthwise(&d, w, &e, eps);
    free(terms);
    return failed;
}
