/* A matrix product for a few dozen rows and columns, which BLAS spends on packing and dispatch.

   C (+)= A B for six rows of C.  A(i, p) stands at a[i * row + p * step], so A may be transposed;
   rows of B and C are contiguous.  n, the columns, is a multiple of TILE_BYTES / sizeof(T): so many
   columns of B stand together, a tile, and the next tile `hop` values further on.

   Twelve sums in registers hide the latency of the multiply-add, and a vector of B, loaded once,
   serves six rows.  (Four rows, eight sums: 52-65 GFLOP/s at D = 64 where six reach 90-99.)
   A tile is two vectors of AVX2 or one of AVX-512, which takes two tiles at once.  Its 32 registers hold
   the sums of twelve rows too: strip_tall, for large products, loads less for as many multiply-adds. */
#ifndef MINISB_TILE_H
#define MINISB_TILE_H
#include <stdint.h>

enum {
    TILE_ROWS = 6,
    TILE_BYTES = 64,
#if defined(__GNUC__) && defined(__AVX512F__)
    TALL_ROWS = 12, /* of a strip of gemm.h */
    TILES = 2       /* that a strip takes at once, if there are so many */
#else
    TALL_ROWS = TILE_ROWS,
    TILES = 1
#endif
};

#define STRIP_ARGUMENTS(T)                                                                      \
    int64_t n, int64_t depth, const T *a, int64_t row, int64_t step, const T *b, int64_t ldb,   \
        int64_t hop, T *c, int64_t ldc, int add

#ifdef __GNUC__
/* sum += x * y.  Beside the twelve multiply-adds of a step every other instruction counts, most of all where
   another process shares the core.  Left to itself GCC reads y from memory again for row after row and loads
   ahead until it runs out of registers.  So with FMA the instruction is spelled out, its operands in
   registers; without, KEEP pins the sums to theirs. */
#ifdef __x86_64__
#ifdef __AVX512F__
#define ANY_VECTOR "v" /* of 32 registers */
#else
#define ANY_VECTOR "x"
#endif
#define FUSED_float(sum, x, y) __asm__("vfmadd231ps %2, %1, %0" : "+" ANY_VECTOR(sum) : ANY_VECTOR(x), ANY_VECTOR(y))
#define FUSED_double(sum, x, y) __asm__("vfmadd231pd %2, %1, %0" : "+" ANY_VECTOR(sum) : ANY_VECTOR(x), ANY_VECTOR(y))
#define KEEP(vector) __asm__("" : "+x"(vector))
#else
#define KEEP(vector)
#endif
#define PLAIN(sum, x, y)                                                                        \
    do {                                                                                        \
        sum += (x) * (y);                                                                       \
        KEEP(sum);                                                                              \
    } while (0)

/* One p for all rows: of six, 20 instructions for 12 multiply-adds. */
#define STRIP_STEP(VECTOR, ROWS, MULTIPLY_ADD, P)                                               \
    do {                                                                                        \
        VECTOR left = *(const VECTOR *)from, right = *(const VECTOR *)(from + other);           \
        _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++) {                               \
            VECTOR x = (VECTOR){0} + a[i * row + (P) * step];                                   \
            MULTIPLY_ADD(sum[i][0], x, left);                                                   \
            MULTIPLY_ADD(sum[i][1], x, right);                                                  \
        }                                                                                       \
    } while (0)

/* BYTES: of a vector.  MULTIPLY_ADD: one of the above.  Eight steps in a row without a branch.  TARGET: what
   the function may use beyond the build's own instructions.  REST: what does a last column of half the width. */
#define DEFINE_STRIP(NAME, T, ROWS, BYTES, MULTIPLY_ADD, TARGET, REST)                          \
    typedef T NAME##_vector __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias)); \
    TARGET static void NAME(STRIP_ARGUMENTS(T)) {                                               \
        const int64_t lanes = BYTES / sizeof(T), tile = TILE_BYTES / sizeof(T);                 \
        const int64_t other = lanes < tile ? lanes : hop; /* from one vector of B to the next */\
        int64_t j = 0;                                                                          \
        for (; j + 2 * lanes <= n; j += 2 * lanes) {                                            \
            NAME##_vector sum[ROWS][2];                                                         \
            const T *from = b + j / tile * hop + j % tile;                                      \
            _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++)                             \
                sum[i][0] = sum[i][1] = (NAME##_vector){0};                                     \
            int64_t p = 0;                                                                      \
            for (; p + 8 <= depth; p += 8)                                                      \
                _Pragma("GCC unroll 8") for (int u = 0; u < 8; u++, from += ldb)                \
                    STRIP_STEP(NAME##_vector, ROWS, MULTIPLY_ADD, p + u);                       \
            for (; p < depth; p++, from += ldb) STRIP_STEP(NAME##_vector, ROWS, MULTIPLY_ADD, p); \
            _Pragma("GCC unroll 12") for (int i = 0; i < ROWS; i++) {                           \
                NAME##_vector *to = (NAME##_vector *)(c + i * ldc + j);                         \
                if (add) sum[i][0] += to[0], sum[i][1] += to[1];                                \
                to[0] = sum[i][0];                                                              \
                to[1] = sum[i][1];                                                              \
            }                                                                                   \
        }                                                                                       \
        if (j < n) REST(n - j, depth, a, row, step, b + j / tile * hop, ldb, hop, c + j, ldc, add); \
    }
#define NO_REST(...)
#else /* no vector types: plain loops */
#define DEFINE_STRIP(NAME, T, ROWS, BYTES, MULTIPLY_ADD, TARGET, REST)                          \
    static void NAME(STRIP_ARGUMENTS(T)) {                                                      \
        const int64_t tile = TILE_BYTES / sizeof(T);                                            \
        for (int64_t i = 0; i < ROWS; i++)                                                      \
            for (int64_t j = 0; j < n; j += tile) {                                             \
                for (int64_t l = 0; l < tile && !add; l++) c[i * ldc + j + l] = 0;              \
                for (int64_t p = 0; p < depth; p++)                                             \
                    for (int64_t l = 0; l < tile; l++)                                          \
                        c[i * ldc + j + l] += a[i * row + p * step] * b[j / tile * hop + p * ldb + l]; \
            }                                                                                   \
    }
#endif

#if defined(__GNUC__) && defined(__x86_64__) && !defined(__AVX2__)
/* A build for any x86-64, such as a wheel: the wider version where the processor has it. */
#define DEFINE_STRIP_FOR(T)                                                                     \
    DEFINE_STRIP(strip_##T##_wide, T, TILE_ROWS, 32, FUSED_##T, __attribute__((target("avx2,fma"))), NO_REST) \
    DEFINE_STRIP(strip_##T##_plain, T, TILE_ROWS, 16, PLAIN, , NO_REST)                         \
    static inline void strip_##T(STRIP_ARGUMENTS(T)) {                                          \
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))                    \
            strip_##T##_wide(n, depth, a, row, step, b, ldb, hop, c, ldc, add);                 \
        else                                                                                    \
            strip_##T##_plain(n, depth, a, row, step, b, ldb, hop, c, ldc, add);                \
    }
#elif defined(__AVX512F__)
#define DEFINE_STRIP_FOR(T)                                                                     \
    DEFINE_STRIP(strip_##T##_tile, T, TILE_ROWS, 32, FUSED_##T, , NO_REST)                      \
    DEFINE_STRIP(strip_##T, T, TILE_ROWS, 64, FUSED_##T, , strip_##T##_tile)                    \
    DEFINE_STRIP(strip_tall_##T##_tile, T, TALL_ROWS, 32, FUSED_##T, , NO_REST)                 \
    DEFINE_STRIP(strip_tall_##T, T, TALL_ROWS, 64, FUSED_##T, , strip_tall_##T##_tile)
#elif defined(__AVX2__) && defined(__FMA__)
#define DEFINE_STRIP_FOR(T) DEFINE_STRIP(strip_##T, T, TILE_ROWS, 32, FUSED_##T, , NO_REST)
#elif defined(__AVX2__)
#define DEFINE_STRIP_FOR(T) DEFINE_STRIP(strip_##T, T, TILE_ROWS, 32, PLAIN, , NO_REST)
#else
#define DEFINE_STRIP_FOR(T) DEFINE_STRIP(strip_##T, T, TILE_ROWS, 16, PLAIN, , NO_REST)
#endif

DEFINE_STRIP_FOR(float)
DEFINE_STRIP_FOR(double)
#if !(defined(__GNUC__) && defined(__AVX512F__))
#define strip_tall_float strip_float
#define strip_tall_double strip_double
#endif
#endif
