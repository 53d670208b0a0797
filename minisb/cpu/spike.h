/* One token of spike_forward: threshold, counts, and counts times threshold, while the row is in L1.

   The divisions are divisions and the rounding is half to even, as in the reference: with a multiplication
   by 1 / vth, counts next to a tie would differ.  |x|, rounding and division are vector instructions where
   the processor has them (AVX2, or SSE4.1 for the rounding).

   A row is read once for its sum and once more, from L1, to be written: memory would idle meanwhile, so
   that pass asks for the next row.  (2048 x 2048 floats, 2 threads of a Zen 3: 1.0 ms, and 1.4 without; memcpy
   takes 0.8 to 1.3.) */
#ifndef MINISB_SPIKE_H
#define MINISB_SPIKE_H
#include <math.h>
#include <stdint.h>

#define SPIKE_ARGUMENTS(T) const T *restrict x, T *restrict x_hat, int64_t n, T k, T least, T most

enum { SPIKE_SUMS = 32, SPIKE_BLOCK = 256 };

#ifdef __GNUC__
#define SPIKE_FETCH(T, FROM)                                                                       \
    for (int64_t i = 0; i < SPIKE_BLOCK; i += 64 / sizeof(T)) __builtin_prefetch((FROM) + i);
#else
#define SPIKE_FETCH(T, FROM)
#endif

/* The prefetch may reach beyond the array: it is a hint and reads nothing.
   Thirty-two sums, four vectors: a single one would wait for its own last addition. */
#define DEFINE_SPIKE_ROW(NAME, T, ABS, RINT, TARGET)                                               \
    TARGET static T NAME(SPIKE_ARGUMENTS(T)) {                                                     \
        T sums[SPIKE_SUMS] = {0}, total = 0;                                                       \
        int64_t whole = n - n % SPIKE_SUMS;                                                        \
        for (int64_t i = 0; i < whole; i += SPIKE_SUMS)                                            \
            for (int64_t j = 0; j < SPIKE_SUMS; j++) sums[j] += ABS(x[i + j]);                     \
        for (int64_t i = whole; i < n; i++) total += ABS(x[i]);                                    \
        for (int64_t j = 0; j < SPIKE_SUMS; j++) total += sums[j];                                 \
        T vth = total / n / k;                                                                     \
        vth = vth < least ? least : vth; /* NaN passes both */                                     \
        vth = vth > most ? most : vth;                                                             \
        /* The first block ends where a line of the cache does: later vectors stay within one. */  \
        int64_t end = SPIKE_BLOCK - (int64_t)((uintptr_t)x_hat % 64 / sizeof(T));                  \
        for (int64_t start = 0; start < n; start = end, end += SPIKE_BLOCK) {                      \
            if (end > n) end = n;                                                                  \
            SPIKE_FETCH(T, x + n + start)                                                          \
            for (int64_t i = start; i < end; i++) x_hat[i] = RINT(x[i] / vth) * vth;               \
        }                                                                                          \
        return vth;                                                                                \
    }

#if defined(__GNUC__) && defined(__x86_64__) && !defined(__AVX2__)
/* A build for any x86-64, such as a wheel: the wider version where the processor has it. */
#define DEFINE_SPIKE_ROW_FOR(T, ABS, RINT)                                                             \
    DEFINE_SPIKE_ROW(spike_row_##T##_wide, T, ABS, RINT, __attribute__((target("avx2,fma"))))          \
    DEFINE_SPIKE_ROW(spike_row_##T##_plain, T, ABS, RINT, )                                            \
    static inline T spike_row_##T(SPIKE_ARGUMENTS(T)) {                                                \
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")                         \
                   ? spike_row_##T##_wide(x, x_hat, n, k, least, most)                                 \
                   : spike_row_##T##_plain(x, x_hat, n, k, least, most);                               \
    }
#else
#define DEFINE_SPIKE_ROW_FOR(T, ABS, RINT) DEFINE_SPIKE_ROW(spike_row_##T, T, ABS, RINT, )
#endif

DEFINE_SPIKE_ROW_FOR(float, fabsf, rintf)
DEFINE_SPIKE_ROW_FOR(double, fabs, rint)
#endif
