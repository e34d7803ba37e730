/* The elementwise part of SphereConv on the CPU, in float32, each in one pass over its tensors.

   Compiled on first use and called by cpu_kernels.py. A tensor (N, O, S) lies either with its positions innermost
   ("planes": strides O S, S, 1) or with its filters innermost ("rows": linear layers and channels-last maps, with
   one group or depthwise, strides S O, 1, O). Loops over the innermost dimension are written for the compiler to vectorise; no
   -ffast-math, so that a NaN stays one. Sums over many numbers end in double. One loop is written for AVX-512 besides. */

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define INLINE static inline __attribute__((always_inline))
enum { COSINE, LINEAR, SIGMOID };
enum { TILE = 2048, ROWS_A_SUM = 64, RUN = 128, FEW = 64, CHUNK = 1024 };
static const float HALF_PI = 1.57079632679489662f, TWO_OVER_PI = 0.63661977236758134f;

INLINE float least(float a, float b) { return a < b ? a : b; } /* b if it is NaN */
INLINE float most(float a, float b) { return a > b ? a : b; }
INLINE float within(float x, float guard) { return most(-guard, least(guard, x)); }
INLINE float with_sign(float size, float x) { return x < 0.0f ? -size : size; }

/* For |x| <= NEAR; Cephes' polynomial. */
static const float NEAR = 0.5f;
INLINE float asin_near(float x) {
    float z = x * x;
    float p = (((4.2163199048e-2f * z + 2.4181311049e-2f) * z + 4.5470025998e-2f) * z + 7.4953002686e-2f) * z
              + 1.6666752422e-1f;
    return x + x * z * p;
}

/* Relative error 2e-7. */
INLINE float asin_of(float x) {
    float size = fabsf(x);
    int is_large = size > NEAR;
    float root = is_large ? sqrtf(0.5f * (1.0f - size)) : size;
    float found = asin_near(root);
    return with_sign(is_large ? HALF_PI - 2.0f * found : found, x);
}

/* sin on [-pi/2, pi/2]: Taylor's polynomial, whose first term left out is 7e-10. */
INLINE float sin_of(float x) {
    float z = x * x;
    float p = ((((1.6059043837e-10f * z - 2.5052108385e-8f) * z + 2.7557319224e-6f) * z - 1.9841269841e-4f) * z
               + 8.3333333333e-3f) * z - 1.6666666667e-1f;
    return x + x * z * p;
}

/* log x for finite x >= 1; Cephes. */
INLINE float log_of(float x) {
    union { float value; int bits; } u = {x};
    int shifted = u.bits - 0x3f3504f3; /* sqrt(1/2) */
    float e = (float)(shifted >> 23);
    u.bits = (shifted & 0x007fffff) + 0x3f3504f3;
    float m = u.value - 1.0f, z = m * m;
    float p = ((((((((7.0376836292e-2f * m - 1.1514610310e-1f) * m + 1.1676998740e-1f) * m - 1.2420140846e-1f) * m
                  + 1.4249322787e-1f) * m - 1.6668057665e-1f) * m + 2.0000714765e-1f) * m - 2.4999993993e-1f) * m
               + 3.3333331174e-1f) * m * z;
    return m + (p - 2.12194440e-4f * e - 0.5f * z) + 0.693359375f * e;
}

/* For |x| <= NEAR_TANH, fitted there: the greatest relative error of the polynomial is 2e-8. */
static const float NEAR_TANH = 0.9f;
INLINE float tanh_near(float x) {
    float z = x * x;
    float p = ((((1.3039542439e-3f * z - 6.8600425168e-3f) * z + 2.0904114399e-2f) * z - 5.3721485140e-2f) * z
               + 1.3330359892e-1f) * z - 3.3333212176e-1f;
    return x + x * z * p;
}

/* By e^-2x - 1, which keeps its relative precision near 0; near 1, where a gradient is taken from what the answer
   lacks of it, as 1 less something. Cephes' polynomial for e^r. */
INLINE float tanh_of(float x) {
    float y = -2.0f * least(40.0f, fabsf(x)), whole = rintf(y * 1.44269504088896341f);
    float r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
               + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    union { int bits; float value; } power = {((int)whole + 127) << 23};
    float less = (p * r * r + r) * power.value + (power.value - 1.0f);
    int is_large = less < -0.5f;
    float ratio = (is_large ? 2.0f * (1.0f + less) : -less) / (2.0f + less);
    return with_sign(is_large ? 1.0f - ratio : ratio, x);
}

/* For |x| < 1. */
INLINE float atanh_of(float x) {
    float size = fabsf(x), z = size * size;
    float p = (((((7.6923077e-2f * z + 9.0909091e-2f) * z + 1.1111111e-1f) * z + 1.4285714e-1f) * z + 0.2f) * z
               + 3.3333333e-1f) * z;
    float far = 0.5f * log_of((1.0f + size) / (1.0f - size));
    return with_sign(size < 0.3f ? size + size * p : far, x);
}

/* The response to a cosine; `steep` is 1 / 2k and `rise` 1 / tanh(pi / 4k), of the linear response 2 / pi. `is_near`:
   the cosine is known to be one that `is_far` denies, for which the short polynomials do. */
INLINE float respond(float cosine, int operator, float guard, float steep, float rise, const int is_near) {
    float c = is_near ? cosine : within(cosine, guard);
    float angle = operator == COSINE ? 0.0f : is_near ? asin_near(c) : asin_of(c);
    if (operator == LINEAR) return angle * rise;
    if (operator == SIGMOID) return (is_near ? tanh_near(angle * steep) : tanh_of(angle * steep)) * rise;
    return c;
}

/* A NaN is far. For |c| <= 1/2 the angle is at most 1.0472 |c|. */
INLINE int is_far(float cosine, int operator, float steep) {
    float least_far = operator == SIGMOID ? most(1.0f / NEAR, steep * (1.0472f / NEAR_TANH)) : 1.0f / NEAR;
    return !(fabsf(cosine) * least_far <= 1.0f);
}

typedef struct { float slope, cosine, rise, angle; } Slope;

/* From the response back to its cosine, and the gradient times the slope there. */
INLINE Slope slope_at(float answer, float gradient, int operator, float guard, float step, float steep, float end) {
    Slope found = {gradient, answer, 0.0f, 0.0f};
    float angle;
    if (operator == COSINE) return found;
    if (operator == LINEAR) {
        angle = answer * HALF_PI;
        found.slope = gradient * TWO_OVER_PI;
    } else {
        float t = answer * end;
        found.rise = (1.0f - t * t) * gradient;
        found.angle = atanh_of(within(t, guard));
        angle = found.angle / steep;
        found.slope = found.rise * (steep / end);
    }
    found.cosine = sin_of(within(angle, HALF_PI));
    found.slope /= sqrtf(most(step, 1.0f - found.cosine * found.cosine));
    return found;
}

INLINE float at(const float *values, long o, float otherwise) { return values ? values[o] : otherwise; }

/* ---- norms ---- */

typedef struct {
    long images, channels, groups, height, width, out_height, out_width; /* height 1 for one dimension */
    long window[2], stride[2], padding[2], dilation[2];
    int channels_last, threads;
} Window;

/* out[s] = scale / sqrt(energy[s] + eps). A square root and a division take the time of a dozen other operations. */
INLINE void inverse_roots(const float *energy, float *out, long count, float eps, float scale) {
#ifdef __AVX512F__
    const __m512 half = _mm512_set1_ps(-0.5f), more = _mm512_set1_ps(1.5f), scales = _mm512_set1_ps(scale);
    for (long s = 0; s < count; s += 16) {
        __mmask16 taken = count - s < 16 ? (__mmask16)((1u << (count - s)) - 1) : (__mmask16)0xffff;
        __m512 e = _mm512_add_ps(_mm512_maskz_loadu_ps(taken, energy + s), _mm512_set1_ps(eps));
        __mmask16 is_finite = _mm512_cmp_ps_mask(e, _mm512_set1_ps(FLT_MAX), _CMP_NGT_UQ); /* or NaN */
        __m512 y = _mm512_rsqrt14_ps(e);
        y = _mm512_mul_ps(y, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(e, y), y), half, more)); /* Newton's step */
        _mm512_mask_storeu_ps(out + s, taken, _mm512_maskz_mul_ps(is_finite, y, scales));
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
        float part = 0.0f;
        long count = channels - first < 512 ? channels - first : 512;
#pragma omp simd reduction(+ : part)
        for (long c = 0; c < count; c++) part += x[first + c] * x[first + c];
        total += part;
    }
    return (float)total;
}

/* inverse[row] = scale / sqrt(|x[row]|^2 + eps). */
void inverse_lengths(const float *x, float *inverse, long rows, long channels, float eps, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++)
        inverse[row] = scale / sqrtf(squares_of_row(x + row * channels, channels) + eps);
}

/* out[row] = x[row] scale / sqrt(|x[row]|^2 + eps). */
void normalised_rows(const float *x, float *out, long rows, long channels, float eps, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * channels;
        float *to = out + row * channels, factor = scale / sqrtf(squares_of_row(from, channels) + eps);
#pragma omp simd
        for (long c = 0; c < channels; c++) to[c] = from[c] * factor;
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

static int is_three_by_three(const Window *w) {
    int is_it = w->groups == w->channels && w->groups > 1 && !w->channels_last;
    for (int axis = 0; axis < 2; axis++)
        is_it = is_it && w->window[axis] == 3 && w->stride[axis] == 1 && w->padding[axis] == 1 && w->dilation[axis] == 1;
    return is_it;
}

/* inverse[n, g, p, q] = scale / sqrt(sum over the patch of x^2 + eps). */
int patch_inverse_norm(const float *x, float *inverse, const Window *w, float eps, float scale) {
    if (w->channels_last && w->groups > 1) return depthwise_inverse_norm(x, inverse, w, eps, scale);
    if (is_three_by_three(w)) return three_by_three_inverse_norm(x, inverse, w, eps, scale);
    long pixels = w->height * w->width, positions = w->out_height * w->out_width;
    long channels = w->channels / w->groups, tasks = w->images * w->groups;
    long wide = w->width + 2 * w->padding[1], high = w->height + 2 * w->padding[0];
    int is_pointwise = w->window[0] * w->window[1] == 1 && w->padding[0] + w->padding[1] == 0
                       && w->stride[0] * w->stride[1] == 1;
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

/* ---- forward ---- */

typedef struct {
    const float *inverse, *length, *steep, *rise, *end, *gain, *bias; /* NULL where there is none */
    const float *offset, *unscale; /* what was saved less offset, times unscale, is the response; backward alone */
    long images, filters, positions, groups;
    float guard, step, low, high;
    int operator, channels_last, threads;
} Elementwise;

INLINE float finish(float response, float gain, float bias, float low, float high) {
    return least(high, most(low, response * gain + bias));
}

/* Numbers that hold their cosines already: one filter over some positions. */
INLINE void respond_run(float *restrict out, float *restrict kept, long count, const Elementwise *e, long o,
                        const int operator, const int keeps, const int is_near) {
    float steep = at(e->steep, o, 1.0f), rise = at(e->rise, o, 1.0f);
    float gain = at(e->gain, o, 1.0f), bias = at(e->bias, o, 0.0f);
    float guard = e->guard, low = e->low, high = e->high;
#pragma omp simd
    for (long s = 0; s < count; s++) {
        float r = respond(out[s], operator, guard, steep, rise, is_near);
        if (keeps) kept[s] = r;
        out[s] = finish(r, gain, bias, low, high);
    }
}

/* One filter over some positions. Most cosines are small, and runs of small ones are answered by less arithmetic. */
INLINE void forward_run(float *restrict out, float *restrict kept, const float *inverse, long count,
                        const Elementwise *e, long o, const int operator, const int keeps) {
    float length = at(e->length, o, 1.0f), steep = at(e->steep, o, 1.0f);
    if (operator == COSINE) {
        float gain = at(e->gain, o, 1.0f), bias = at(e->bias, o, 0.0f), guard = e->guard, low = e->low, high = e->high;
#pragma omp simd
        for (long s = 0; s < count; s++)
            out[s] = finish(within(out[s] * inverse[s] * length, guard), gain, bias, low, high);
        return;
    }
    for (long first = 0; first < count; first += RUN) {
        float *part = out + first, *also = keeps ? kept + first : NULL;
        const float *norms = inverse + first;
        long some = count - first < RUN ? count - first : RUN;
        int far = 0;
#pragma omp simd reduction(| : far)
        for (long s = 0; s < some; s++) {
            float c = part[s] * norms[s] * length;
            part[s] = c;
            far |= is_far(c, operator, steep);
        }
        if (far) respond_run(part, also, some, e, o, operator, keeps, 0);
        else respond_run(part, also, some, e, o, operator, keeps, 1);
    }
}

/* Numbers that hold their cosines already: some filters at one position, from the o-th on. */
INLINE void respond_row(float *restrict out, float *restrict kept, long count, const Elementwise *e, long o,
                        const int operator, const int keeps, const int is_full, const int is_near) {
    float guard = e->guard, low = e->low, high = e->high;
    const float *gain = e->gain + o, *bias = e->bias + o, *steep = e->steep + o, *rise = e->rise + o;
#pragma omp simd
    for (long f = 0; f < count; f++) {
        float r = respond(out[f], operator, guard, operator == SIGMOID ? steep[f] : 1.0f,
                          operator != COSINE && is_full ? rise[f] : 1.0f, is_near);
        if (keeps) kept[f] = r;
        out[f] = is_full ? finish(r, gain[f], bias[f], low, high) : finish(r, 1.0f, 0.0f, low, high);
    }
}

/* All filters at one position; depthwise: each filter has a norm of its own. */
INLINE void forward_row(float *restrict out, float *restrict kept, const float *inverse, const Elementwise *e,
                        const int operator, const int keeps, const int is_full, const int is_depthwise) {
    const float *length = e->length, *gain = e->gain, *bias = e->bias, *steep = e->steep;
    float guard = e->guard, low = e->low, high = e->high;
    if (operator == COSINE) {
#pragma omp simd
        for (long o = 0; o < e->filters; o++) {
            float c = within(out[o] * inverse[is_depthwise ? o : 0] * (is_full ? length[o] : 1.0f), guard);
            if (keeps) kept[o] = c;
            out[o] = is_full ? finish(c, gain[o], bias[o], low, high) : finish(c, 1.0f, 0.0f, low, high);
        }
        return;
    }
    for (long first = 0; first < e->filters; first += RUN) {
        float *part = out + first, *also = keeps ? kept + first : NULL;
        long some = e->filters - first < RUN ? e->filters - first : RUN;
        int far = 0;
#pragma omp simd reduction(| : far)
        for (long f = 0; f < some; f++) {
            long o = first + f;
            float c = part[f] * inverse[is_depthwise ? o : 0] * (is_full ? length[o] : 1.0f);
            part[f] = c;
            far |= is_far(c, operator, operator == SIGMOID ? steep[o] : 1.0f);
        }
        if (far) respond_row(part, also, some, e, first, operator, keeps, is_full, 0);
        else respond_row(part, also, some, e, first, operator, keeps, is_full, 1);
    }
}

INLINE void forward_row_of(float *out, float *kept, const float *inverse, const Elementwise *e, const int operator) {
    int is_full = e->length && e->gain && e->bias;
    if (e->groups > 1) {
        if (kept != NULL) forward_row(out, kept, inverse, e, operator, 1, 1, 1);
        else if (is_full) forward_row(out, kept, inverse, e, operator, 0, 1, 1);
        else forward_row(out, kept, inverse, e, operator, 0, 0, 1);
    } else if (kept != NULL) forward_row(out, kept, inverse, e, operator, 1, 1, 0);
    else if (is_full) forward_row(out, kept, inverse, e, operator, 0, 1, 0);
    else forward_row(out, kept, inverse, e, operator, 0, 0, 0);
}

static void forward_planes(float *product, float *kept, const Elementwise *e) {
    long filters = e->filters / e->groups, tiles = (e->positions + TILE - 1) / TILE;
    long tasks = e->images * e->groups * tiles;
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long task = 0; task < tasks; task++) {
        long outer = task / tiles, first = (task % tiles) * TILE, g = outer % e->groups;
        long count = e->positions - first < TILE ? e->positions - first : TILE;
        const float *inverse = e->inverse + outer * e->positions + first;
        for (long f = 0; f < filters; f++) {
            long o = g * filters + f, place = (outer * filters + f) * e->positions + first;
            float *out = product + place, *also = kept == NULL ? NULL : kept + place;
            if (e->operator == COSINE) forward_run(out, also, inverse, count, e, o, COSINE, 0);
            else if (e->operator == LINEAR && also == NULL) forward_run(out, also, inverse, count, e, o, LINEAR, 0);
            else if (e->operator == LINEAR) forward_run(out, also, inverse, count, e, o, LINEAR, 1);
            else if (also == NULL) forward_run(out, also, inverse, count, e, o, SIGMOID, 0);
            else forward_run(out, also, inverse, count, e, o, SIGMOID, 1);
        }
    }
}

typedef struct { float *numbers; long step; } Repeated; /* `step` 0: the same numbers serve every place */

/* values[o], `count` times each; where there are none, what stands for them as often as a chunk needs it. */
static Repeated repeated(const float *values, float otherwise, long filters, long count, long chunk) {
    long size = values ? filters * count : chunk;
    Repeated to = {malloc(size * sizeof(float)), values != NULL};
    for (long o = 0; to.numbers != NULL && o < size / count; o++)
        for (long s = 0; s < count; s++) to.numbers[o * count + s] = at(values, o, otherwise);
    return to;
}

/* Maps too small to fill a vector: many of them are one row, in which each number has its own norm, gain, bias.
   Returns 0 where there is no room for that. */
static int forward_small_planes(float *product, float *kept, const Elementwise *e) {
    int is_depthwise = e->groups > 1 && e->groups == e->filters;
    long outers = is_depthwise ? e->images : e->images * e->groups, count = e->positions;
    long size = (is_depthwise ? e->filters : e->filters / e->groups) * count;
    long chunk = size < CHUNK ? size : CHUNK / count * count;
    const float *given[] = {e->length, e->gain, e->bias, e->steep, e->rise};
    Repeated values[5];
    int has_room = 1;
    for (int i = 0; i < 5; i++) {
        values[i] = repeated(given[i], i == 2 ? 0.0f : 1.0f, e->filters, count, chunk);
        has_room = has_room && values[i].numbers != NULL;
    }
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long outer = 0; outer < outers; outer++) {
        if (!has_room) continue;
        float norms[CHUNK];
        const float *inverse = e->inverse + outer * (is_depthwise ? size : count);
        for (long first = 0; first < chunk && !is_depthwise; first += count)
            for (long s = 0; s < count; s++) norms[first + s] = inverse[s];
        for (long first = 0; first < size; first += chunk) {
            long place = outer * size + first, value = (is_depthwise ? 0 : outer % e->groups * size) + first;
            Elementwise part = *e;
            part.filters = size - first < chunk ? size - first : chunk;
            part.groups = part.filters; /* each number has its own norm */
            part.length = values[0].numbers + values[0].step * value;
            part.gain = values[1].numbers + values[1].step * value;
            part.bias = values[2].numbers + values[2].step * value;
            part.steep = values[3].numbers + values[3].step * value;
            part.rise = values[4].numbers + values[4].step * value;
            float *out = product + place, *also = kept == NULL ? NULL : kept + place;
            const float *own = is_depthwise ? inverse + first : norms;
            if (e->operator == COSINE) forward_row(out, also, own, &part, COSINE, 0, 1, 1);
            else if (e->operator == LINEAR && kept == NULL) forward_row(out, also, own, &part, LINEAR, 0, 1, 1);
            else if (e->operator == LINEAR) forward_row(out, also, own, &part, LINEAR, 1, 1, 1);
            else if (kept == NULL) forward_row(out, also, own, &part, SIGMOID, 0, 1, 1);
            else forward_row(out, also, own, &part, SIGMOID, 1, 1, 1);
        }
    }
    for (int i = 0; i < 5; i++) free(values[i].numbers);
    return has_room;
}

static void forward_rows(float *product, float *kept, const Elementwise *e) {
#pragma omp parallel for schedule(static) num_threads(e->threads) if (e->threads > 1)
    for (long row = 0; row < e->images * e->positions; row++) {
        float *out = product + row * e->filters, *also = kept == NULL ? NULL : kept + row * e->filters;
        const float *inverse = e->inverse + row * e->groups;
        if (e->operator == COSINE) forward_row_of(out, also, inverse, e, COSINE);
        else if (e->operator == LINEAR) forward_row_of(out, also, inverse, e, LINEAR);
        else forward_row_of(out, also, inverse, e, SIGMOID);
    }
}

/* product = g(product inverse length) gain + bias, clamped to [low, high]; `kept` takes the response before that.
   Nothing is kept for the cosine. Rows want all of length, gain and bias, or none of them and then nothing kept. */
void forward(float *product, float *kept, const Elementwise *e) {
    if (e->channels_last) forward_rows(product, kept, e);
    else if (e->positions >= FEW || e->images < 2 || !forward_small_planes(product, kept, e)) forward_planes(product, kept, e);
}

/* ---- backward ---- */

typedef struct {
    const float *gradient;
    const float *saved; /* the output; NULL where it is not needed */
    float *product, *along;
    float *sums; /* (4, O): of the gradient, with the response, for k, along the filter */
} Backward;

typedef struct { float total, with_answer, for_k, along; } Sums;

/* One filter over some positions. */
INLINE Sums backward_run(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, long count, const Elementwise *e, long o, const int operator) {
    float steep = at(e->steep, o, 1.0f), end = at(e->end, o, 1.0f), gain = at(e->gain, o, 1.0f);
    float offset = at(e->offset, o, 0.0f), unscale = at(e->unscale, o, 1.0f), guard = e->guard, step = e->step;
    float factor = at(e->length, o, 1.0f) * (operator == COSINE ? gain : 1.0f);
    float before = operator == COSINE ? 1.0f : gain;
    float total = 0.0f, with_answer = 0.0f, for_k = 0.0f, along_filter = 0.0f;
#pragma omp simd reduction(+ : total, with_answer, for_k, along_filter)
    for (long s = 0; s < count; s++) {
        float d = gradient[s], answer = (saved[s] - offset) * unscale;
        Slope at_s = slope_at(answer, d * before, operator, guard, step, steep, end);
        float a = at_s.cosine * at_s.slope;
        total += d;
        if (operator != COSINE) with_answer += d * answer;
        if (operator == SIGMOID) for_k += at_s.rise * at_s.angle;
        along_filter += a;
        along[s] += a;
        product[s] = at_s.slope * factor * inverse[s];
    }
    return (Sums){total, with_answer, for_k, along_filter};
}

static void backward_planes(const Backward *b, double *totals, const Elementwise *e) {
    long filters = e->filters / e->groups, tiles = (e->positions + TILE - 1) / TILE;
    long tasks = e->images * e->groups * tiles, all = e->filters;
#pragma omp parallel num_threads(e->threads) if (e->threads > 1)
    {
        double *sums = totals + omp_get_thread_num() * 4 * all;
#pragma omp for schedule(static)
        for (long task = 0; task < tasks; task++) {
            long outer = task / tiles, first = (task % tiles) * TILE, g = outer % e->groups;
            long count = e->positions - first < TILE ? e->positions - first : TILE;
            const float *inverse = e->inverse + outer * e->positions + first;
            float *along = b->along + outer * e->positions + first;
            memset(along, 0, count * sizeof(float));
            for (long f = 0; f < filters; f++) {
                long o = g * filters + f, place = (outer * filters + f) * e->positions + first;
                const float *gradient = b->gradient + place, *saved = b->saved + place;
                float *product = b->product + place;
                Sums found = e->operator == COSINE
                                 ? backward_run(gradient, saved, inverse, product, along, count, e, o, COSINE)
                             : e->operator == LINEAR
                                 ? backward_run(gradient, saved, inverse, product, along, count, e, o, LINEAR)
                                 : backward_run(gradient, saved, inverse, product, along, count, e, o, SIGMOID);
                sums[o] += found.total;
                sums[all + o] += found.with_answer;
                sums[2 * all + o] += found.for_k;
                sums[3 * all + o] += found.along;
            }
        }
    }
}

/* All filters at one position; sums over positions are added to `part`, (4, O). Returns what is along the patch. */
INLINE void backward_row(const float *gradient, const float *saved, const float *inverse, float *restrict product,
                         float *restrict along, float *restrict part, const Elementwise *e, const int operator,
                         const int has_saved, const int is_depthwise) {
    const float *length = e->length, *gains = e->gain, *steep = e->steep, *end = e->end;
    const float *offset = e->offset, *unscale = e->unscale;
    float *restrict total = part, *restrict with_answer = part + e->filters;
    float *restrict for_k = part + 2 * e->filters, *restrict along_filter = part + 3 * e->filters;
    float sum = 0.0f, guard = e->guard, step = e->step;
#pragma omp simd reduction(+ : sum)
    for (long o = 0; o < e->filters; o++) {
        float d = gradient[o], answer = has_saved ? (saved[o] - offset[o]) * unscale[o] : 0.0f;
        Slope at_o = slope_at(answer, operator == COSINE ? d : d * gains[o], operator, guard, step,
                              operator == SIGMOID ? steep[o] : 1.0f, operator == SIGMOID ? end[o] : 1.0f);
        total[o] += d;
        if (operator != COSINE) with_answer[o] += d * answer;
        if (operator == SIGMOID) for_k[o] += at_o.rise * at_o.angle;
        if (has_saved) {
            float a = at_o.cosine * at_o.slope;
            along_filter[o] += a;
            if (is_depthwise) along[o] = a;
            else sum += a;
        }
        product[o] = at_o.slope * length[o] * (operator == COSINE ? gains[o] : 1.0f) * inverse[is_depthwise ? o : 0];
    }
    if (has_saved && !is_depthwise) *along = sum;
}

INLINE void backward_row_of(const float *gradient, const float *saved, const float *inverse, float *product, float *along,
                            float *part, const Elementwise *e, const int operator) {
    if (e->groups > 1) backward_row(gradient, saved, inverse, product, along, part, e, operator, 1, 1);
    else backward_row(gradient, saved, inverse, product, along, part, e, operator, 1, 0);
}

static int backward_rows(const Backward *b, double *totals, const Elementwise *e) {
    long rows = e->images * e->positions, filters = e->filters, blocks = (rows + ROWS_A_SUM - 1) / ROWS_A_SUM;
    int failed = 0;
#pragma omp parallel num_threads(e->threads) if (e->threads > 1) reduction(| : failed)
    {
        double *sums = totals + omp_get_thread_num() * 4 * filters;
        float *part = malloc(4 * filters * sizeof(float));
        failed |= part == NULL;
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            if (part == NULL) continue;
            memset(part, 0, 4 * filters * sizeof(float));
            long last = (block + 1) * ROWS_A_SUM < rows ? (block + 1) * ROWS_A_SUM : rows;
            for (long row = block * ROWS_A_SUM; row < last; row++) {
                const float *gradient = b->gradient + row * filters;
                const float *saved = b->saved == NULL ? NULL : b->saved + row * filters;
                const float *inverse = e->inverse + row * e->groups;
                float *product = b->product + row * filters, *along = b->along + row * e->groups;
                if (saved == NULL) backward_row(gradient, saved, inverse, product, along, part, e, COSINE, 0, 0);
                else if (e->operator == COSINE) backward_row_of(gradient, saved, inverse, product, along, part, e, COSINE);
                else if (e->operator == LINEAR) backward_row_of(gradient, saved, inverse, product, along, part, e, LINEAR);
                else backward_row_of(gradient, saved, inverse, product, along, part, e, SIGMOID);
            }
            for (long i = 0; i < 4 * filters; i++) sums[i] += part[i];
        }
        free(part);
    }
    return failed;
}

/* What respond_backward of blocks.py finds. For the cosine, what was saved keeps its gain: unscale is 1. Rows want all
   of length, gain, offset and unscale. */
int backward(const Backward *b, const Elementwise *e) {
    double *totals = calloc(e->threads * 4 * e->filters, sizeof(double));
    if (totals == NULL) return 1;
    int failed = 0;
    if (e->channels_last) failed = backward_rows(b, totals, e);
    else backward_planes(b, totals, e);
    for (long i = 0; i < 4 * e->filters; i++) {
        double total = 0.0;
        for (long t = 0; t < e->threads; t++) total += totals[t * 4 * e->filters + i];
        b->sums[i] = (float)total;
    }
    free(totals);
    return failed;
}

/* by_filters -= weight length^2 along, filter by filter: what the gradient has along each filter is taken off. */
void subtract_along_filters(float *by_filters, const float *weight, const float *length, const float *along,
                            long filters, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < filters; o++) {
        float factor = length[o] * length[o] * along[o];
        float *to = by_filters + o * size;
        const float *from = weight + o * size;
#pragma omp simd
        for (long d = 0; d < size; d++) to[d] -= from[d] * factor;
    }
}

/* along[row] = <by[row], x[row]>, and by[row] -= x[row] along inverse^2: for linear layers with the cosine, whose
   gradient by input and weight tells what lies along them. */
void subtract_own(float *by, const float *x, const float *inverse, float *along, long rows, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        float *to = by + row * size;
        const float *from = x + row * size;
        double total = 0.0;
        for (long first = 0; first < size; first += 512) {
            float part = 0.0f;
            long count = size - first < 512 ? size - first : 512;
#pragma omp simd reduction(+ : part)
            for (long d = 0; d < count; d++) part += to[first + d] * from[first + d];
            total += part;
        }
        along[row] = (float)total;
        float factor = (float)total * inverse[row] * inverse[row];
#pragma omp simd
        for (long d = 0; d < size; d++) to[d] -= from[d] * factor;
    }
}
