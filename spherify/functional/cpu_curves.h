/* Responses of folded layers: asin and what follows it as one polynomial near 0 and one far from it, fitted for the
   layer's k by curves.py. As cpu_kernels.c says. */

enum { NEAR_TERMS = 7, FAR_TERMS = 9 };
static const float CURVE_EDGE = 0.7f;

/* One filter's, or each filter's: `apart` numbers from one term to the next. */
typedef struct { const float *near, *far; long apart; } Curve;

INLINE float polynomial(float x, const float *terms, long apart, long o, const int count) {
    float sum = terms[(count - 1) * apart + o];
    for (int t = count - 2; t >= 0; t--) sum = sum * x + terms[t * apart + o];
    return sum;
}

/* For |c| <= CURVE_EDGE, and NaN. */
INLINE float near_on(Curve curve, long o, float c) { return c * polynomial(c * c, curve.near, curve.apart, o, NEAR_TERMS); }

/* For every cosine; beyond the edge by the root of (1 - |c|) / 2, the sine of half the angle. */
INLINE float far_on(Curve curve, long o, float c) {
    float size = least(1.0f, fabsf(c));
    float near = size * polynomial(size * size, curve.near, curve.apart, o, NEAR_TERMS);
    float far = polynomial(sqrtf(0.5f - 0.5f * size), curve.far, curve.apart, o, FAR_TERMS);
    return copysignf(size > CURVE_EDGE ? far : near, c);
}

/* One filter over some positions, in place. */
static void curve_run(float *restrict out, const float *inverse, long count, Curve curve, float gain, float bias,
                      float low, float high) {
    for (long first = 0; first < count; first += RUN) {
        float *part = out + first, largest = 0.0f;
        long some = count - first < RUN ? count - first : RUN;
#pragma omp simd reduction(max : largest)
        for (long s = 0; s < some; s++) {
            part[s] *= inverse[first + s];
            largest = most(fabsf(part[s]), largest);
        }
        if (largest <= CURVE_EDGE) {
#pragma omp simd
            for (long s = 0; s < some; s++) part[s] = finish(near_on(curve, 0, part[s]), gain, bias, low, high);
        } else {
#pragma omp simd
            for (long s = 0; s < some; s++) part[s] = finish(far_on(curve, 0, part[s]), gain, bias, low, high);
        }
    }
}

/* Numbers with gains and biases of their own; with norms and curves of their own, or all with the first. */
INLINE void curve_row(float *restrict out, const float *inverse, long count, Curve curve, const float *gain,
                      const float *bias, float low, float high, const int own_norms, const int own_curves) {
    for (long first = 0; first < count; first += RUN) {
        long last = count - first < RUN ? count : first + RUN;
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (long o = first; o < last; o++) {
            out[o] *= inverse[own_norms ? o : 0];
            largest = most(fabsf(out[o]), largest);
        }
        if (largest <= CURVE_EDGE) {
#pragma omp simd
            for (long o = first; o < last; o++)
                out[o] = finish(near_on(curve, own_curves ? o : 0, out[o]), gain[o], bias[o], low, high);
        } else {
#pragma omp simd
            for (long o = first; o < last; o++)
                out[o] = finish(far_on(curve, own_curves ? o : 0, out[o]), gain[o], bias[o], low, high);
        }
    }
}
