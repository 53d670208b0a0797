/* Elementary functions that compilers can vectorise: no branches, no calls, no tables.

   exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2)/2, with a polynomial for exp(r).
   float: within 2 units in the last place; double: within 4.  NaN stays NaN; large arguments go to
   inf; small ones go to 0 below about -87 (float) and -708 (double), without denormals. */
#ifndef MINISB_VMATH_H
#define MINISB_VMATH_H
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float exp_float(float x) {
    float c = x > 88.8f ? 88.8f : x; /* written so that NaN passes through */
    c = c < -88.0f ? -88.0f : c;
    float n = rintf(c * 1.44269504088896341f);
    float r = c - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* two factors 2^(n/2), so that 2^128 is reached in range */
    int32_t whole = (int32_t)n, half = whole >> 1, rest = whole - half;
    int32_t bits1 = (half + 127) << 23, bits2 = (rest + 127) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, 4);
    memcpy(&scale2, &bits2, 4);
    float y = p * scale1 * scale2;
    y = x < -87.0f ? 0.0f : y;
    return x > 88.73f ? INFINITY : y;
}

static inline double exp_double(double x) { return exp(x); }

static inline float log1p_float(float x) { return log1pf(x); }
static inline double log1p_double(double x) { return log1p(x); }
#endif
