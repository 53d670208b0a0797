"""ops/gate.py's fast twin: exp and log1p as polynomials, one pass."""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport fabs
from libc.stdint cimport int64_t

from minisb.cpu.common cimport exp_real, log1p_real, real, sigmoid_real, team

cdef int64_t BLOCK = 4096


def log_gate_forward(be, z, divisor):
    x = np.ascontiguousarray(z)
    log_g = np.empty_like(x)
    if x.dtype == np.float32:
        _forward[float](be.threads, x.reshape(-1), divisor, log_g.reshape(-1))
    else:
        _forward[double](be.threads, x.reshape(-1), divisor, log_g.reshape(-1))
    return log_g, (z, divisor)


cdef _forward(int threads, const real[::1] z, real divisor, real[::1] log_g):
    cdef int64_t b, n = z.shape[0]
    for b in prange((n + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=team(threads, n)):
        log_gate_row(&z[b * BLOCK], divisor, &log_g[b * BLOCK], min(BLOCK, n - b * BLOCK))


cdef void log_gate_row(const real* z, real divisor, real* log_g, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef real least
    for i in range(n):
        least = <real>0 if z[i] > 0 else z[i]
        log_g[i] = (least - log1p_real(exp_real(-<real>fabs(z[i])))) / divisor


def log_gate_backward(be, dlog_g, saved):
    z, divisor = saved
    z, dlog_g = np.ascontiguousarray(z), np.ascontiguousarray(dlog_g)
    assert z.shape == dlog_g.shape
    dz = np.empty_like(z)
    if z.dtype == np.float32:
        _backward[float](be.threads, dlog_g.reshape(-1), z.reshape(-1), divisor, dz.reshape(-1))
    else:
        _backward[double](be.threads, dlog_g.reshape(-1), z.reshape(-1), divisor, dz.reshape(-1))
    return dz


cdef _backward(int threads, const real[::1] dlog_g, const real[::1] z, real divisor, real[::1] dz):
    cdef int64_t b, n = z.shape[0]
    for b in prange((n + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=team(threads, n)):
        _backward_block(&dlog_g[b * BLOCK], &z[b * BLOCK], divisor, &dz[b * BLOCK], min(BLOCK, n - b * BLOCK))


cdef inline void _backward_block(const real* dlog_g, const real* z, real divisor, real* dz, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        dz[i] = dlog_g[i] * sigmoid_real(-z[i]) / divisor


def tied_gate_forward(be, z):
    z = np.ascontiguousarray(z)
    k, log_g = np.empty_like(z), np.empty_like(z)
    if z.dtype == np.float32:
        _tied[float](be.threads, z.reshape(-1), k.reshape(-1), log_g.reshape(-1))
    else:
        _tied[double](be.threads, z.reshape(-1), k.reshape(-1), log_g.reshape(-1))
    return k, log_g, k


cdef _tied(int threads, const real[::1] z, real[::1] k, real[::1] log_g):
    cdef int64_t b, n = z.shape[0]
    for b in prange((n + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=team(threads, n)):
        tied_gate(&z[b * BLOCK], &k[b * BLOCK], &log_g[b * BLOCK], min(BLOCK, n - b * BLOCK))


def tied_gate_backward(be, dk, dlog_g, saved):
    k, dk, dlog_g = [np.ascontiguousarray(x) for x in (saved, dk, dlog_g)]
    assert k.shape == dk.shape == dlog_g.shape
    dz = np.empty_like(k)
    if k.dtype == np.float32:
        _tied_backward[float](be.threads, dk.reshape(-1), dlog_g.reshape(-1), k.reshape(-1), dz.reshape(-1))
    else:
        _tied_backward[double](be.threads, dk.reshape(-1), dlog_g.reshape(-1), k.reshape(-1), dz.reshape(-1))
    return dz


cdef _tied_backward(int threads, const real[::1] dk, const real[::1] dlog_g, const real[::1] k, real[::1] dz):
    cdef int64_t b, n = k.shape[0]
    for b in prange((n + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=team(threads, n)):
        tied_gate_back(&dk[b * BLOCK], &dlog_g[b * BLOCK], &k[b * BLOCK], &dz[b * BLOCK], min(BLOCK, n - b * BLOCK))


def elementary(x):
    """e^x, and log(1 + x) where 0 <= x <= 1, as every native computes them: for tests of vmath.h."""
    e, l = np.empty_like(x), np.empty_like(x)
    if x.dtype == np.float32:
        _elementary[float](x, e, l)
    else:
        _elementary[double](x, e, l)
    return e, l


cdef _elementary(const real[::1] x, real[::1] e, real[::1] l):
    cdef int64_t i
    cdef const real* px = &x[0]
    cdef real* pe = &e[0]
    cdef real* pl = &l[0]
    for i in range(x.shape[0]):
        pe[i], pl[i] = exp_real(px[i]), log1p_real(px[i])


TWINS = {
    "log_gate_forward": log_gate_forward,
    "log_gate_backward": log_gate_backward,
    "tied_gate_forward": tied_gate_forward,
    "tied_gate_backward": tied_gate_backward,
}
