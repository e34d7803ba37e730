/* Sums of many numbers, and the gradient of responses sixteen at a time (AVX-512): without a division or a square root, and
   with the sums in registers, which the compiler would add up lane by lane at the end of each run. As cpu_kernels.c says. */

#ifdef __AVX512F__
/* Of the last `count` numbers of a row those that are there: all, or fewer than a vector holds. */
INLINE __mmask16 first_of(long count) { return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff; }

INLINE __m512 lanes(float value) { return _mm512_set1_ps(value); }

/* value + x factor */
INLINE __m512 plus(__m512 x, __m512 factor, float value) { return _mm512_fmadd_ps(x, factor, lanes(value)); }

/* 1 / sqrt(x), by Newton's step: what is added is small, so that its rounding does no harm. */
INLINE __m512 inverse_root_of(__m512 x) {
    __m512 y = _mm512_rsqrt14_ps(x), lack = _mm512_fnmadd_ps(_mm512_mul_ps(x, y), y, lanes(1.0f));
    return _mm512_fmadd_ps(_mm512_mul_ps(y, lanes(0.5f)), lack, y);
}

/* Likewise 1 / x. */
INLINE __m512 reciprocal_of(__m512 x) {
    __m512 y = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, lanes(1.0f)), y);
}

INLINE __m512 within_lanes(__m512 x, float guard) {
    return _mm512_max_ps(lanes(-guard), _mm512_min_ps(lanes(guard), x)); /* a NaN stays one */
}

/* As atanh_of; the polynomial is fitted up to 0.65, with a relative error of 1.4e-8, so that most answers need no logarithm. */
INLINE __m512 atanh_lanes(__m512 x) {
    __m512 size = _mm512_abs_ps(x), z = _mm512_mul_ps(x, x), p = plus(lanes(4.0002463041e-1f), z, -2.2812180916e-1f);
    p = plus(plus(plus(p, z, 2.1572506715e-1f), z, 8.4588204809e-2f), z, 1.4578721615e-1f);
    p = plus(plus(p, z, 1.9984899490e-1f), z, 3.3333593971e-1f);
    __m512 near = _mm512_fmadd_ps(x, _mm512_mul_ps(p, z), x);
    __mmask16 is_far = _mm512_cmp_ps_mask(size, lanes(0.65f), _CMP_GT_OQ);
    if (!is_far) return near;
    __m512 ratio = _mm512_mul_ps(_mm512_add_ps(lanes(1.0f), size), reciprocal_of(_mm512_sub_ps(lanes(1.0f), size)));
    __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(ratio), _mm512_set1_epi32(0x3f3504f3));
    __m512 e = _mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23));
    __m512i mantissa = _mm512_and_si512(shifted, _mm512_set1_epi32(0x007fffff));
    mantissa = _mm512_add_epi32(mantissa, _mm512_set1_epi32(0x3f3504f3));
    __m512 m = _mm512_sub_ps(_mm512_castsi512_ps(mantissa), lanes(1.0f)), square = _mm512_mul_ps(m, m);
    __m512 log = plus(lanes(7.0376836292e-2f), m, -1.1514610310e-1f); /* log_of */
    log = plus(plus(plus(log, m, 1.1676998740e-1f), m, -1.2420140846e-1f), m, 1.4249322787e-1f);
    log = plus(plus(plus(log, m, -1.6668057665e-1f), m, 2.0000714765e-1f), m, -2.4999993993e-1f);
    log = _mm512_mul_ps(_mm512_mul_ps(plus(log, m, 3.3333331174e-1f), m), square);
    log = _mm512_fmadd_ps(e, lanes(-2.12194440e-4f), _mm512_fmadd_ps(square, lanes(-0.5f), log));
    log = _mm512_fmadd_ps(e, lanes(0.693359375f), _mm512_add_ps(m, log));
    __m512 sign = _mm512_and_ps(x, lanes(-0.0f));
    return _mm512_mask_or_ps(near, is_far, _mm512_mul_ps(log, lanes(0.5f)), sign);
}

INLINE __m512 sin_lanes(__m512 x) {
    __m512 z = _mm512_mul_ps(x, x), p = plus(lanes(1.6059043837e-10f), z, -2.5052108385e-8f);
    p = plus(plus(plus(plus(p, z, 2.7557319224e-6f), z, -1.9841269841e-4f), z, 8.3333333333e-3f), z, -1.6666666667e-1f);
    return _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
}

/* As asin_of. */
INLINE __m512 asin_lanes(__m512 x) {
    __m512 size = _mm512_abs_ps(x), half = _mm512_fnmadd_ps(size, lanes(0.5f), lanes(0.5f));
    __mmask16 is_far = _mm512_cmp_ps_mask(size, lanes(NEAR), _CMP_GT_OQ);
    __m512 root = _mm512_mask_sqrt_ps(size, is_far, half), z = _mm512_mul_ps(root, root);
    __m512 p = plus(plus(lanes(4.2163199048e-2f), z, 2.4181311049e-2f), z, 4.5470025998e-2f);
    p = _mm512_mul_ps(plus(plus(p, z, 7.4953002686e-2f), z, 1.6666752422e-1f), z);
    __m512 found = _mm512_fmadd_ps(root, p, root);
    found = _mm512_mask_fnmadd_ps(found, is_far, lanes(2.0f), lanes(HALF_PI));
    return _mm512_or_ps(found, _mm512_and_ps(x, lanes(-0.0f)));
}

/* As tanh_near, and tanh_of where one needs it. */
INLINE __m512 tanh_lanes(__m512 x) {
    __m512 size = _mm512_abs_ps(x), z = _mm512_mul_ps(x, x), p = plus(lanes(1.3039542439e-3f), z, -6.8600425168e-3f);
    p = plus(plus(plus(plus(p, z, 2.0904114399e-2f), z, -5.3721485140e-2f), z, 1.3330359892e-1f), z, -3.3333212176e-1f);
    __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
    __mmask16 is_far = _mm512_cmp_ps_mask(size, lanes(NEAR_TANH), _CMP_GT_OQ);
    if (!is_far) return near;
    __m512 y = _mm512_mul_ps(_mm512_min_ps(lanes(40.0f), size), lanes(-2.0f));
    __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(y, lanes(1.44269504088896341f)), 8); /* to the nearest, no exception */
    __m512 r = _mm512_fmadd_ps(whole, lanes(2.12194440e-4f), _mm512_fnmadd_ps(whole, lanes(0.693359375f), y));
    p = plus(plus(lanes(1.9875691500e-4f), r, 1.3981999507e-3f), r, 8.3334519073e-3f);
    p = plus(plus(plus(p, r, 4.1665795894e-2f), r, 1.6666665459e-1f), r, 5.0000001201e-1f);
    __m512 power = _mm512_scalef_ps(lanes(1.0f), whole);
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r);
    __m512 less = _mm512_fmadd_ps(p, power, _mm512_sub_ps(power, lanes(1.0f))); /* e^-2x - 1: below -0.8 here */
    __m512 left = _mm512_mul_ps(_mm512_add_ps(lanes(1.0f), less), lanes(2.0f));
    __m512 far = _mm512_fnmadd_ps(left, reciprocal_of(_mm512_add_ps(lanes(2.0f), less)), lanes(1.0f));
    return _mm512_mask_or_ps(near, is_far, far, _mm512_and_ps(x, lanes(-0.0f)));
}

/* As respond, where some of the cosines are far from the equator. */
INLINE __m512 sigmoids_of(__m512 cosine, float guard, __m512 steep, __m512 rise) {
    return _mm512_mul_ps(tanh_lanes(_mm512_mul_ps(asin_lanes(within_lanes(cosine, guard)), steep)), rise);
}

INLINE __m512 finished(__m512 response, __m512 gain, __m512 bias, float low, float high) {
    return _mm512_min_ps(lanes(high), _mm512_max_ps(lanes(low), _mm512_fmadd_ps(response, gain, bias)));
}

typedef struct { __m512 slope, cosine, rise, angle; } Slopes;

/* As slope_at; `flat` is 1 / steep, and `factor` is steep / end. */
INLINE Slopes slopes_at(__m512 answer, __m512 gradient, const int operator, float guard, float step, __m512 end,
                        __m512 flat, __m512 factor) {
    Slopes found = {gradient, answer, _mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 angle;
    if (operator == COSINE) return found;
    if (operator == LINEAR) {
        angle = _mm512_mul_ps(answer, lanes(HALF_PI));
        found.slope = _mm512_mul_ps(gradient, lanes(TWO_OVER_PI));
    } else {
        __m512 t = _mm512_mul_ps(answer, end);
        found.rise = _mm512_mul_ps(_mm512_fnmadd_ps(t, t, lanes(1.0f)), gradient);
        found.angle = atanh_lanes(within_lanes(t, guard));
        angle = _mm512_mul_ps(found.angle, flat);
        found.slope = _mm512_mul_ps(found.rise, factor);
    }
    found.cosine = sin_lanes(within_lanes(angle, HALF_PI));
    __m512 left = _mm512_max_ps(lanes(step), _mm512_fnmadd_ps(found.cosine, found.cosine, lanes(1.0f)));
    found.slope = _mm512_mul_ps(found.slope, inverse_root_of(left));
    return found;
}
#endif

/* Written out, since the compiler must not change the order of a sum, and adds the lanes one by one. */
INLINE float dot_of(const float *x, const float *y, long count) {
#ifdef __AVX512F__
    __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
    for (; count > 16; count -= 32, x += 32, y += 32) {
        __mmask16 taken = first_of(count - 16);
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(y), sum);
        other = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(taken, x + 16), _mm512_maskz_loadu_ps(taken, y + 16), other);
    }
    if (count > 0) {
        __mmask16 taken = first_of(count);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(taken, x), _mm512_maskz_loadu_ps(taken, y), sum);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
#else
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long s = 0; s < count; s++) sum += x[s] * y[s];
    return sum;
#endif
}
