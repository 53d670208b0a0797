"""ops/swiglu.py's fast twin: one pass, no array for the sigmoid."""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real, sigmoid_real, team


def swiglu_forward(be, gate_up):
    gate_up = np.ascontiguousarray(gate_up)
    F = gate_up.shape[gate_up.ndim - 1] // 2
    assert gate_up.shape[gate_up.ndim - 1] == 2 * F
    h = np.empty_like(gate_up[..., :F], order="C")
    if h.dtype == np.float32:
        _forward[float](be.threads, gate_up.reshape(-1, 2 * F), h.reshape(-1, F))
    else:
        _forward[double](be.threads, gate_up.reshape(-1, 2 * F), h.reshape(-1, F))
    return h, gate_up


cdef _forward(int threads, const real[:, ::1] gate_up, real[:, ::1] h):
    cdef int64_t r, rows = h.shape[0], F = h.shape[1]
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * F)):
        swiglu_row(&gate_up[r, 0], &gate_up[r, F], &h[r, 0], F)


cdef void swiglu_row(const real* gate, const real* up, real* h, int64_t F) noexcept nogil:
    cdef int64_t i
    for i in range(F):
        h[i] = gate[i] * sigmoid_real(gate[i]) * up[i]


def swiglu_backward(be, dh, saved):
    gate_up, dh = np.ascontiguousarray(saved), np.ascontiguousarray(dh)
    F = dh.shape[dh.ndim - 1]
    assert gate_up[..., :F].shape == gate_up[..., F:].shape == dh.shape
    dgate_up = np.empty_like(gate_up)
    if dh.dtype == np.float32:
        _backward[float](be.threads, dh.reshape(-1, F), gate_up.reshape(-1, 2 * F), dgate_up.reshape(-1, 2 * F))
    else:
        _backward[double](be.threads, dh.reshape(-1, F), gate_up.reshape(-1, 2 * F), dgate_up.reshape(-1, 2 * F))
    return dgate_up


cdef _backward(int threads, const real[:, ::1] dh, const real[:, ::1] gate_up, real[:, ::1] dgate_up):
    cdef int64_t r, rows = dh.shape[0], F = dh.shape[1]
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * F)):
        _backward_row(&dh[r, 0], &gate_up[r, 0], &gate_up[r, F], &dgate_up[r, 0], &dgate_up[r, F], F)


cdef inline real _backward_value(real dh, real gate, real up, real* dgate, real* dup) noexcept nogil:
    """-> h, as forward had it: who has no use for it pays nothing."""
    cdef real s = sigmoid_real(gate), silu = gate * s
    dgate[0] = dh * up * (s + silu * (<real>1 - s))
    dup[0] = dh * silu
    return silu * up


cdef void _backward_row(const real* dh, const real* gate, const real* up, real* dgate, real* dup,
                        int64_t F) noexcept nogil:
    cdef int64_t i
    for i in range(F):
        _backward_value(dh[i], gate[i], up[i], dgate + i, dup + i)


cdef void swiglu_again_row(real* h, const real* gate, const real* up, real* dgate, real* dup, int64_t F) noexcept nogil:
    """dh in h -> dgate, dup, and in h what forward had there."""
    cdef int64_t i
    for i in range(F):
        h[i] = _backward_value(h[i], gate[i], up[i], dgate + i, dup + i)


TWINS = {"swiglu_forward": swiglu_forward, "swiglu_backward": swiglu_backward}
