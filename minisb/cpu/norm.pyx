"""ops/norm.py's fast twin: each row is read from memory once.

The reference writes x * x, x * rstd and every product as whole arrays; here a row stays in L1
between its sum and its scaling.  The gradient of w is summed in slices of rows whose number
depends on the shape only, and the slices are added in order: equal bits for any thread count.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real, team

cdef int64_t SLICES = 16


def rmsnorm_forward(be, x, w, eps):
    y, _, saved = _norm(be, x, None, w, eps)
    return y, saved


def add_rmsnorm_forward(be, x, delta, w, eps):
    y, z, saved = _norm(be, x, delta, w, eps)
    return z, y, saved


def rmsnorm_backward(be, dy, saved, dw):
    return _norm_backward(be, None, dy, saved, dw)


def add_rmsnorm_backward(be, dz, dy, saved, dw):
    return _norm_backward(be, dz, dy, saved, dw)


def _norm(be, x, delta, w, eps):
    x = np.ascontiguousarray(x)
    y, rstd = np.empty_like(x), np.empty_like(x[..., :1], order="C")
    z = x if delta is None else np.empty_like(x)
    delta = z if delta is None else np.ascontiguousarray(delta)
    assert x.shape == delta.shape and w.size == x.shape[x.ndim - 1]
    if x.dtype == np.float32:
        _forward[float](be.threads, x.reshape(-1), delta.reshape(-1), z.reshape(-1), y.reshape(-1), rstd.reshape(-1),
                        w, eps)
    else:
        _forward[double](be.threads, x.reshape(-1), delta.reshape(-1), z.reshape(-1), y.reshape(-1), rstd.reshape(-1),
                         w, eps)
    return y, z, (z, w, rstd)


cdef _forward(int threads, const real[::1] x, const real[::1] delta, const real[::1] z, real[::1] y, real[::1] rstd,
              const real[::1] w, real eps):
    cdef real* sum = NULL if &x[0] == &z[0] else <real*>&z[0]  # else z is the caller's x, which is only read
    with nogil:
        norm_rows(threads, &x[0], &delta[0], &w[0], eps, rstd.shape[0], w.shape[0], sum, &y[0], &rstd[0])


cdef void norm_rows(int threads, const real* x, const real* delta, const real* w, real eps, int64_t rows, int64_t C,
                    real* z, real* y, real* rstd) noexcept nogil:
    cdef int64_t r
    for r in prange(rows, schedule="static", num_threads=team(threads, rows * C)):
        if z != NULL:
            _sum_row(x + r * C, delta + r * C, z + r * C, C)
        rstd[r] = _norm_row((z if z != NULL else x) + r * C, w, y + r * C, C, eps)


cdef inline void _sum_row(const real* x, const real* delta, real* z, int64_t C) noexcept nogil:
    cdef int64_t c
    for c in range(C):
        z[c] = x[c] + delta[c]


cdef inline real _norm_row(const real* x, const real* w, real* y, int64_t C, real eps) noexcept nogil:
    cdef int64_t c
    cdef real total = 0, rstd
    for c in range(C):
        total += x[c] * x[c]
    rstd = <real>1 / <real>sqrt(total / C + eps)
    for c in range(C):
        y[c] = x[c] * rstd * w[c]
    return rstd


def _norm_backward(be, dz, dy, saved, dw):
    x, w, rstd = saved
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)
    add = dz is not None
    dz = np.ascontiguousarray(dz) if add else dy
    assert x.shape == dy.shape == dz.shape and dw.shape == w.shape
    dx = np.empty_like(x)
    partial = np.zeros((max(1, min(SLICES, rstd.size // 32)), w.size), x.dtype)
    rstd = np.ascontiguousarray(rstd)
    if x.dtype == np.float32:
        _backward[float](be.threads, dz.reshape(-1), dy.reshape(-1), x.reshape(-1), w, rstd.reshape(-1),
                         dx.reshape(-1), partial, add)
    else:
        _backward[double](be.threads, dz.reshape(-1), dy.reshape(-1), x.reshape(-1), w, rstd.reshape(-1),
                          dx.reshape(-1), partial, add)
    dw += partial.sum(0)
    return dx


cdef _backward(int threads, const real[::1] dz, const real[::1] dy, const real[::1] x, const real[::1] w,
               const real[::1] rstd, real[::1] dx, real[:, ::1] partial, bint add):
    cdef int64_t s, C = w.shape[0], rows = rstd.shape[0], slices = partial.shape[0]
    for s in prange(slices, nogil=True, schedule="static", num_threads=team(threads, rows * C)):
        _backward_rows(&dz[0], &dy[0], &x[0], &w[0], &rstd[0], &dx[0], &partial[s, 0], C,
                       rows * s // slices, rows * (s + 1) // slices, add)


cdef inline void _backward_rows(const real* dz, const real* dy, const real* x, const real* w, const real* rstd,
                                real* dx, real* dw, int64_t C, int64_t first, int64_t end, bint add) noexcept nogil:
    cdef int64_t r, c, at
    cdef real mean
    for r in range(first, end):
        at, mean = r * C, 0
        for c in range(C):
            mean += dy[at + c] * w[c] * x[at + c]
            dw[c] += dy[at + c] * x[at + c] * rstd[r]
        mean = mean * rstd[r] / C
        for c in range(C):
            dx[at + c] = rstd[r] * (dy[at + c] * w[c] - x[at + c] * rstd[r] * mean)
        if add:
            for c in range(C):
                dx[at + c] += dz[at + c]


TWINS = {
    "rmsnorm_forward": rmsnorm_forward,
    "rmsnorm_backward": rmsnorm_backward,
    "add_rmsnorm_forward": add_rmsnorm_forward,
    "add_rmsnorm_backward": add_rmsnorm_backward,
}
