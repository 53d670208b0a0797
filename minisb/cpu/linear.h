/* gemm.h for float and for double, and whether it is worth using. */
#ifndef MINISB_LINEAR_H
#define MINISB_LINEAR_H
#include <string.h>
#include "tile.h"

enum {
    BLOCK_K = 256,
    BLOCK_STRIPS = 20,
    OWN = BLOCK_STRIPS * TALL_ROWS * BLOCK_K, /* values that a thread packs at a time: whole cache lines */
    DEPTH = 240,         /* rows of a weight gradient's sum that are packed together: whole strips, many divisors */
    TOGETHER = 4 * DEPTH /* rows after which the gradient is brought up to date */
};

/* Compiled for a machine with AVX2 our strips outrun NumPy's BLAS at the sizes of a training step
   (see NOTES.md).  Elsewhere BLAS knows the machine better: a build for any processor leaves the
   choice of instructions to it. */
#if defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__)
enum { STRIPS_PAY = 1 };
#else
enum { STRIPS_PAY = 0 };
#endif

#ifdef __GNUC__
#define FLATTEN __attribute__((flatten, noinline))
#else
#define FLATTEN
#endif

#define REAL float
#define NAME(x) x##_float
#include "gemm.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(x) x##_double
#include "gemm.h"
#undef REAL
#undef NAME
#endif
