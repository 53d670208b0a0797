/* What one token does to a few columns of a state: two vectors of them, so that whatever adds up over the rows stays in
   registers, and the state is read and written once for two query heads.

   Included with VECTOR, a type of LANES values, and TYPED(x), which appends both types.  Pointers to a state, and to
   what runs along its columns, begin at the first column.  heads: 1 or 2 query heads, D values one after the other.
   first, last: are they the token's first heads, its last?  heads, first and last are literals. */

/* Forward, rows are key channels: S[d][:] = g[d] S[d][:] + k[d] v[:], then y[:] = scale * sum of x[d] S[d][:]. */
INLINE void TYPED(write_and_read)(int64_t D, REAL scale, REAL *restrict S, const REAL *restrict g,
                                 const REAL *restrict k, const REAL *restrict v, const REAL *restrict x,
                                 REAL *restrict y, int heads, int first) {
    const VECTOR va = LOAD(v), vb = LOAD(v + LANES);
    VECTOR ya = (VECTOR){0}, yb = ya, za = ya, zb = ya;
    for (int64_t d = 0; d < D; d++, S += D) {
        VECTOR a = LOAD(S), b = LOAD(S + LANES);
        if (first) {
            a = g[d] * a + k[d] * va, b = g[d] * b + k[d] * vb;
            LOAD(S) = a, LOAD(S + LANES) = b;
        }
        ya += x[d] * a, yb += x[d] * b;
        if (heads == 2) za += x[D + d] * a, zb += x[D + d] * b;
    }
    LOAD(y) = scale * ya, LOAD(y + LANES) = scale * yb;
    if (heads == 2) LOAD(y + D) = scale * za, LOAD(y + D + LANES) = scale * zb;
}

/* Backward, rows are value channels.  The walk forward again: S[e][:] decays by g[:], y[:] = scale * sum of
   x[e] S[e][:], and the token is written, S[e][:] += v[e] k[:]. */
INLINE void TYPED(read_and_write)(int64_t D, REAL scale, REAL *restrict S, const REAL *restrict g,
                                 const REAL *restrict k, const REAL *restrict v, const REAL *restrict x,
                                 REAL *restrict y, int heads, int first, int last) {
    const VECTOR ga = LOAD(g), gb = LOAD(g + LANES), ka = LOAD(k), kb = LOAD(k + LANES);
    VECTOR ya = (VECTOR){0}, yb = ya, za = ya, zb = ya;
    for (int64_t e = 0; e < D; e++, S += D) {
        VECTOR a = LOAD(S), b = LOAD(S + LANES);
        if (first) a *= ga, b *= gb;
        ya += x[e] * a, yb += x[e] * b;
        if (heads == 2) za += x[D + e] * a, zb += x[D + e] * b;
        if (last) a += v[e] * ka, b += v[e] * kb;
        if (first || last) LOAD(S) = a, LOAD(S + LANES) = b;
    }
    LOAD(y) = scale * ya, LOAD(y + LANES) = scale * yb;
    if (heads == 2) LOAD(y + D) = scale * za, LOAD(y + D + LANES) = scale * zb;
}

/* The walk back, dS the gradient of a state.  What comes from later tokens, dk[:] = sum of v[e] dS[e][:]; the heads'
   read-outs, dS[e][:] += scale * w[e] q[:]; LANES sums for each dv[e] = sum of k[:] dS[e][:]; the decay. */
INLINE void TYPED(back)(int64_t D, REAL scale, REAL *restrict dS, const REAL *restrict g, const REAL *restrict k,
                       const REAL *restrict v, const REAL *restrict w, const REAL *restrict q, REAL *restrict dk,
                       REAL *restrict dv, int heads, int first, int last) {
    const VECTOR ga = LOAD(g), gb = LOAD(g + LANES), ka = LOAD(k), kb = LOAD(k + LANES);
    const VECTOR qa = scale * LOAD(q), qb = scale * LOAD(q + LANES);
    VECTOR ra = qa, rb = qb, ya = (VECTOR){0}, yb = ya;
    if (heads == 2) ra = scale * LOAD(q + D), rb = scale * LOAD(q + D + LANES);
    for (int64_t e = 0; e < D; e++, dS += D) {
        VECTOR a = LOAD(dS), b = LOAD(dS + LANES);
        if (first) ya += v[e] * a, yb += v[e] * b;
        a += w[e] * qa, b += w[e] * qb;
        if (heads == 2) a += w[D + e] * ra, b += w[D + e] * rb;
        if (last) {
            LOAD(dv + e * LANES) += ka * a + kb * b;
            a *= ga, b *= gb;
        }
        LOAD(dS) = a, LOAD(dS + LANES) = b;
    }
    if (first) LOAD(dk) = ya, LOAD(dk + LANES) = yb;
}
