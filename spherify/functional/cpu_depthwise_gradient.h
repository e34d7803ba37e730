/* The gradient of depthwise layers on channels-last maps, as compiled graphs call it: norms and what has the size of the
   output are computed again, row by row, and a row of the input is done when all patches that hold its pixels are.
   As cpu_kernels.c says. */

/* sums[u, v] += the gradients by the products of a row, each times the pixel at (u, v) of its patch. */
INLINE void weigh(const float *const *rows, const float *by_product, Block *sums, long first, long wide, long count,
                  const Ahead *ahead, const Shape s, const int is_fixed) {
    Block own[MOST_HELD_FILTERS];
    long q = 0;
    if (!is_fixed) {
        for (long u = 0; u < s.many; u++) {
            for (long v = 0; v < s.size; v++) {
                const float *from = rows[u] + first + v * s.gap * wide;
                Block total = sums[u * s.size + v];
                for (q = 0; q < count; q++) total += block_at(by_product + q * wide) * block_at(from + q * s.step * wide);
                sums[u * s.size + v] = total;
            }
        }
        return;
    }
#pragma GCC unroll 9
    for (long i = 0; i < s.many * s.size; i++) own[i] = sums[i];
    for (; q + 4 <= count; q += 4) {
        fetch(ahead, q, 4, 0);
        fetch(ahead + 1, q, 4, 0);
        const float *by = by_product + q * wide;
        Block gradient[4] = {block_at(by), block_at(by + wide), block_at(by + 2 * wide), block_at(by + 3 * wide)};
#pragma GCC unroll 3
        for (long u = 0; u < s.many; u++) {
            const float *from = rows[u] + first + q * s.step * wide;
#pragma GCC unroll 16
            for (long j = 0; j < 3 * s.step + s.size; j++) {
                Block one = block_at(from + j * wide);
#pragma GCC unroll 4
                for (long t = 0; t < 4; t++)
                    if (j >= t * s.step && j < t * s.step + s.size) own[u * s.size + j - t * s.step] += one * gradient[t];
            }
        }
    }
    for (; q < count; q++) {
        Block gradient = block_at(by_product + q * wide);
#pragma GCC unroll 3
        for (long u = 0; u < s.many; u++) {
#pragma GCC unroll 7
            for (long v = 0; v < s.size; v++)
                own[u * s.size + v] += gradient * block_at(rows[u] + first + (q * s.step + v) * wide);
        }
    }
#pragma GCC unroll 9
    for (long i = 0; i < s.many * s.size; i++) sums[i] = own[i];
}

static void weigh_row(const float *const *rows, const float *by_product, Block *sums, long first, long wide, long count,
                      const Ahead *ahead, const Shape *s) {
#define WEIGH(MANY, SIZE, STEP) \
    weigh(rows + u, by_product, sums + u * s->size, first, wide, count, ahead, (Shape){MANY, SIZE, STEP, 1}, 1)
    long u = 0;
    if (is_shape(s, 3, 3, 1)) WEIGH(3, 3, 1);
    else if (is_shape(s, 3, 3, 2)) WEIGH(3, 3, 2);
    else if (is_shape(s, s->many, 5, 1)) for (; u < s->many; u++) WEIGH(1, 5, 1);
    else if (is_shape(s, s->many, 5, 2)) for (; u < s->many; u++) WEIGH(1, 5, 2);
    else if (is_shape(s, s->many, 7, 1)) for (; u < s->many; u++) WEIGH(1, 7, 1);
    else weigh(rows, by_product, sums, first, wide, count, ahead, *s, 0);
#undef WEIGH
}

/* Of the window's places along one axis those that can hold pixels with this remainder by the stride: the first that is
   met by rising patches, how many, from one to the next, and how many patches lie between. */
typedef struct { long last, many, apart, gap; } Holders;

static Holders holders_of(const Window *w, int axis, long pixel) {
    long step = w->stride[axis], gap = w->dilation[axis], place = pixel + w->padding[axis];
    Holders found = {0, 0, 1, 1};
    for (long u = w->window[axis] - 1; u >= 0; u--) {
        if ((place - u * gap) % step) continue;
        if (found.many == 0) found.last = u;
        else if (found.many == 1) found.apart = found.last - u;
        found.many++;
    }
    found.gap = found.apart * gap / step;
    return found;
}

/* Rows of what the patches get, as many as hold one pixel, with room for those that are not there beside them. */
INLINE Band band_of_output(const Window *w) {
    long reach = (w->window[1] - 1) * w->dilation[1] - w->padding[1], step = w->stride[1];
    long left = reach > 0 ? (reach + step - 1) / step : 0, last = (w->width - 1 + w->padding[1]) / step + 1;
    long rows = (w->window[0] - 1) * w->dilation[0] / w->stride[0] + 1, columns = last > w->out_width ? last : w->out_width;
    return (Band){NULL, NULL, rows, left + columns, left, wide_of(w->channels)};
}

/* A row of the input's gradient. `rows` has room for twice the window's. */
static void spread_row(const Band *products, const Band *map, const float *x, float *by_x, const Block *turned,
                       Block *weight, const float **rows, const Window *w, long h) {
    Holders down = holders_of(w, 0, h);
    const float **others = rows + w->window[0];
    const int is_plain = w->stride[0] == 1 && w->stride[1] == 1 && has_any_rows(w->window[1]);
    long many = 0, top = 0, taps = w->window[0] * w->window[1];
    for (long a = 0; a < down.many; a++) {
        long p = (h + w->padding[0] - (down.last - a * down.apart) * w->dilation[0]) / w->stride[0];
        int is_there = p >= 0 && p < w->out_height;
        if (!is_there && is_plain) continue;
        if (many == 0) top = a;
        rows[many] = is_there ? row_of(products, p) : products->zeros;
        others[many++] = is_there ? row_of(map, p) : products->zeros;
    }
    for (long column = 0; column < w->stride[1] && column < w->width; column++) {
        Holders over = holders_of(w, 1, column);
        long step = w->stride[1], first = (column + w->padding[1] - over.last * w->dilation[1]) / step + products->left;
        Shape s = {many, over.many, 1, over.gap};
        for (long c = 0; c < w->channels; c += BLOCK) {
            const Block *from = turned + c / BLOCK * taps, *filters = from + top * w->window[1];
            if (!is_plain) filters = weight;
            for (long a = 0; a < down.many && !is_plain; a++)
                for (long b = 0; b < over.many; b++)
                    weight[a * over.many + b] =
                        from[taps - 1 - (down.last - a * down.apart) * w->window[1] - over.last + b * over.apart];
            long place = (h * w->width + column) * w->channels + c, count = (w->width - column + step - 1) / step;
            Along a = {.rows = rows, .others = others, .x = x + place, .to = by_x + place, .wide = map->wide,
                       .first = first * map->wide + c, .count = count, .apart = step * w->channels,
                       .taken = w->channels - c};
            const float *below = by_x + ((h + 1) * w->width + column * count) * w->channels;
            a.ahead[1] = ahead_of(below, count * w->channels, count, c, w->channels);
            gradient_of_row(&a, filters, &s);
        }
    }
}

/* The gradient by the filters from its sums (threads, C / 16, U V, 16), less what it has along each filter. */
static void finish_filters(const Depthwise *d, const Window *w, const double *totals, const float *length) {
    long taps = w->window[0] * w->window[1], all = wide_of(w->channels) * taps;
    for (long c = 0; c < w->channels; c++) {
        const double *from = totals + c / BLOCK * BLOCK * taps + c % BLOCK;
        const float *weight = d->weight + c * taps;
        float *to = d->by_weight + c * taps;
        double along = 0.0;
        for (long i = 0; i < taps; i++) {
            double total = 0.0;
            for (int t = 0; t < w->threads; t++) total += from[t * all + i * BLOCK];
            to[i] = (float)total;
            along += total * weight[i];
        }
        float factor = (float)(along * length[c] * length[c]);
        for (long i = 0; i < taps; i++) to[i] -= weight[i] * factor;
    }
}

typedef struct { /* of one thread */
    Band band, products, map; /* of the input; gradients by products; sums along the patches, times their norms squared */
    const float **rows; /* three times the window's */
    Block *weight; /* of the taps that hold a pixel */
    float *weighed, *part, *room;
} Bench;

static int set_up(Bench *b, const Window *w) {
    long taps = w->window[0] * w->window[1], wide = wide_of(w->channels);
    *b = (Bench){.band = band_of_input(w), .products = band_of_output(w), .map = band_of_output(w)};
    long inputs = numbers_of(&b->band), outputs = numbers_of(&b->map);
    long edge = (b->band.columns > b->map.columns ? b->band.columns : b->map.columns) * wide;
    b->rows = malloc(3 * w->window[0] * sizeof(float *));
    b->room = calloc(inputs + 2 * outputs + edge + (wide + BLOCK) * taps + 2 * w->channels + BLOCK, sizeof(float));
    b->weight = (Block *)on_line(b->room);
    b->weighed = (float *)(b->weight + taps);
    b->band.zeros = b->products.zeros = b->weighed + wide * taps;
    b->band.numbers = b->weighed + wide * taps + edge;
    b->products.numbers = b->band.numbers + inputs;
    b->map.numbers = b->products.numbers + outputs;
    b->part = b->map.numbers + outputs;
    return b->rows == NULL || b->room == NULL;
}

static void backward_image(const Depthwise *d, const Window *w, const Elementwise *e, const Near *near,
                           const OwnTerms *own, Bench *b, const float *packed, long n, float eps) {
    long channels = w->channels, wide = b->map.wide, row = w->width * channels, taps = w->window[0] * w->window[1];
    const float *x = d->x + n * w->height * row;
    float *by_x = d->by_x + n * w->height * row;
    for (long p = 0, h = 0, next = 0, top; p < w->out_height; p++) {
        float *norms = row_of(&b->map, p) + b->map.left * wide, *product = row_of(&b->products, p) + b->map.left * wide;
        long place = (n * w->out_height + p) * w->out_width * channels;
        next = hold_rows(&b->band, x, w, p, next);
        Shape s = shape_at(&b->band, w, p, b->rows, &top);
        for (long c = 0; c < channels; c += BLOCK) {
            Along a = {.rows = b->rows, .gradient = d->gradient + place + c, .saved = d->saved + place + c,
                       .length = e->length + c, .to = product + c, .norms = norms + c, .first = c, .wide = wide,
                       .count = w->out_width, .apart = channels, .taken = channels - c, .eps = eps};
            a.ahead[0] = ahead_of(x + next * row, w->stride[0] * row, w->out_width, c, channels);
            if (e->operator == COSINE) by_cosines_of_row(&a, NULL, &s);
            else norms_of_row(&a, NULL, &s);
        }
        if (e->operator != COSINE)
            respond_backward_rows(d->gradient + place, d->saved + place, norms, product, norms, d->sums ? b->part : NULL, e,
                                  near, own, wide, w->out_width, 1);
        place += w->out_width * channels; /* the next row's */
        for (long c = 0; c < channels; c += BLOCK) {
            long outputs = w->out_width * channels;
            Ahead ahead[2] = {ahead_of(d->gradient + place, outputs, w->out_width, c, channels),
                              ahead_of(d->saved + place, outputs, w->out_width, c, channels)};
            Block *sums = (Block *)(b->weighed + c * taps) + top * s.size;
            weigh_row(b->rows, product + c, sums, c, wide, w->out_width, ahead, &s);
        }
        for (; h < w->height && (h + w->padding[0] < (p + 1) * w->stride[0] || p == w->out_height - 1) && d->by_x; h++) {
            spread_row(&b->products, &b->map, x, by_x, (const Block *)packed, b->weight, b->rows + w->window[0], w, h);
        }
    }
}

/* The gradients by filters and, where it is wanted, input; `given` has no lengths. */
static int depthwise_backward(const Depthwise *d, const Window *w, const Elementwise *given, float eps) {
    long channels = w->channels, wide = wide_of(channels), all = wide * w->window[0] * w->window[1];
    double *totals = calloc((all + 2 * channels) * w->threads, sizeof(double)), *sums = totals + all * w->threads;
    float *terms = calloc(all + 4 * channels + BLOCK, sizeof(float)), *packed = on_line(terms), *length = packed + all;
    Near near = {length + channels, length + 2 * channels, length + 3 * channels};
    Elementwise response = *given, *e = &response;
    int failed = 0;
    if (totals == NULL || terms == NULL) {
        free(terms);
        free(totals);
        return 1;
    }
    e->length = length;
    pack_filters(d, w, eps, packed, length, 1);
    near_of(&near, e, e->operator);
    OwnTerms own = backward_terms(e, w->images * w->out_height * w->out_width);
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        Bench b;
        failed |= set_up(&b, w);
#pragma omp for schedule(static)
        for (long n = 0; n < w->images; n++) {
            if (failed) continue;
            memset(b.weighed, 0, all * sizeof(float));
            memset(b.part, 0, 2 * channels * sizeof(float));
            backward_image(d, w, e, &near, &own, &b, packed, n, eps);
            double *own = totals + omp_get_thread_num() * all, *own_sums = sums + omp_get_thread_num() * 2 * channels;
            for (long i = 0; i < all; i++) own[i] += b.weighed[i];
            for (long i = 0; i < 2 * channels; i++) own_sums[i] += b.part[i];
        }
        free(b.room);
        free(b.rows);
    }
    free(own.back);
    finish_filters(d, w, totals, length);
    if (d->sums) add_up(sums, 2 * channels, w->threads, d->sums);
    free(terms);
    free(totals);
    return failed;
}

/* As depthwise_at. */
int depthwise_backward_at(const Window *w, const Elementwise *held, const float *x, const float *weight, const float *k,
                          const float *gradient, const float *saved, float *by_x, float *by_weight, float *sums, float eps) {
    const Depthwise d = {.x = x, .weight = weight, .gradient = gradient, .saved = saved, .by_x = by_x,
                         .by_weight = by_weight, .sums = k ? sums : NULL};
    Elementwise e = *held;
    float *terms;
    if (!put_softness(&e, k, &terms)) return 1;
    int failed = depthwise_backward(&d, w, &e, eps);
    free(terms);
    return failed;
}
