/* A small matrix product that stays in registers, for matrices of a few dozen rows and columns.

   C (+)= A B for six rows of C: A(i, p) stands at a[i * row + p * step], so that A may be transposed;
   rows of B and C are contiguous, and n, the columns, is a multiple of TILE_BYTES / sizeof.  B comes
   in tiles of that many columns, `hop` values apart.  Twelve vectors of sums hide the latency of the
   multiply-add; a row of B is loaded once for six rows of A.  At these sizes a call of BLAS spends
   more on packing and dispatch than on the product. */
#ifndef MINISB_TILE_H
#define MINISB_TILE_H
#include <stdint.h>

#ifdef __AVX__
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
enum { TILE_ROWS = 6, TILE_BYTES = 2 * VECTOR_BYTES };

#ifdef __GNUC__
#define DEFINE_STRIP(NAME, T)                                                                     \
    typedef T NAME##_vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias)); \
    static void NAME(int64_t n, int64_t depth, const T *a, int64_t row, int64_t step, const T *b, \
                     int64_t ldb, int64_t hop, T *c, int64_t ldc, int add) {                      \
        const int64_t lanes = VECTOR_BYTES / sizeof(T);                                           \
        for (int64_t j = 0; j < n; j += 2 * lanes, b += hop, c += 2 * lanes) {                    \
            NAME##_vector sum[TILE_ROWS][2];                                                      \
            for (int i = 0; i < TILE_ROWS; i++)                                                   \
                sum[i][0] = sum[i][1] = (NAME##_vector){0};                                       \
            for (int64_t p = 0; p < depth; p++) {                                                 \
                NAME##_vector left = *(const NAME##_vector *)(b + p * ldb);                       \
                NAME##_vector right = *(const NAME##_vector *)(b + p * ldb + lanes);              \
                _Pragma("GCC unroll 6") for (int i = 0; i < TILE_ROWS; i++) {                     \
                    T x = a[i * row + p * step];                                                  \
                    sum[i][0] += x * left;                                                        \
                    sum[i][1] += x * right;                                                       \
                }                                                                                 \
            }                                                                                     \
            _Pragma("GCC unroll 6") for (int i = 0; i < TILE_ROWS; i++) {                         \
                NAME##_vector *to = (NAME##_vector *)(c + i * ldc);                               \
                if (add) sum[i][0] += to[0], sum[i][1] += to[1];                                  \
                to[0] = sum[i][0];                                                                \
                to[1] = sum[i][1];                                                                \
            }                                                                                     \
        }                                                                                         \
    }
#else /* no vector types: plain loops */
#define DEFINE_STRIP(NAME, T)                                                                     \
    static void NAME(int64_t n, int64_t depth, const T *a, int64_t row, int64_t step, const T *b, \
                     int64_t ldb, int64_t hop, T *c, int64_t ldc, int add) {                      \
        const int64_t columns = TILE_BYTES / sizeof(T);                                           \
        for (int64_t j = 0; j < n; j += columns, b += hop, c += columns)                          \
            for (int64_t i = 0; i < TILE_ROWS; i++) {                                             \
                for (int64_t l = 0; l < columns && !add; l++) c[i * ldc + l] = 0;                 \
                for (int64_t p = 0; p < depth; p++)                                               \
                    for (int64_t l = 0; l < columns; l++)                                         \
                        c[i * ldc + l] += a[i * row + p * step] * b[p * ldb + l];                 \
            }                                                                                     \
    }
#endif

DEFINE_STRIP(strip_float, float)
DEFINE_STRIP(strip_double, double)
#endif
