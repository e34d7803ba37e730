/* Depthwise layers on channels-last maps as compiled graphs call them: norms and what needs them row by row, so that they
   stay in the cache and are never written out. As cpu_kernels.c says. */

#include "cpu_rows.h"

typedef struct {
    const float *x, *product; /* the product of the convolution; in the backward pass NULL */
    const float *gradient, *saved; /* by the response, and the response; in the forward pass NULL */
    float *out, *by_x; /* the response; or the gradient by the product, and that by the input through the norms */
    float *sums; /* (2, C): of the gradient with the response, and for k; NULL where they are not wanted */
} Depthwise;

/* 1 / |patch| of a row of patches, of any number of channels. */
INLINE void norms_of_few(const float *x, float *columns, float *norms, const Window *w, long p, float eps) {
    rows_of_sums(x, columns, norms, w, p, w->height, w->width, w->out_width, w->padding, w->stride, 1);
    inverse_roots(norms, norms, w->out_width * w->channels, eps, 1.0f);
}

/* Sixteen channels at one position. The last block of a row of channels may overlap the one before it. */
enum { BLOCK = 16 };
typedef float Block __attribute__((vector_size(BLOCK * sizeof(float)), aligned(sizeof(float)), may_alias));

INLINE Block block_at(const float *from) { return *(const Block *)from; }

INLINE Block inverse_root_of_block(Block energy, float eps) {
#ifdef __AVX512F__
    return (Block)inverse_root((__m512)(energy + eps), 1.0f);
#else
    for (int i = 0; i < BLOCK; i++) energy[i] = 1.0f / sqrtf(energy[i] + eps);
    return energy;
#endif
}

/* to[i step] = the sum of `many` rows, `apart` from each other, at the i-th position of `count`. */
INLINE void down(const float *from, const long many, long apart, long channels, long count, Block *to, long step,
                 const int squares) {
    for (long i = 0; i < count; i++, from += channels, to += step) {
        Block total = {0};
        for (long u = 0; u < many; u++) {
            Block one = block_at(from + u * apart);
            if (squares) total += one * one;
            else total += one;
        }
        *to = total;
    }
}

INLINE void down_rows(const float *from, long many, long apart, long channels, long count, Block *to, long step,
                      const int squares) {
    if (many == 3) down(from, 3, apart, channels, count, to, step, squares);
    else if (many == 7) down(from, 7, apart, channels, count, to, step, squares);
    else down(from, many, apart, channels, count, to, step, squares);
}

INLINE Block total_of(const Block *from, const long size, const long gap) {
    Block total = from[0];
    for (long v = 1; v < size; v++) total += from[v * gap];
    return total;
}

INLINE void norms_along(const Block *columns, const long size, const long gap, long step, float *norms, long channels,
                        long count, float eps) {
    for (long q = 0; q < count; q++)
        *(Block *)(norms + q * channels) = inverse_root_of_block(total_of(columns + q * step, size, gap), eps);
}

/* Blocks of channels go down a map column by column; what they will read or write is asked for in its own order. */
INLINE void fetch(const float *from, long count, const int is_written) {
    for (long i = 0; i < count; i += BLOCK) {
        if (is_written) __builtin_prefetch(from + i, 1);
        else __builtin_prefetch(from + i, 0);
    }
}

/* The rows of the input that the next row of patches will be the first to read. */
INLINE void fetch_ahead(const float *x, const Window *w, long p) {
    long row = w->width * w->channels, first = p * w->stride[0] - w->padding[0] + (w->window[0] - 1) * w->dilation[0] + 1;
    long last = first + w->stride[0] < w->height ? first + w->stride[0] : w->height;
    if (first < last) fetch(x + first * row, (last - first) * row, 0);
}

INLINE long entries_of(const Window *w) {
    long needed = (w->out_width - 1) * w->stride[1] + (w->window[1] - 1) * w->dilation[1] + 1;
    return needed > w->padding[1] + w->width ? needed : w->padding[1] + w->width;
}

/* As norms_of_few, from sixteen channels on: rows of the window are added up for each column, zeros stand beside the map. */
INLINE void norms_of_row(const float *x, Block *columns, float *norms, const Window *w, long p, float eps) {
    long channels = w->channels, row = w->width * channels, h, size = w->window[1], gap = w->dilation[1], step = w->stride[1];
    long many = places(p * w->stride[0] - w->padding[0], w->window[0], w->dilation[0], w->height, &h);
    for (long next = 0; next < channels; next += BLOCK) {
        long c = next + BLOCK > channels ? channels - BLOCK : next;
        float *to = norms + c;
        down_rows(x + h * row + c, many, w->dilation[0] * row, channels, w->width, columns + w->padding[1], 1, 1);
        if (size == 3 && gap == 1) norms_along(columns, 3, 1, step, to, channels, w->out_width, eps);
        else if (size == 7 && gap == 1) norms_along(columns, 7, 1, step, to, channels, w->out_width, eps);
        else norms_along(columns, size, gap, step, to, channels, w->out_width, eps);
    }
}

/* out = response to product inverse length, before any gain and bias. */
int depthwise_respond(const Depthwise *d, const Window *w, const Elementwise *e, float eps) {
    long channels = w->channels, row = w->out_width * channels, size = w->height * w->width * channels;
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *columns = malloc((w->width + w->out_width) * channels * sizeof(float)), *norms = columns + w->width * channels;
        Block *padded = calloc(entries_of(w), sizeof(Block));
        failed |= columns == NULL || padded == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < w->images * w->out_height; task++) {
            if (columns == NULL || padded == NULL) continue;
            const float *x = d->x + task / w->out_height * size, *product = d->product + task * row;
            float *out = d->out + task * row;
            if (channels < BLOCK) norms_of_few(x, columns, norms, w, task % w->out_height, eps);
            else {
                fetch_ahead(x, w, task % w->out_height);
                norms_of_row(x, padded, norms, w, task % w->out_height, eps);
            }
            for (long first = 0; first < row; first += channels) {
                if (e->operator == COSINE) respond_to_row(product + first, out + first, norms + first, e, COSINE, 1);
                else if (e->operator == LINEAR) respond_to_row(product + first, out + first, norms + first, e, LINEAR, 1);
                else respond_to_row(product + first, out + first, norms + first, e, SIGMOID, 1);
            }
        }
        free(padded);
        free(columns);
    }
    return failed;
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

/* A row of by_x: -x times the sum of the map's numbers of all patches that hold the pixel; of any number of channels. */
INLINE void minus_few(const float *x, const float *map, float *columns, float *spread, float *restrict by_x,
                      const Window *w, long h) {
    long channels = w->channels, row = w->width * channels, out_row = w->out_width * channels, first, apart;
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

INLINE void minus_total(const Block *columns, const long size, const long gap, const float *x, float *by_x, long channels,
                        long count) {
    for (long column = 0; column < count; column++)
        *(Block *)(by_x + column * channels) = -block_at(x + column * channels) * total_of(columns + column, size, gap);
}

/* As minus_few, from sixteen channels on. Patches stand in `columns` where their last pixel is, zeros between them. */
INLINE void minus_row(const float *x, const float *map, Block *columns, float *by_x, const Window *w, long h) {
    long channels = w->channels, row = w->width * channels, out_row = w->out_width * channels, first, apart;
    long size = w->window[1], gap = w->dilation[1], step = w->stride[1], place = (size - 1) * gap - w->padding[1];
    long many = holders(h, w, 0, w->out_height, &first, &apart), left = place < 0 ? (-place + step - 1) / step : 0;
    long right = (w->width + w->padding[1] + step - 1) / step;
    if (right > w->out_width) right = w->out_width;
    for (long next = 0; next < channels; next += BLOCK) {
        long c = next + BLOCK > channels ? channels - BLOCK : next;
        const float *numbers = map + first * out_row + left * channels + c, *from = x + h * row + c;
        float *to = by_x + h * row + c;
        down_rows(numbers, many, apart * out_row, channels, right - left, columns + place + left * step, step, 0);
        if (size == 3 && gap == 1) minus_total(columns, 3, 1, from, to, channels, w->width);
        else if (size == 7 && gap == 1) minus_total(columns, 7, 1, from, to, channels, w->width);
        else minus_total(columns, size, gap, from, to, channels, w->width);
    }
}

/* The gradients by the product and, through the norms, by the input. A row of the input is done as soon as all patches
   that hold its pixels are, while it is in the cache. */
int depthwise_backward(const Depthwise *d, const Window *w, const Elementwise *e, float eps) {
    long channels = w->channels, row = w->out_width * channels, out_size = w->out_height * row;
    long size = w->height * w->width * channels, wide = (w->width > w->out_width ? w->width : w->out_width) * channels;
    double *totals = calloc(2 * channels * w->threads, sizeof(double));
    float *terms = malloc(3 * channels * sizeof(float));
    Near near = {terms, terms + channels, terms + 2 * channels};
    int failed = totals == NULL || terms == NULL;
    if (!failed) near_of(&near, e, e->operator);
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = malloc((out_size + 2 * wide + 2 * channels) * sizeof(float));
        float *columns = map + out_size, *spread = columns + wide, *part = spread + wide;
        Block *padded = calloc(entries_of(w) + w->width + (w->window[1] - 1) * w->dilation[1], sizeof(Block));
        Block *apart = padded + entries_of(w);
        failed |= map == NULL || padded == NULL;
#pragma omp for schedule(static)
        for (long n = 0; n < w->images; n++) {
            if (failed || totals == NULL || terms == NULL) continue;
            const float *x = d->x + n * size;
            float *by_x = d->by_x + n * size;
            memset(part, 0, 2 * channels * sizeof(float));
            for (long p = 0, h = 0; p < w->out_height; p++) {
                if (channels < BLOCK) norms_of_few(x, columns, map + p * row, w, p, eps);
                else {
                    fetch_ahead(x, w, p);
                    norms_of_row(x, padded, map + p * row, w, p, eps);
                }
                for (long first = p * row; first < (p + 1) * row; first += channels) {
                    const float *gradient = d->gradient + n * out_size + first, *saved = d->saved + n * out_size + first;
                    float *to = d->out + n * out_size + first;
                    respond_backward_row_of(gradient, saved, map + first, to, d->sums ? part : NULL, e, &near, 1);
                }
                for (; h < w->height && (h + w->padding[0] < (p + 1) * w->stride[0] || p == w->out_height - 1); h++) {
                    if (channels < BLOCK) minus_few(x, map, columns, spread, by_x, w, h);
                    else {
                        fetch(by_x + h * w->width * channels, w->width * channels, 1);
                        minus_row(x, map, apart, by_x, w, h);
                    }
                }
            }
            double *sums = totals + omp_get_thread_num() * 2 * channels;
            for (long i = 0; i < 2 * channels; i++) sums[i] += part[i];
        }
        free(padded);
        free(map);
    }
    if (!failed && d->sums) add_up(totals, 2 * channels, w->threads, d->sums);
    free(terms);
    free(totals);
    return failed;
}
