/* One key/value head of gated linear attention, walked token by token.

   On a CPU the recurrence itself is the fast form: the state of a head (D x D, 4 kB at D = 32)
   stays in the first cache, a token costs about 2 D^2 multiply-adds and nothing can overflow.
   Included twice, with REAL float and double; NAME(x) appends the type.

   A token goes over the columns of a state two vectors at a time (gla_columns.h); where fewer are left, two columns at
   a time.  Sequences are strided: q, o and their gradients by q_step a token, k, v, g by k_step. */

#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(MEMORY *)(p))

#ifdef __AVX__
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
/* A vector, and the same anywhere in memory.  Two types: calculating with the second, GCC for plain x86-64 sends
   every factor through memory, ten times as slow. */
#ifdef __GNUC__
#define WIDE (VECTOR_BYTES / (int64_t)sizeof(REAL))
typedef REAL NAME(wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL NAME(wide_memory) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#else /* no vector types: two columns at a time */
#define WIDE 1
typedef REAL NAME(wide), NAME(wide_memory);
#endif
#define MEMORY NAME(wide_memory)
#define VECTOR NAME(wide)
#define LANES WIDE
#define TYPED(x) NAME(x##_wide)
#include "gla_columns.h"
#undef VECTOR
#undef LANES
#undef TYPED
#undef MEMORY
#define MEMORY REAL
#define VECTOR REAL
#define LANES 1
#define TYPED(x) NAME(x##_single)
#include "gla_columns.h"
#undef VECTOR
#undef LANES
#undef TYPED
#undef MEMORY

/* All columns, from j on each time: CALL(which, heads, first, last), the last three as literals. */
#define BY_LITERALS(WHICH)                          \
    if (heads == 2) {                               \
        if (first && last) CALL(WHICH, 2, 1, 1);    \
        else if (first) CALL(WHICH, 2, 1, 0);       \
        else if (last) CALL(WHICH, 2, 0, 1);        \
        else CALL(WHICH, 2, 0, 0);                  \
    } else {                                        \
        if (first && last) CALL(WHICH, 1, 1, 1);    \
        else if (first) CALL(WHICH, 1, 1, 0);       \
        else if (last) CALL(WHICH, 1, 0, 1);        \
        else CALL(WHICH, 1, 0, 0);                  \
    }
#define BY_COLUMNS                                                \
    int64_t j = 0;                                                \
    for (; j + 2 * WIDE <= D; j += 2 * WIDE) BY_LITERALS(wide)    \
    for (; j < D; j += 2) BY_LITERALS(single)

/* T tokens forward.  S is updated; before every chunk-th token it is also copied to states. */
static void NAME(gla_walk_forward)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                                   const REAL *k, const REAL *v, const REAL *log_g, int64_t q_step, int64_t k_step,
                                   REAL *S, REAL *states, int64_t states_step, REAL *o) {
    REAL g[MOST_D];
    for (int64_t t = 0; t < T; t++, k += k_step, v += k_step, log_g += k_step) {
        if (states && t % chunk == 0) memcpy(states + t / chunk * states_step, S, D * D * sizeof(REAL));
        for (int64_t d = 0; d < D; d++) g[d] = EXP(log_g[d]);
        for (int64_t r = 0; r < R; r += 2) {
            const int heads = r + 1 < R ? 2 : 1, first = r == 0, last = 1;
            const int64_t at = t * q_step + r * D;
#define CALL(WHICH, HEADS, FIRST, LAST) \
    NAME(write_and_read_##WHICH)(D, scale, S + j, g, k, v + j, q + at, o + at + j, HEADS, FIRST)
            BY_COLUMNS
#undef CALL
        }
    }
}

INLINE void NAME(transpose)(int64_t D, const REAL *restrict x, REAL *restrict y) {
    for (int64_t i = 0; i < D; i++)
        for (int64_t j = 0; j < D; j++) y[j * D + i] = x[i * D + j];
}

INLINE REAL NAME(inner)(int64_t D, const REAL *x, const REAL *y) {
    REAL sum = 0;
    for (int64_t d = 0; d < D; d++) sum += x[d] * y[d];
    return sum;
}

/* sum[:] = sum of the rows of S * dS. */
INLINE void NAME(column_sums)(int64_t D, const REAL *restrict S, const REAL *restrict dS, REAL *restrict sum) {
    for (int64_t d = 0; d < D; d++) sum[d] = 0;
    for (int64_t e = 0; e < D; e++)
        for (int64_t d = 0; d < D; d++) sum[d] += S[e * D + d] * dS[e * D + d];
}

/* T tokens backward.  dS_out (D,D): in the gradient of the final state, out that of the first.  scratch, 2 states and
   WIDE rows of D.  All states are transposed here (row = value channel), so that gradients of key channels add
   up along vectors.

   A walk forward makes dq, a walk back dk and dv, and no state is kept from one to the other: the gradient of
   log_g at t, the sum over v of g S_before * dS, exceeds that at t + 1 by what readers take less what writers
   put in at t, q dq - k dk.  A token's own term crosses no gate; it would cancel only up to rounding and is left out of
   both.  Differences pile up for a chunk at most: where a state is saved, the sum itself is taken, and so it is at
   the end, from the state that the last token finds. */
static void NAME(gla_walk_backward)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                                    const REAL *k, const REAL *v, const REAL *log_g, const REAL *d_o,
                                    int64_t q_step, int64_t k_step, const REAL *states, int64_t states_step,
                                    REAL *dS_out, REAL *dq, REAL *dk, REAL *dv, REAL *dlog_g, REAL *scratch) {
    REAL *S = scratch, *dS = S + D * D, *sums_wide = dS + D * D;
    REAL g[MOST_D], sum[MOST_D];
    NAME(transpose)(D, states, S);
    for (int64_t t = 0; t < T; t++) {
        const REAL *key = k + t * k_step, *value = v + t * k_step;
        REAL *taken = dlog_g + t * k_step; /* kept there until the walk back */
        for (int64_t d = 0; d < D; d++) g[d] = EXP(log_g[t * k_step + d]), taken[d] = 0;
        for (int64_t r = 0; r < R; r += 2) {
            const int heads = r + 1 < R ? 2 : 1, first = r == 0, last = r + 2 >= R && t < T - 1;
            const int64_t at = t * q_step + r * D;
#define CALL(WHICH, HEADS, FIRST, LAST) \
    NAME(read_and_write_##WHICH)(D, scale, S + j, g + j, key + j, value, d_o + at, dq + at + j, HEADS, FIRST, LAST)
            BY_COLUMNS
#undef CALL
        }
        for (int64_t r = 0; r < R; r++) {
            const int64_t at = t * q_step + r * D;
            const REAL own = scale * NAME(inner)(D, d_o + at, value);
            for (int64_t d = 0; d < D; d++) taken[d] += q[at + d] * dq[at + d], dq[at + d] += own * key[d];
        }
    }
    NAME(transpose)(D, dS_out, dS);
    NAME(column_sums)(D, S, dS, sum);
    for (int64_t t = T - 1; t >= 0; t--) {
        const REAL *key = k + t * k_step, *value = v + t * k_step;
        REAL *to_k = dk + t * k_step, *to_v = dv + t * k_step, *sums_single = to_v, *to_g = dlog_g + t * k_step;
        for (int64_t d = 0; d < D; d++) g[d] = EXP(log_g[t * k_step + d]), to_v[d] = 0;
        for (int64_t i = 0; i < WIDE * D; i++) sums_wide[i] = 0;
        for (int64_t r = 0; r < R; r += 2) {
            const int heads = r + 1 < R ? 2 : 1, first = r == 0, last = r + 2 >= R;
            const int64_t at = t * q_step + r * D;
#define CALL(WHICH, HEADS, FIRST, LAST)                                                                           \
    NAME(back_##WHICH)(D, scale, dS + j, g + j, key + j, value, d_o + at, q + at + j, to_k + j, sums_##WHICH, HEADS, \
                       FIRST, LAST)
            BY_COLUMNS
#undef CALL
        }
        for (int64_t e = 0; e < D; e++)
            for (int64_t l = 0; l < WIDE; l++) to_v[e] += sums_wide[e * WIDE + l];
        if (t % chunk) {
            for (int64_t d = 0; d < D; d++) sum[d] += to_g[d] - (t < T - 1 ? key[d] * to_k[d] : 0);
        } else {
            NAME(transpose)(D, states + t / chunk * states_step, S);
            NAME(column_sums)(D, S, dS, sum);
        }
        for (int64_t d = 0; d < D; d++) to_g[d] = sum[d];
        for (int64_t r = 0; r < R; r++) {
            const int64_t at = t * q_step + r * D;
            const REAL own = scale * NAME(inner)(D, d_o + at, value);
            for (int64_t d = 0; d < D; d++) to_k[d] += own * q[at + d];
        }
    }
    NAME(transpose)(D, dS, dS_out);
}
#undef INLINE
#undef LOAD
#undef WIDE
#undef VECTOR_BYTES
#undef BY_LITERALS
#undef BY_COLUMNS
