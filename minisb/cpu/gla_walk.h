/* One key/value head of gated linear attention, walked token by token.

   On a CPU the recurrence itself is the fast form: the state of a head (D x D, 4 kB at D = 32)
   stays in the first cache, a token costs about 2 D^2 multiply-adds and nothing can overflow.
   Included twice, with REAL float and double; NAME(x) appends the type.

   D is a literal in the common sizes, so that the compiler unrolls; four rows of the state are
   taken at a time, so that the sums over rows are loaded and stored a quarter as often.
   Sequences are strided: q, o and their gradients by q_step a token, k, v, g by k_step. */

#define INLINE static inline __attribute__((always_inline))

/* Four rows from d on: S[d][:] = g[d] S[d][:] + k[d] v[:], and while they are at hand the read-out
   of the first query head, y[:] += sum of x[d] S[d][:]. */
INLINE void NAME(write_and_read)(int64_t D, int64_t d, REAL *restrict S, const REAL *restrict g,
                                 const REAL *restrict k, const REAL *restrict v, const REAL *restrict x,
                                 REAL *restrict y) {
    REAL *restrict a = S + d * D, *restrict b = a + D, *restrict c = b + D, *restrict e = c + D;
    REAL ga = g[d], gb = g[d + 1], gc = g[d + 2], ge = g[d + 3];
    REAL ka = k[d], kb = k[d + 1], kc = k[d + 2], ke = k[d + 3];
    REAL xa = x[d], xb = x[d + 1], xc = x[d + 2], xe = x[d + 3];
    for (int64_t j = 0; j < D; j++) {
        REAL sa = ga * a[j] + ka * v[j], sb = gb * b[j] + kb * v[j];
        REAL sc = gc * c[j] + kc * v[j], se = ge * e[j] + ke * v[j];
        a[j] = sa, b[j] = sb, c[j] = sc, e[j] = se;
        y[j] += xa * sa + xb * sb + xc * sc + xe * se;
    }
}

/* y[:] += sum over four rows of x[d] S[d][:]. */
INLINE void NAME(read)(int64_t D, int64_t d, const REAL *restrict S, const REAL *restrict x, REAL *restrict y) {
    const REAL *restrict a = S + d * D, *restrict b = a + D, *restrict c = b + D, *restrict e = c + D;
    REAL xa = x[d], xb = x[d + 1], xc = x[d + 2], xe = x[d + 3];
    for (int64_t j = 0; j < D; j++) y[j] += xa * a[j] + xb * b[j] + xc * c[j] + xe * e[j];
}

/* T tokens forward.  S is updated; before every chunk-th token it is also copied to states. */
INLINE void NAME(forward_body)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                               const REAL *k, const REAL *v, const REAL *log_g, int64_t q_step, int64_t k_step,
                               REAL *S, REAL *states, int64_t states_step, REAL *o) {
    REAL g[MOST_D], scaled[MOST_D], sum[MOST_D];
    for (int64_t t = 0; t < T; t++) {
        if (states && t % chunk == 0) memcpy(states + t / chunk * states_step, S, D * D * sizeof(REAL));
        for (int64_t d = 0; d < D; d++) g[d] = EXP(log_g[t * k_step + d]);
        for (int64_t r = 0; r < R; r++) {
            const REAL *query = q + t * q_step + r * D;
            REAL *out = o + t * q_step + r * D;
            for (int64_t d = 0; d < D; d++) scaled[d] = scale * query[d], sum[d] = 0;
            if (r == 0)
                for (int64_t d = 0; d < D; d += 4)
                    NAME(write_and_read)(D, d, S, g, k + t * k_step, v + t * k_step, scaled, sum);
            else
                for (int64_t d = 0; d < D; d += 4) NAME(read)(D, d, S, scaled, sum);
            for (int64_t d = 0; d < D; d++) out[d] = sum[d];
        }
    }
}

/* Four rows of the backward walk; all states are transposed here (row = value channel e), so
   that dq, dk and dlog_g add up along vectors.
       x = dS[e][:] (own read-outs already added)   dv[e] = sum k x     dk += v[e] x
       dS[e][:] = g x                               dlog_g += g x S_before[e][:] */
INLINE void NAME(back_rows)(int64_t D, int64_t e, REAL *restrict dS, const REAL *restrict before,
                            const REAL *restrict g, const REAL *restrict k, const REAL *restrict v,
                            REAL *restrict dk, REAL *restrict dv, REAL *restrict dlog_g) {
    REAL *restrict a = dS + e * D, *restrict b = a + D, *restrict c = b + D, *restrict f = c + D;
    const REAL *restrict sa = before + e * D, *restrict sb = sa + D, *restrict sc = sb + D, *restrict sf = sc + D;
    REAL va = v[e], vb = v[e + 1], vc = v[e + 2], vf = v[e + 3];
    REAL da = 0, db = 0, dc = 0, df = 0;
    for (int64_t j = 0; j < D; j++) {
        da += k[j] * a[j];
        db += k[j] * b[j];
        dc += k[j] * c[j];
        df += k[j] * f[j];
        dk[j] += va * a[j] + vb * b[j] + vc * c[j] + vf * f[j];
        REAL xa = g[j] * a[j], xb = g[j] * b[j], xc = g[j] * c[j], xf = g[j] * f[j];
        a[j] = xa, b[j] = xb, c[j] = xc, f[j] = xf;
        dlog_g[j] += xa * sa[j] + xb * sb[j] + xc * sc[j] + xf * sf[j];
    }
    dv[e] = da, dv[e + 1] = db, dv[e + 2] = dc, dv[e + 3] = df;
}

/* dS[e][:] += w[e] x[:], four rows. */
INLINE void NAME(outer)(int64_t D, int64_t e, REAL *restrict dS, const REAL *restrict w, const REAL *restrict x) {
    REAL *restrict a = dS + e * D, *restrict b = a + D, *restrict c = b + D, *restrict f = c + D;
    REAL wa = w[e], wb = w[e + 1], wc = w[e + 2], wf = w[e + 3];
    for (int64_t j = 0; j < D; j++) {
        a[j] += wa * x[j];
        b[j] += wb * x[j];
        c[j] += wc * x[j];
        f[j] += wf * x[j];
    }
}

INLINE void NAME(transpose)(int64_t D, const REAL *restrict x, REAL *restrict y) {
    for (int64_t i = 0; i < D; i++)
        for (int64_t j = 0; j < D; j++) y[j * D + i] = x[i * D + j];
}

/* T tokens backward, chunk by chunk from the last.  dS (D,D): in the gradient of the final state,
   out that of the first.  scratch holds (chunk + 3) states: those of a chunk are made anew. */
INLINE void NAME(backward_body)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                                const REAL *k, const REAL *v, const REAL *log_g, const REAL *d_o, int64_t q_step,
                                int64_t k_step, const REAL *states, int64_t states_step, REAL *dS_out, REAL *dq,
                                REAL *dk, REAL *dv, REAL *dlog_g, REAL *scratch) {
    REAL *S = scratch, *dS = S + (chunk + 1) * D * D, *decays = dS + D * D; /* decays: chunk rows of D */
    REAL scaled[MOST_D];
    NAME(transpose)(D, dS_out, dS);
    for (int64_t start = (T - 1) / chunk * chunk; start >= 0; start -= chunk) {
        int64_t end = start + chunk < T ? start + chunk : T;
        NAME(transpose)(D, states + start / chunk * states_step, S);
        for (int64_t t = start; t < end; t++) { /* forward again: the states, and dq from them */
            REAL *before = S + (t - start) * D * D, *now = before + D * D, *g = decays + (t - start) * D;
            const REAL *key = k + t * k_step, *value = v + t * k_step;
            for (int64_t d = 0; d < D; d++) g[d] = EXP(log_g[t * k_step + d]);
            for (int64_t e = 0; e < D; e++) {
                REAL *restrict to = now + e * D;
                const REAL *restrict from = before + e * D;
                REAL w = value[e];
                for (int64_t d = 0; d < D; d++) to[d] = g[d] * from[d] + w * key[d];
            }
            for (int64_t r = 0; r < R; r++) {
                int64_t at = t * q_step + r * D;
                for (int64_t d = 0; d < D; d++) scaled[d] = scale * d_o[at + d], dq[at + d] = 0;
                for (int64_t e = 0; e < D; e += 4) NAME(read)(D, e, now, scaled, dq + at);
            }
        }
        for (int64_t t = end - 1; t >= start; t--) {
            const REAL *before = S + (t - start) * D * D, *g = decays + (t - start) * D;
            int64_t at = t * k_step;
            for (int64_t r = 0; r < R; r++) {
                const REAL *query = q + t * q_step + r * D, *upstream = d_o + t * q_step + r * D;
                for (int64_t d = 0; d < D; d++) scaled[d] = scale * upstream[d];
                for (int64_t e = 0; e < D; e += 4) NAME(outer)(D, e, dS, scaled, query);
            }
            for (int64_t d = 0; d < D; d++) dk[at + d] = 0, dlog_g[at + d] = 0;
            for (int64_t e = 0; e < D; e += 4)
                NAME(back_rows)(D, e, dS, before, g, k + at, v + at, dk + at, dv + at, dlog_g + at);
        }
    }
    NAME(transpose)(D, dS, dS_out);
}

/* The common head sizes as literals; the others (multiples of 4) share one copy. */
#define BY_SIZE(CALL) \
    switch (D) {      \
        case 16: CALL(16); break;   \
        case 32: CALL(32); break;   \
        case 64: CALL(64); break;   \
        case 128: CALL(128); break; \
        default: CALL(D);           \
    }

static void NAME(gla_walk_forward)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                                   const REAL *k, const REAL *v, const REAL *log_g, int64_t q_step, int64_t k_step,
                                   REAL *S, REAL *states, int64_t states_step, REAL *o) {
#define CALL(SIZE) \
    NAME(forward_body)(SIZE, T, R, chunk, scale, q, k, v, log_g, q_step, k_step, S, states, states_step, o)
    BY_SIZE(CALL)
#undef CALL
}

static void NAME(gla_walk_backward)(int64_t D, int64_t T, int64_t R, int64_t chunk, REAL scale, const REAL *q,
                                    const REAL *k, const REAL *v, const REAL *log_g, const REAL *d_o,
                                    int64_t q_step, int64_t k_step, const REAL *states, int64_t states_step,
                                    REAL *dS, REAL *dq, REAL *dk, REAL *dv, REAL *dlog_g, REAL *scratch) {
#define CALL(SIZE)                                                                                       \
    NAME(backward_body)(SIZE, T, R, chunk, scale, q, k, v, log_g, d_o, q_step, k_step, states, states_step, dS, \
                        dq, dk, dv, dlog_g, scratch)
    BY_SIZE(CALL)
#undef CALL
}
#undef BY_SIZE
#undef INLINE
