/* Matrix product on one thread, for use inside parallel loops.

   C = alpha * op(A) op(B) + beta * C, row-major, op = transpose where ta / tb.  NumPy's own BLAS
   does the work; its address is handed over at import (gemm_init).  Where NumPy hides its BLAS,
   plain loops run instead: right, and slow. */
#ifndef MINISB_BLAS_H
#define MINISB_BLAS_H
#include <stdint.h>

static void *gemm_float_address, *gemm_double_address;
static int gemm_wide;

static void gemm_init(size_t single, size_t twice, int wide) {
    gemm_float_address = (void *)single;
    gemm_double_address = (void *)twice;
    gemm_wide = wide;
}

#define DEFINE_GEMM(NAME, T, ADDRESS)                                                             \
    static void NAME(int ta, int tb, int64_t m, int64_t n, int64_t k, T alpha, const T *a,        \
                     int64_t lda, const T *b, int64_t ldb, T beta, T *c, int64_t ldc) {           \
        typedef void (*wide_t)(int, int, int, int64_t, int64_t, int64_t, T, const T *, int64_t,   \
                               const T *, int64_t, T, T *, int64_t);                              \
        typedef void (*narrow_t)(int, int, int, int, int, int, T, const T *, int, const T *, int, \
                                 T, T *, int);                                                    \
        const int row_major = 101, plain = 111, transposed = 112;                                 \
        int opa = ta ? transposed : plain, opb = tb ? transposed : plain;                         \
        if (ADDRESS && gemm_wide) {                                                               \
            ((wide_t)ADDRESS)(row_major, opa, opb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); \
            return;                                                                               \
        }                                                                                         \
        if (ADDRESS) {                                                                            \
            ((narrow_t)ADDRESS)(row_major, opa, opb, (int)m, (int)n, (int)k, alpha, a, (int)lda,  \
                                b, (int)ldb, beta, c, (int)ldc);                                  \
            return;                                                                               \
        }                                                                                         \
        for (int64_t i = 0; i < m; i++) {                                                         \
            T *row = c + i * ldc;                                                                 \
            for (int64_t j = 0; j < n; j++) row[j] = beta == 0 ? 0 : beta * row[j];               \
            for (int64_t p = 0; p < k; p++) {                                                     \
                T x = alpha * (ta ? a[p * lda + i] : a[i * lda + p]);                             \
                if (tb)                                                                           \
                    for (int64_t j = 0; j < n; j++) row[j] += x * b[j * ldb + p];                 \
                else                                                                              \
                    for (int64_t j = 0; j < n; j++) row[j] += x * b[p * ldb + j];                 \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_GEMM(gemm_float, float, gemm_float_address)
DEFINE_GEMM(gemm_double, double, gemm_double_address)
#endif
