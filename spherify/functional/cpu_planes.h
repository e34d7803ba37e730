/* Depthwise layers with 3x3 windows and padding 1 on planes: patch norms and their gradient. As cpu_kernels.c says. */

#ifdef __AVX512F__
/* Which of sixteen pixels have these neighbours. */
typedef struct { __mmask16 above, below, left, right; } Neighbours;

/* Of maps that lie one behind the other. */
static Neighbours *neighbours_of(long vectors, long height, long width) {
    Neighbours *all = malloc(vectors * sizeof(Neighbours));
    if (all == NULL) return NULL;
    int pixels = (int)(height * width), columns[16], places[16];
    for (int i = 0; i < 16; i++) columns[i] = i % (int)width, places[i] = i % pixels;
    const __m512i wide = _mm512_set1_epi32((int)width), whole = _mm512_set1_epi32(pixels);
    const __m512i last = _mm512_set1_epi32((int)width - 1), bottom = _mm512_set1_epi32(pixels - (int)width);
    const __m512i column_step = _mm512_set1_epi32(16 % (int)width), place_step = _mm512_set1_epi32(16 % pixels);
    __m512i column = _mm512_loadu_si512(columns), place = _mm512_loadu_si512(places);
    for (long v = 0; v < vectors; v++) {
        all[v].above = _mm512_cmpge_epi32_mask(place, wide);
        all[v].below = _mm512_cmplt_epi32_mask(place, bottom);
        all[v].left = _mm512_test_epi32_mask(column, column);
        all[v].right = _mm512_cmpneq_epi32_mask(column, last);
        column = _mm512_add_epi32(column, column_step);
        column = _mm512_mask_sub_epi32(column, _mm512_cmpge_epi32_mask(column, wide), column, wide);
        place = _mm512_add_epi32(place, place_step);
        place = _mm512_mask_sub_epi32(place, _mm512_cmpge_epi32_mask(place, whole), place, whole);
    }
    return all;
}

/* Each number and those beside it. */
INLINE __m512 three_of_row(const float *columns, const Neighbours *n, __mmask16 taken) {
    __m512 left = _mm512_maskz_loadu_ps(n->left & taken, columns - 1);
    __m512 right = _mm512_maskz_loadu_ps(n->right & taken, columns + 1);
    return _mm512_add_ps(_mm512_load_ps(columns), _mm512_add_ps(left, right));
}

/* Sums of squares over a map's columns of three, then over rows of three of these; `columns` is aligned. */
INLINE void three_by_three(const float *from, float *out, float *columns, const Neighbours *has, long count, long width,
                           float eps, float scale) {
    for (long s = 0; s < count; s += 16) {
        const Neighbours *n = has + s / 16;
        __mmask16 taken = first_of(count - s);
        __m512 own = _mm512_maskz_loadu_ps(taken, from + s);
        __m512 above = _mm512_maskz_loadu_ps(n->above & taken, from + s - width);
        __m512 below = _mm512_maskz_loadu_ps(n->below & taken, from + s + width);
        _mm512_store_ps(columns + s, _mm512_fmadd_ps(own, own, _mm512_fmadd_ps(above, above, _mm512_mul_ps(below, below))));
    }
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 e = three_of_row(columns + s, has + s / 16, taken);
        _mm512_mask_storeu_ps(out + s, taken, inverse_root(_mm512_add_ps(e, _mm512_set1_ps(eps)), scale));
    }
}

/* Depthwise, 3x3, stride 1, padding 1, on planes: as many maps at once as make long loops, which run over rows and maps. */
static int three_by_three_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    long pixels = w->height * w->width, maps = w->images * w->groups, together = pixels < TILE ? TILE / pixels : 1;
    if (together > maps) together = maps;
    long size = together * pixels, vectors = (size + 15) / 16, tasks = (maps + together - 1) / together;
    Neighbours *has = neighbours_of(vectors, w->height, w->width);
    int failed = 0;
    if (has == NULL) return 1;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *columns = aligned_alloc(64, vectors * 64);
        failed |= columns == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            long count = maps - task * together < together ? (maps - task * together) * pixels : size;
            three_by_three(x + task * size, inverse + task * size, columns, has, count, w->width, eps, scale);
        }
        free(columns);
    }
    free(has);
    return failed;
}
#else
/* Which neighbours a pixel has. */
enum { ABOVE = 1, BELOW = 2, LEFT = 4, RIGHT = 8 };

/* Depthwise, 3x3, stride 1, padding 1, on planes: as many maps at once as make long loops, which run over rows and
   maps; what lies beyond a pixel's map is left out by its flags. */
static int three_by_three_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    long height = w->height, width = w->width, pixels = height * width, maps = w->images * w->groups;
    long together = pixels < CHUNK ? CHUNK / pixels : 1;
    if (together > maps) together = maps;
    long tasks = (maps + together - 1) / together;
    unsigned char *flags = malloc(together * pixels);
    if (flags == NULL) return 1;
    for (long h = 0; h < height; h++)
        for (long c = 0; c < width; c++)
            flags[h * width + c] = (h > 0) * ABOVE | (h < height - 1) * BELOW | (c > 0) * LEFT | (c < width - 1) * RIGHT;
    for (long map = 1; map < together; map++) memcpy(flags + map * pixels, flags, pixels);
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        long size = together * pixels;
        float *room = calloc(2 * size + 2 * width + 2, sizeof(float)); /* beyond both ends of each there are zeros */
        float *squares = room + width, *columns = room + size + 2 * width + 1;
        failed |= room == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (room == NULL) continue;
            const float *from = x + task * size;
            long count = maps - task * together < together ? (maps - task * together) * pixels : size;
#pragma omp simd
            for (long s = 0; s < count; s++) squares[s] = from[s] * from[s];
#pragma omp simd
            for (long s = 0; s < count; s++) {
                float above = squares[s - width], below = squares[s + width];
                columns[s] = squares[s] + (flags[s] & ABOVE ? above : 0.0f) + (flags[s] & BELOW ? below : 0.0f);
            }
            float *out = inverse + task * size;
#pragma omp simd
            for (long s = 0; s < count; s++) {
                float left = columns[s - 1], right = columns[s + 1];
                out[s] = columns[s] + (flags[s] & LEFT ? left : 0.0f) + (flags[s] & RIGHT ? right : 0.0f);
            }
            inverse_roots(out, out, count, eps, scale);
        }
        free(room);
    }
    free(flags);
    return failed;
}
#endif

/* to[c] = a[c]^2 + b[c]^2 + d[c]^2; `d` may be NULL. Rows are often shorter than a vector. */
INLINE void add_three_squares(const float *a, const float *b, const float *d, float *restrict to, long width) {
#ifdef __AVX512F__
    for (long c = 0; c < width; c += 16) {
        __mmask16 taken = first_of(width - c), third = d == NULL ? 0 : taken;
        __m512 x = _mm512_maskz_loadu_ps(taken, a + c), y = _mm512_maskz_loadu_ps(taken, b + c);
        __m512 z = _mm512_maskz_loadu_ps(third, d + c);
        _mm512_mask_storeu_ps(to + c, taken, _mm512_fmadd_ps(x, x, _mm512_fmadd_ps(y, y, _mm512_mul_ps(z, z))));
    }
#else
#pragma omp simd
    for (long c = 0; c < width; c++) to[c] = a[c] * a[c] + b[c] * b[c];
    if (d == NULL) return;
#pragma omp simd
    for (long c = 0; c < width; c++) to[c] += d[c] * d[c];
#endif
}

/* Depthwise, 3x3, stride 2, padding 1, on planes of even height and width: an output row takes two rows of its own and
   the one above, an output column likewise, so that both loops run on from one map to the next. */
static int halving_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    long width = w->width, out_width = width / 2, out_height = w->height / 2, out_size = out_height * out_width;
    long maps = w->images * w->groups, together = out_size < CHUNK ? CHUNK / out_size : 1;
    long tasks = (maps + together - 1) / together;
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *room = calloc(2 * together * out_size + 1, sizeof(float)), *columns = room + 1;
        failed |= room == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (room == NULL) continue;
            long count = maps - task * together < together ? maps - task * together : together;
            const float *from = x + task * together * 4 * out_size;
            float *out = inverse + task * together * out_size;
            for (long row = 0; row < count * out_height; row++) {
                const float *own = from + 2 * row * width, *above = row % out_height ? own - width : NULL;
                add_three_squares(own, own + width, above, columns + row * width, width);
            }
#pragma omp simd
            for (long s = 0; s < count * out_size; s++)
                out[s] = (columns[2 * s] + columns[2 * s + 1]) + columns[2 * s - 1];
            for (long s = 0; s < count * out_size; s += out_width) out[s] = columns[2 * s] + columns[2 * s + 1];
            inverse_roots(out, out, count * out_size, eps, scale);
        }
        free(room);
    }
    return failed;
}

/* Depthwise with 3x3 windows and padding 1 on planes, of this stride. */
static int is_three_by_three(const Window *w, long stride) {
    int is_it = w->groups == w->channels && w->groups > 1 && !w->channels_last;
    for (int axis = 0; axis < 2; axis++)
        is_it = is_it && w->window[axis] == 3 && w->stride[axis] == stride && w->padding[axis] == 1 && w->dilation[axis] == 1;
    return is_it;
}

#ifdef __AVX512F__
/* by_x -= x times the sum of along inverse^2 over the patches that hold the pixel; `map` and `columns` are aligned. */
INLINE void subtract_three_by_three(float *by_x, const float *x, const float *along, const float *inverse, float *map,
                                    float *columns, const Neighbours *has, long count, long width) {
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 i = _mm512_maskz_loadu_ps(taken, inverse + s), a = _mm512_maskz_loadu_ps(taken, along + s);
        _mm512_store_ps(map + s, _mm512_mul_ps(a, _mm512_mul_ps(i, i)));
    }
    for (long s = 0; s < count; s += 16) {
        const Neighbours *n = has + s / 16;
        __mmask16 taken = first_of(count - s);
        __m512 above = _mm512_maskz_loadu_ps(n->above & taken, map + s - width);
        __m512 below = _mm512_maskz_loadu_ps(n->below & taken, map + s + width);
        _mm512_store_ps(columns + s, _mm512_add_ps(_mm512_load_ps(map + s), _mm512_add_ps(above, below)));
    }
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 spread = three_of_row(columns + s, has + s / 16, taken);
        __m512 found = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(taken, x + s), spread, _mm512_maskz_loadu_ps(taken, by_x + s));
        _mm512_mask_storeu_ps(by_x + s, taken, found);
    }
}

/* As subtract_along; the loops are those of three_by_three_inverse_norm. */
static int three_by_three_subtract_along(float *by_x, const float *x, const float *along, const float *inverse,
                                         const Window *w) {
    long pixels = w->height * w->width, maps = w->images * w->groups, together = pixels < TILE ? TILE / pixels : 1;
    if (together > maps) together = maps;
    long size = together * pixels, vectors = (size + 15) / 16, tasks = (maps + together - 1) / together;
    Neighbours *has = neighbours_of(vectors, w->height, w->width);
    int failed = 0;
    if (has == NULL) return 1;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = aligned_alloc(64, 2 * vectors * 64), *columns = map + vectors * 16;
        failed |= map == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            long count = maps - task * together < together ? (maps - task * together) * pixels : size, s = task * size;
            subtract_three_by_three(by_x + s, x + s, along + s, inverse + s, map, columns, has, count, w->width);
        }
        free(map);
    }
    free(has);
    return failed;
}

/* Of sixteen patches in a row: which there are, which have one to their right; and of the pixels below them, which there are. */
typedef struct { __mmask16 own, right, first, second; } Sixteen;

INLINE __mmask16 some_of(long count) { return count > 0 ? first_of(count) : 0; }

static Sixteen *sixteens_of(long width, long out_width) {
    Sixteen *all = malloc((out_width + 15) / 16 * sizeof(Sixteen));
    for (long q = 0; all != NULL && q < out_width; q += 16)
        all[q / 16] = (Sixteen){first_of(out_width - q), some_of(out_width - q - 1), some_of(width - 2 * q),
                                some_of(width - 2 * q - 16)};
    return all;
}

INLINE void subtract_some(float *by_x, const float *x, __m512 spread, __mmask16 taken) {
    __m512 found = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(taken, x), spread, _mm512_maskz_loadu_ps(taken, by_x));
    _mm512_mask_storeu_ps(by_x, taken, found);
}

/* A row of pixels whose patches are those of one or two rows of the map: every other pixel lies in two of these. */
INLINE void subtract_halved_row(float *by_x, const float *x, const float *map, const float *next, const Sixteen *has,
                                long out_width) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (long q = 0; q < out_width; q += 16, has++) {
        __m512 own = _mm512_maskz_loadu_ps(has->own, map + q), right = _mm512_maskz_loadu_ps(has->right, map + q + 1);
        if (next != NULL) {
            own = _mm512_add_ps(own, _mm512_maskz_loadu_ps(has->own, next + q));
            right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(has->right, next + q + 1));
        }
        __m512 both = _mm512_add_ps(own, right);
        subtract_some(by_x + 2 * q, x + 2 * q, _mm512_permutex2var_ps(own, low, both), has->first);
        if (has->second)
            subtract_some(by_x + 2 * q + 16, x + 2 * q + 16, _mm512_permutex2var_ps(own, high, both), has->second);
    }
}

/* As subtract_along, for stride 2, row by row: pixel h lies in the patches h / 2 and, if it is odd, the next. */
INLINE void subtract_halved_map(float *by_x, const float *x, const float *map, const Sixteen *has, const Window *w) {
    long height = w->height, width = w->width, out_width = w->out_width;
    for (long h = 0; h < height; h++) {
        const float *own = map + h / 2 * out_width, *next = h % 2 && h < height - 1 ? own + out_width : NULL;
        subtract_halved_row(by_x + h * width, x + h * width, own, next, has, out_width);
    }
}

/* Of sixteen pixels: their patches from the `first` on, and which lie in the next one besides, that below, and both. */
typedef struct { __m512i patch; long first; __mmask16 right, below, diagonal; } Halved;

/* Of the maps that fill whole vectors, whose rows are so short that sixteen patches are enough. */
static Halved *halved_of(long vectors, const Window *w) {
    Halved *all = aligned_alloc(64, vectors * sizeof(Halved));
    long height = w->height, width = w->width, out_width = w->out_width, out_size = w->out_height * out_width;
    for (long v = 0, h = 0, c = 0, map = 0; all != NULL && v < vectors; v++) {
        int patches[16] __attribute__((aligned(64)));
        Halved some = {.first = map + h / 2 * out_width + c / 2};
        for (int i = 0; i < 16; i++) {
            int is_right = c % 2 && c < width - 1, is_below = h % 2 && h < height - 1;
            long patch = map + h / 2 * out_width + c / 2;
            patches[i] = (int)patch;
            some.first = patch < some.first ? patch : some.first;
            some.right |= (__mmask16)(is_right << i);
            some.below |= (__mmask16)(is_below << i);
            some.diagonal |= (__mmask16)((is_right & is_below) << i);
            if (++c == width) c = 0, h++;
            if (h == height) h = 0, map += out_size;
        }
        some.patch = _mm512_sub_epi32(_mm512_load_si512(patches), _mm512_set1_epi32((int)some.first));
        all[v] = some;
    }
    return all;
}

INLINE void subtract_halved_maps(float *by_x, const float *x, const float *map, const Halved *has, long vectors,
                                 long out_width, long count) {
    for (long v = 0; v < vectors && v * 16 < count; v++) {
        Halved n = has[v];
        const float *from = map + n.first;
        __m512 own = _mm512_permutexvar_ps(n.patch, _mm512_loadu_ps(from));
        __m512 right = _mm512_maskz_permutexvar_ps(n.right, n.patch, _mm512_loadu_ps(from + 1));
        __m512 below = _mm512_maskz_permutexvar_ps(n.below, n.patch, _mm512_loadu_ps(from + out_width));
        __m512 diagonal = _mm512_maskz_permutexvar_ps(n.diagonal, n.patch, _mm512_loadu_ps(from + out_width + 1));
        __m512 spread = _mm512_add_ps(_mm512_add_ps(own, right), _mm512_add_ps(below, diagonal));
        subtract_some(by_x + v * 16, x + v * 16, spread, first_of(count - v * 16));
    }
}

/* As subtract_along, for stride 2. */
static int halving_subtract_along(float *by_x, const float *x, const float *along, const float *inverse, const Window *w) {
    long pixels = w->height * w->width, out_size = w->out_height * w->out_width, maps = w->images * w->groups;
    long alike = pixels % 16 == 0 ? 1 : pixels % 8 == 0 ? 2 : pixels % 4 == 0 ? 4 : pixels % 2 == 0 ? 8 : 16;
    int is_small = w->width <= 32 && alike * pixels <= 2 * TILE;
    long together = !is_small ? 1 : alike * pixels < TILE ? TILE / (alike * pixels) * alike : alike;
    long vectors = alike * pixels / 16, tasks = (maps + together - 1) / together;
    Sixteen *rows = is_small ? NULL : sixteens_of(w->width, w->out_width);
    Halved *has = is_small ? halved_of(vectors, w) : NULL;
    int failed = has == NULL && rows == NULL;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = malloc((together * out_size + w->out_width + 32) * sizeof(float));
        failed |= map == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            long start = task * together, count = maps - start < together ? maps - start : together;
            const float *a = along + start * out_size, *i = inverse + start * out_size, *from = x + start * pixels;
            float *to = by_x + start * pixels;
#pragma omp simd
            for (long s = 0; s < count * out_size; s++) map[s] = a[s] * (i[s] * i[s]);
            if (!is_small) subtract_halved_map(to, from, map, rows, w);
            for (long m = 0; m < count && is_small; m += alike)
                subtract_halved_maps(to + m * pixels, from + m * pixels, map + m * out_size, has, vectors, w->out_width,
                                     (count - m) * pixels);
        }
        free(map);
    }
    free(rows);
    free(has);
    return failed;
}
#endif
