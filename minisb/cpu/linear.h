/* gemm.h for float and for double, and whether it is worth using. */
#ifndef MINISB_LINEAR_H
#define MINISB_LINEAR_H
#include "tile.h"

enum { BLOCK_K = 256, BLOCK_STRIPS = 20 };

/* Compiled for a machine with wide vectors our strips outrun NumPy's BLAS at the sizes of a
   training step (see NOTES.md); a build for any machine leaves the choice of instructions to BLAS. */
#if defined(__GNUC__) && defined(__FMA__) && VECTOR_BYTES >= 32
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
