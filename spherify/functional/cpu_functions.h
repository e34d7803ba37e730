/* Functions of one number in float32, written so that loops over them are vectorised. */

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
enum { COSINE, LINEAR, SIGMOID, CURVE };
enum { TILE = 2048, STRIP = 256, ROWS_A_SUM = 64, RUN = 128, FEW = 64, CHUNK = 1024 };
static const float HALF_PI = 1.57079632679489662f, TWO_OVER_PI = 0.63661977236758134f;

/* sums[i] = what the threads found, `count` numbers each. */
INLINE void add_up(const double *totals, long count, int threads, float *sums) {
    for (long i = 0; i < count; i++) {
        double total = 0.0;
        for (long t = 0; t < threads; t++) total += totals[t * count + i];
        sums[i] = (float)total;
    }
}

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

/* Within 3e-7: the ratio of polynomials of Eigen's vectors (generic_fast_erf), which is 1 beyond 4. NaN stays NaN. */
INLINE float erf_of(float x) {
    float c = most(-4.0f, least(4.0f, x)), z = c * c;
    float p = (((((-2.72614225801306e-10f * z + 2.77068142495902e-08f) * z - 2.10102402082508e-06f) * z
                 - 5.69250639462346e-05f) * z - 7.34990630326855e-04f) * z - 2.95459980854025e-03f) * z
              - 1.60960333262415e-02f;
    float q = (((-1.45660718464996e-05f * z - 2.13374055278905e-04f) * z - 1.68282697438203e-03f) * z
               - 7.37332916720468e-03f) * z - 1.42647390514189e-02f;
    return c * p / q;
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

/* For x >= 0, by e^2x - 1, to twelve digits: loops over it are vectorised, which those over the library's are not. */
INLINE double tanh_wide(double x) {
    double y = 2.0 * (x < 20.0 ? x : x > 20.0 ? 20.0 : x), whole = rint(y * 1.4426950408889634), sum = 1.0; /* NaN stays */
    double r = y - whole * 0.69314718055994531;
    for (int n = 12; n > 1; n--) sum = 1.0 + sum * r * (1.0 / n);
    union { long long bits; double value; } power = {((long long)whole + 1023) << 52};
    double less = sum * r * power.value + (power.value - 1.0);
    return less / (less + 2.0);
}

/* (3, count): 1 / 2k, the response's last factor and that factor's inverse. */
void softness_terms(const float *k, float *terms, long count) {
#pragma omp simd
    for (long o = 0; o < count; o++) {
        double end = tanh_wide(0.78539816339744831 / k[o]);
        terms[o] = 0.5f / k[o];
        terms[count + o] = (float)(1.0 / end);
        terms[2 * count + o] = (float)end;
    }
}
