/* gla_walk.h for float and for double. */
#ifndef MINISB_GLA_H
#define MINISB_GLA_H
#include "vmath.h"
#define MOST_D 1024 /* largest head size */

#define REAL float
#define NAME(x) x##_float
#define EXP exp_float
#include "gla_walk.h"
#undef REAL
#undef NAME
#undef EXP

#define REAL double
#define NAME(x) x##_double
#define EXP exp_double
#include "gla_walk.h"
#undef REAL
#undef NAME
#undef EXP
#endif
