"""ops/adamw.py's fast twin: one pass over p, g, m, v instead of a dozen."""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real, team

cdef int64_t BLOCK = 4096    # values a step of the update
cdef int64_t SLICE = 16384   # values of one partial sum of the norm: sums do not depend on threads


def grad_norm(be, g):
    g = np.ascontiguousarray(g).reshape(-1)
    partial = np.zeros((g.size + SLICE - 1) // SLICE)
    if g.dtype == np.float32:
        _squares[float](be.threads, g, partial)
    else:
        _squares[double](be.threads, g, partial)
    return float(np.sqrt(partial.sum()))


cdef _squares(int threads, const real[::1] g, double[::1] partial):
    cdef int64_t s, n = g.shape[0]
    for s in prange(partial.shape[0], nogil=True, schedule="static", num_threads=team(threads, n)):
        partial[s] = _squares_slice(&g[s * SLICE], min(SLICE, n - s * SLICE))


cdef inline double _squares_slice(const real* g, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef double total = 0
    for i in range(n):
        total += <double>g[i] * <double>g[i]
    return total


def adamw(be, p, g, m, v, decayed, lr, beta1, beta2, eps, weight_decay, step, g_scale, rounded=None):
    assert p.shape == g.shape == m.shape == v.shape
    scale_m, scale_v = lr / (1 - beta1**step), 1 / (1 - beta2**step)
    for part, keep in ((slice(0, decayed), 1 - lr * weight_decay), (slice(decayed, None), 1)):
        if p.dtype == np.float32:
            _adamw[float](be.threads, p[part], g[part], m[part], v[part], keep,
                          1 - beta1, 1 - beta2, scale_m, scale_v, eps, g_scale)
        else:
            _adamw[double](be.threads, p[part], g[part], m[part], v[part], keep,
                           1 - beta1, 1 - beta2, scale_m, scale_v, eps, g_scale)
    if rounded is not None:
        rounded[...] = p


cdef _adamw(int threads, real[::1] p, const real[::1] g, real[::1] m, real[::1] v, real keep, real new_m, real new_v,
            real scale_m, real scale_v, real eps, real g_scale):
    cdef int64_t b, at, n = p.shape[0]
    for b in prange((n + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=team(threads, n)):
        at = b * BLOCK
        _adamw_block(&p[at], &g[at], &m[at], &v[at], min(BLOCK, n - at), keep, new_m, new_v,
                     scale_m, scale_v, eps, g_scale)


cdef inline void _adamw_block(real* p, const real* g, real* m, real* v, int64_t n, real keep, real new_m, real new_v,
                              real scale_m, real scale_v, real eps, real g_scale) noexcept nogil:
    cdef int64_t i
    cdef real gi, mi, vi
    for i in range(n):
        gi = g[i] * g_scale
        mi = m[i] + new_m * (gi - m[i])
        vi = v[i] + new_v * (gi * gi - v[i])
        m[i], v[i] = mi, vi
        p[i] = p[i] * keep - scale_m * mi / (<real>sqrt(vi * scale_v) + eps)


TWINS = {"grad_norm": grad_norm, "adamw": adamw}
