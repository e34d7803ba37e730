/* Patch norms and their gradient; lengths of rows. As cpu_kernels.c says. */

typedef struct {
    long images, channels, groups, height, width, out_height, out_width; /* height 1 for one dimension */
    long window[2], stride[2], padding[2], dilation[2];
    int channels_last, threads;
} Window;

#ifdef __AVX512F__
/* scale / sqrt(e), 0 for an infinite e. A square root and a division take the time of a dozen other operations. */
INLINE __m512 inverse_root(__m512 e, float scale) {
    __mmask16 is_finite = _mm512_cmp_ps_mask(e, _mm512_set1_ps(FLT_MAX), _CMP_NGT_UQ); /* or NaN */
    return _mm512_maskz_mul_ps(is_finite, inverse_root_of(e), _mm512_set1_ps(scale));
}
#endif

/* out[s] = scale / sqrt(energy[s] + eps). */
INLINE void inverse_roots(const float *energy, float *out, long count, float eps, float scale) {
#ifdef __AVX512F__
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = first_of(count - s);
        __m512 e = _mm512_add_ps(_mm512_maskz_loadu_ps(taken, energy + s), _mm512_set1_ps(eps));
        _mm512_mask_storeu_ps(out + s, taken, inverse_root(e, scale));
    }
#else
#pragma omp simd
    for (long s = 0; s < count; s++) out[s] = scale / sqrtf(energy[s] + eps);
#endif
}

/* energy[s] += sum over channels of x^2, for `count` positions, eight channels at a time. */
INLINE void add_squares(const float *x, long channels, long stride, long count, float *restrict energy) {
    long c = 0;
    for (; c + 8 <= channels; c += 8) {
        const float *r = x + c * stride;
#pragma omp simd
        for (long s = 0; s < count; s++) {
            float a = r[s] * r[s] + r[s + stride] * r[s + stride];
            float b = r[s + 2 * stride] * r[s + 2 * stride] + r[s + 3 * stride] * r[s + 3 * stride];
            float d = r[s + 4 * stride] * r[s + 4 * stride] + r[s + 5 * stride] * r[s + 5 * stride];
            float e = r[s + 6 * stride] * r[s + 6 * stride] + r[s + 7 * stride] * r[s + 7 * stride];
            energy[s] += (a + b) + (d + e);
        }
    }
    for (; c < channels; c++) {
        const float *r = x + c * stride;
#pragma omp simd
        for (long s = 0; s < count; s++) energy[s] += r[s] * r[s];
    }
}

/* As add_squares, for maps too small to fill a vector: MAPS channels are taken as one, then added up. */
enum { MAPS = 16 };
INLINE void add_squares_of_few(const float *x, long channels, long count, float *restrict energy) {
    float wide[MAPS * FEW] = {0};
    long together = channels / MAPS;
    add_squares(x, together, MAPS * count, MAPS * count, wide);
    for (long m = 0; m < MAPS; m++)
        for (long s = 0; s < count; s++) energy[s] += wide[m * count + s];
    add_squares(x + together * MAPS * count, channels - together * MAPS, count, count, energy);
}

INLINE float squares_of_row(const float *x, long channels) {
    double total = 0.0;
    for (long first = 0; first < channels; first += 512) {
        long count = channels - first < 512 ? channels - first : 512;
        total += dot_of(x + first, x + first, count);
    }
    return (float)total;
}

/* inverse[row] = scale / sqrt(|x[row]|^2 + eps). */
void inverse_lengths(const float *x, float *inverse, long rows, long channels, float eps, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++)
        inverse[row] = scale / sqrtf(squares_of_row(x + row * channels, channels) + eps);
}

/* out = x scale / sqrt(|x|^2 + eps) at each position, or x times the numbers given; for windows of one pixel, one group. */
void normalise(const float *x, const float *inverse, float *out, const Window *w, float eps, float scale) {
    long pixels = w->height * w->width, channels = w->channels;
    if (w->channels_last) {
#pragma omp parallel for schedule(static) num_threads(w->threads) if (w->threads > 1)
        for (long row = 0; row < w->images * pixels; row++) {
            const float *from = x + row * channels;
            float *to = out + row * channels;
            float factor = inverse ? inverse[row] : scale / sqrtf(squares_of_row(from, channels) + eps);
#pragma omp simd
            for (long c = 0; c < channels; c++) to[c] = from[c] * factor;
        }
        return;
    }
    long tiles = (pixels + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) num_threads(w->threads) if (w->threads > 1)
    for (long task = 0; task < w->images * tiles; task++) {
        float factors[STRIP] = {0};
        long n = task / tiles, first = task % tiles * STRIP, count = pixels - first < STRIP ? pixels - first : STRIP;
        const float *from = x + n * channels * pixels + first;
        float *to = out + n * channels * pixels + first;
        if (inverse) memcpy(factors, inverse + n * pixels + first, count * sizeof(float));
        else {
            if (pixels < FEW) add_squares_of_few(from, channels, pixels, factors);
            else add_squares(from, channels, pixels, count, factors);
            inverse_roots(factors, factors, count, eps, scale);
        }
        for (long c = 0; c < channels; c++) {
#pragma omp simd
            for (long s = 0; s < count; s++) to[c * pixels + s] = from[c * pixels + s] * factors[s];
        }
    }
}

/* to[i] = sum of `size` numbers of `from`, `gap` apart, beginning at i step, for `count` i. */
INLINE void sums_of(const float *restrict from, float *restrict to, long count, const long size, const long gap,
                    const long step) {
#pragma omp simd
    for (long i = 0; i < count; i++) {
        float total = from[i * step];
        for (long u = 1; u < size; u++) total += from[i * step + u * gap];
        to[i] = total;
    }
}

static void window_sums(const float *from, float *to, long count, long size, long gap, long step) {
    if (size == 1 && step == 1) memcpy(to, from, count * sizeof(float));
    else if (size == 3 && step == 1) sums_of(from, to, count, 3, gap, 1);
    else if (size == 3 && step == 2) sums_of(from, to, count, 3, gap, 2);
    else if (size == 5 && step == 1) sums_of(from, to, count, 5, gap, 1);
    else if (size == 7 && step == 1) sums_of(from, to, count, 7, gap, 1);
    else {
        for (long i = 0; i < count; i++) to[i] = from[i * step];
        for (long u = 1; u < size; u++)
            for (long i = 0; i < count; i++) to[i] += from[i * step + u * gap];
    }
}

/* A padded map (wide x ...) to sums over windows, `out_height` x `out_width` of them, rows `wide` apart in `to`.
   `between` and `to` have room for out_height x wide numbers, and the map's last row for `wide` more behind it. */
INLINE void box_sums(const float *map, float *between, float *to, long wide, long out_height, long out_width,
                     const long *window, const long *step, const long *gap) {
    if (step[0] == 1)
        window_sums(map, between, out_height * wide, window[0], gap[0] * wide, 1);
    else
        for (long p = 0; p < out_height; p++)
            window_sums(map + p * step[0] * wide, between + p * wide, wide, window[0], gap[0] * wide, 1);
    if (step[1] == 1)
        window_sums(between, to, out_height * wide - (window[1] - 1) * gap[1], window[1], gap[1], 1);
    else
        for (long p = 0; p < out_height; p++)
            window_sums(between + p * wide, to + p * wide, out_width, window[1], gap[1], step[1]);
}

/* to[i] = sum over `many` rows, `apart` from each other, of from[i] (squares: of its square), for `count` i. */
INLINE void sum_rows(const float *from, long many, long apart, float *restrict to, long count, const int squares) {
#define TAKEN(u) (squares ? r[(u) * apart + i] * r[(u) * apart + i] : r[(u) * apart + i])
    if (many <= 0) memset(to, 0, count * sizeof(float));
    for (long u = 0; u < many;) {
        const float *r = from + u * apart;
        int is_first = u == 0;
        if (many - u >= 4) {
#pragma omp simd
            for (long i = 0; i < count; i++)
                to[i] = (is_first ? 0.0f : to[i]) + ((TAKEN(0) + TAKEN(1)) + (TAKEN(2) + TAKEN(3)));
            u += 4;
        } else if (many - u == 3) {
#pragma omp simd
            for (long i = 0; i < count; i++) to[i] = (is_first ? 0.0f : to[i]) + (TAKEN(0) + TAKEN(1) + TAKEN(2));
            u += 3;
        } else {
#pragma omp simd
            for (long i = 0; i < count; i++) to[i] = (is_first ? 0.0f : to[i]) + TAKEN(0);
            u += 1;
        }
    }
#undef TAKEN
}

/* Of a window that begins at `start` and takes every `gap`-th of `size` places: the first that it takes, and how many. */
INLINE long places(long start, long window, long gap, long size, long *first) {
    long before = start < 0 ? (-start + gap - 1) / gap : 0, all = size > start ? (size - start + gap - 1) / gap : 0;
    *first = start + before * gap;
    return (all < window ? all : window) - before;
}

/* Depthwise and channels-last: a row of pixels holds width x channels numbers. Of each output row, sums over the window's
   rows are taken first, then over its columns. `from` is x to be squared, or what is to be summed as it is. */
INLINE void rows_of_sums(const float *from, float *restrict columns, float *restrict to, const Window *w, long p,
                         long height, long width, long out_width, const long *padding, const long *step,
                         const int squares) {
    long channels = w->channels, row = width * channels, h, column;
    long many = places(p * step[0] - padding[0], w->window[0], w->dilation[0], height, &h);
    sum_rows(from + h * row, many, w->dilation[0] * row, columns, row, squares);
    for (long q = 0; q < out_width; q++) {
        many = places(q * step[1] - padding[1], w->window[1], w->dilation[1], width, &column);
        sum_rows(columns + column * channels, many, w->dilation[1] * channels, to + q * channels, channels, 0);
    }
}

/* As patch_inverse_norm, for depthwise layers on channels-last maps; inverse lies as the output does. */
static int depthwise_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    long pixels = w->height * w->width, row = w->out_width * w->channels;
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *columns = malloc(w->width * w->channels * sizeof(float));
        failed |= columns == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < w->images * w->out_height; task++) {
            if (columns == NULL) continue;
            long n = task / w->out_height, p = task % w->out_height;
            float *out = inverse + task * row;
            rows_of_sums(x + n * pixels * w->channels, columns, out, w, p, w->height, w->width, w->out_width, w->padding,
                         w->stride, 1);
            inverse_roots(out, out, row, eps, scale);
        }
        free(columns);
    }
    return failed;
}

/* spread[h, w, c] = sum of the map's numbers of all patches that hold the pixel; of any stride. */
INLINE void scatter(const float *map, float *restrict spread, const Window *w) {
    long channels = w->channels;
    memset(spread, 0, w->height * w->width * channels * sizeof(float));
    for (long p = 0; p < w->out_height; p++)
        for (long u = 0; u < w->window[0]; u++) {
            long h = p * w->stride[0] + u * w->dilation[0] - w->padding[0];
            if (h < 0 || h >= w->height) continue;
            for (long q = 0; q < w->out_width; q++)
                for (long v = 0; v < w->window[1]; v++) {
                    long column = q * w->stride[1] + v * w->dilation[1] - w->padding[1];
                    if (column < 0 || column >= w->width) continue;
                    const float *from = map + (p * w->out_width + q) * channels;
                    float *to = spread + (h * w->width + column) * channels;
#pragma omp simd
                    for (long c = 0; c < channels; c++) to[c] += from[c];
                }
        }
}

/* As subtract_along, for depthwise layers on channels-last maps. */
static int depthwise_subtract_along(float *by_x, const float *x, const float *along, const float *inverse,
                                    const Window *w) {
    long row = w->width * w->channels, out_row = w->out_width * w->channels, size = w->out_height * out_row;
    long one[2] = {1, 1}, padding[2];
    int is_dense = w->stride[0] == 1 && w->stride[1] == 1, failed = 0;
    for (int axis = 0; axis < 2; axis++) padding[axis] = (w->window[axis] - 1) * w->dilation[axis] - w->padding[axis];
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = malloc(size * sizeof(float)), *columns = malloc(out_row * sizeof(float));
        float *spread = malloc((is_dense ? 1 : w->height) * row * sizeof(float));
        failed |= map == NULL || columns == NULL || spread == NULL;
#pragma omp for schedule(static)
        for (long n = 0; n < w->images; n++) {
            if (map == NULL || columns == NULL || spread == NULL) continue;
            const float *a = along + n * size, *i = inverse + n * size;
#pragma omp simd
            for (long s = 0; s < size; s++) map[s] = a[s] * (i[s] * i[s]);
            if (!is_dense) scatter(map, spread, w);
            for (long h = 0; h < w->height; h++) {
                if (is_dense)
                    rows_of_sums(map, columns, spread, w, h, w->out_height, w->out_width, w->width, padding, one, 0);
                float *to = by_x + (n * w->height + h) * row;
                const float *from = x + (n * w->height + h) * row, *held = spread + (is_dense ? 0 : h * row);
#pragma omp simd
                for (long c = 0; c < row; c++) to[c] -= from[c] * held[c];
            }
        }
        free(map);
        free(columns);
        free(spread);
    }
    return failed;
}

#include "cpu_planes.h"

/* inverse[n, g, p, q] = scale / sqrt(sum over the patch of x^2 + eps). */
int patch_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    int is_pointwise = w->window[0] * w->window[1] == 1 && w->padding[0] + w->padding[1] == 0
                       && w->stride[0] * w->stride[1] == 1;
    if (w->channels_last && w->groups > 1) return depthwise_inverse_norm(x, inverse, w, eps, scale);
    if (w->channels_last && is_pointwise) {
        inverse_lengths(x, inverse, w->images * w->height * w->width, w->channels, eps, scale, w->threads);
        return 0;
    }
    if (is_three_by_three(w, 1)) return three_by_three_inverse_norm(x, inverse, w, eps, scale);
    if (is_three_by_three(w, 2) && w->height % 2 == 0 && w->width % 2 == 0)
        return halving_inverse_norm(x, inverse, w, eps, scale);
    long pixels = w->height * w->width, positions = w->out_height * w->out_width;
    long channels = w->channels / w->groups, tasks = w->images * w->groups;
    long wide = w->width + 2 * w->padding[1], high = w->height + 2 * w->padding[0];
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *energy = malloc(pixels * sizeof(float));
        float *map = calloc((high + 2 * w->out_height) * wide, sizeof(float));
        float *between = map + high * wide, *sums = between + w->out_height * wide;
        failed |= energy == NULL || map == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (energy == NULL || map == NULL) continue;
            long n = task / w->groups, g = task % w->groups;
            float *out = inverse + task * positions;
            if (channels == 1) {
                const float *plane = x + task * pixels;
                for (long h = 0; h < w->height; h++) {
                    float *to = is_pointwise ? energy + h * w->width : map + (h + w->padding[0]) * wide + w->padding[1];
                    const float *from = plane + h * w->width;
#pragma omp simd
                    for (long c = 0; c < w->width; c++) to[c] = from[c] * from[c];
                }
            } else if (w->channels_last) {
                for (long s = 0; s < pixels; s++)
                    energy[s] = squares_of_row(x + (n * pixels + s) * w->channels, channels);
            } else {
                memset(energy, 0, pixels * sizeof(float));
                const float *start = x + (n * w->channels + g * channels) * pixels;
                if (pixels < FEW) add_squares_of_few(start, channels, pixels, energy);
                for (long s = 0; s < pixels && pixels >= FEW; s += TILE)
                    add_squares(start + s, channels, pixels, pixels - s < TILE ? pixels - s : TILE, energy + s);
            }
            if (is_pointwise) {
                inverse_roots(energy, out, positions, eps, scale);
                continue;
            }
            for (long h = 0; h < w->height && channels > 1; h++)
                memcpy(map + (h + w->padding[0]) * wide + w->padding[1], energy + h * w->width,
                       w->width * sizeof(float));
            box_sums(map, between, sums, wide, w->out_height, w->out_width, w->window, w->stride, w->dilation);
            inverse_roots(sums, between, w->out_height * wide, eps, scale);
            for (long p = 0; p < w->out_height; p++)
                memcpy(out + p * w->out_width, between + p * wide, w->out_width * sizeof(float));
        }
        free(energy);
        free(map);
    }
    return failed;
}

/* by_x -= x a, where a spreads along inverse^2 of each patch over the patch's pixels: the sums over windows of a map
   in which each patch's number stands where its last pixel is. */
int subtract_along(float *by_x, const float *x, const float *along, const float *inverse, const Window *w) {
    if (w->channels_last && w->groups > 1) return depthwise_subtract_along(by_x, x, along, inverse, w);
#ifdef __AVX512F__
    if (is_three_by_three(w, 1)) return three_by_three_subtract_along(by_x, x, along, inverse, w);
    if (is_three_by_three(w, 2)) return halving_subtract_along(by_x, x, along, inverse, w);
#endif
    long pixels = w->height * w->width, positions = w->out_height * w->out_width;
    long channels = w->channels / w->groups, tasks = w->images * w->groups;
    long reach[2] = {(w->window[0] - 1) * w->dilation[0], (w->window[1] - 1) * w->dilation[1]}, one[2] = {1, 1};
    long wide = w->width + reach[1], high = w->height + reach[0];
    int failed = 0;
#pragma omp parallel num_threads(w->threads) if (w->threads > 1) reduction(| : failed)
    {
        float *map = calloc((high + 2 * w->height) * wide, sizeof(float)), *spread = malloc(pixels * sizeof(float));
        float *between = map + high * wide, *sums = between + w->height * wide;
        failed |= map == NULL || spread == NULL;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            if (map == NULL || spread == NULL) continue;
            for (long p = 0; p < w->out_height; p++) {
                long h = p * w->stride[0] + reach[0] - w->padding[0];
                if (h < 0 || h >= high) continue;
                for (long q = 0; q < w->out_width; q++) {
                    long column = q * w->stride[1] + reach[1] - w->padding[1], s = task * positions + p * w->out_width + q;
                    if (column >= 0 && column < wide) map[h * wide + column] = along[s] * (inverse[s] * inverse[s]);
                }
            }
            box_sums(map, between, sums, wide, w->height, w->width, w->window, one, w->dilation);
            for (long h = 0; h < w->height; h++)
                memcpy(spread + h * w->width, sums + h * wide, w->width * sizeof(float));
            if (w->channels_last) {
                for (long s = 0; s < pixels; s++) {
                    float *to = by_x + (task * pixels + s) * channels;
                    const float *from = x + (task * pixels + s) * channels;
#pragma omp simd
                    for (long c = 0; c < channels; c++) to[c] -= from[c] * spread[s];
                }
                continue;
            }
            for (long c = 0; c < channels; c++) {
                float *to = by_x + (task * channels + c) * pixels;
                const float *from = x + (task * channels + c) * pixels;
#pragma omp simd
                for (long s = 0; s < pixels; s++) to[s] -= from[s] * spread[s];
            }
        }
        free(map);
        free(spread);
    }
    return failed;
}
