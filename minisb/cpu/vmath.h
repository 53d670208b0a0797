/* Elementary functions that compilers can vectorise: no branches, no calls, no tables.

   exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2)/2, with a polynomial for 2 exp(r) and
   one factor 2^(n-1): two factors could be multiplied with each other first, and 2^128 is infinite.
   n comes from a truncation of a positive number, which plain x86-64 vectorises too (rintf is a call).
   Measured against double: at most 1.2 units in the last place, relative error 9.8e-8 (7.5e-8 with FMA).
   0 below -86.98 (no denormals: absolute error under 1.8e-38), infinity from 88.7228, NaN stays NaN.

   log1p(x) = 2 atanh(x / (2 + x)), for 0 <= x <= 1 ONLY: within 3 units in the last place.

   The double versions are the C library's: gradient checks want exactness, not speed. */
#ifndef MINISB_VMATH_H
#define MINISB_VMATH_H
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float exp_float(float x) {
    float c; /* x clamped to [-88, 89] by its bits, which order as integers do; NaN returns at the end */
    int32_t as_int;
    uint32_t as_unsigned;
    memcpy(&as_int, &x, 4);
    as_unsigned = as_int < 0x42b20000 ? as_int : 0x42b20000;
    as_unsigned = as_unsigned < 0xc2b00000u ? as_unsigned : 0xc2b00000u;
    memcpy(&c, &as_unsigned, 4);
    int32_t bits = (int32_t)(c * 1.44269504f + 126.5f); /* n + 126, and 0 below -86.98 */
    float n = (float)(bits - 126);
    float r = c - n * 0.693359375f;
    int32_t as_written; /* -fassociative-math would take n * (sum of both constants): 60 units off */
    memcpy(&as_written, &r, 4);
    as_written ^= bits >> 8; /* 0, which the compiler does not know */
    memcpy(&r, &as_written, 4);
    r = r - n * -2.12194440e-4f;
    float p = 0.00279014511f;
    p = p * r + 0.01673804969f;
    p = p * r + 0.08333240449f;
    p = p * r + 0.333330363f;
    p = p * r + 1.0f;
    p = p * r + 2.0f;
    p = p * r + 2.0f;
    bits <<= 23;
    float scale; /* 2^(n-1), 0 where bits are 0 */
    memcpy(&scale, &bits, 4);
    float y = p * scale;
    return x == x ? y : x;
}

static inline float log1p_float(float x) {
    float s = x / (2.0f + x), z = s * s;
    float p = 0.2802446783f;
    p = p * z + 0.2799913883f;
    p = p * z + 0.4002169967f;
    p = p * z + 0.6666641235f;
    return s * (2.0f + z * p);
}

static inline double exp_double(double x) { return exp(x); }
static inline double log1p_double(double x) { return log1p(x); }

/* The largest of n values; NaN is passed over, -inf for none. */
#define DEFINE_ROW_MAX(NAME, T)                                    \
    static inline T NAME(const T *x, int64_t n) {                  \
        T top = -INFINITY;                                         \
        _Pragma("omp simd reduction(max : top)")                   \
        for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top; \
        return top;                                                \
    }
DEFINE_ROW_MAX(row_max_float, float)
DEFINE_ROW_MAX(row_max_double, double)
#endif
