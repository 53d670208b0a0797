"""ops/heads.py's fast twin: split and feature map in one pass, a token a step."""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from minisb.cpu.common cimport real, sigmoid_real, team
from minisb.cpu.gate cimport tied_gate, tied_gate_back
from minisb.ops.heads import ends


def relu_heads_forward(be, qkv, heads, kv_heads, head_dim):
    B, T, N = qkv.shape
    assert N >= ends(heads, kv_heads, head_dim)[2]
    q = np.empty((B, T, heads, head_dim), qkv.dtype)
    k, v = np.empty((B, T, kv_heads, head_dim), qkv.dtype), np.empty((B, T, kv_heads, head_dim), qkv.dtype)
    if qkv.strides[2] != qkv.itemsize:
        qkv = np.ascontiguousarray(qkv)
    if qkv.dtype == np.float32:
        _forward[float](be.threads, qkv, q.reshape(B * T, -1), k.reshape(B * T, -1), v.reshape(B * T, -1))
    else:
        _forward[double](be.threads, qkv, q.reshape(B * T, -1), k.reshape(B * T, -1), v.reshape(B * T, -1))
    return q, k, v, (q, k)


cdef _forward(int threads, const real[:, :, :] qkv, real[:, ::1] q, real[:, ::1] k, real[:, ::1] v):
    cdef int64_t T = qkv.shape[1], rows = q.shape[0], nq = q.shape[1], nk = k.shape[1], r
    cdef const real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        row = &qkv[r // T, r % T, 0]
        relu_row(row, &q[r, 0], nq)
        relu_row(row + nq, &k[r, 0], nk)
        memcpy(&v[r, 0], row + nq + nk, nk * sizeof(real))


cdef void relu_row(const real* x, real* y, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        y[i] = <real>0 if x[i] < 0 else x[i]  # NaN passes


def relu_heads_backward(be, dq, dk, dv, saved, dqkv):
    B, T, heads, head_dim = dq.shape
    assert dqkv.shape[:2] == (B, T) and dqkv.shape[2] >= ends(heads, dk.shape[2], head_dim)[2]
    assert dqkv.strides[2] == dqkv.itemsize, "rows of dqkv must be contiguous"
    dq, dk, dv, q, k = [np.ascontiguousarray(a).reshape(B * T, -1) for a in (dq, dk, dv, *saved)]
    if dq.dtype == np.float32:
        _backward[float](be.threads, dq, dk, dv, q, k, dqkv)
    else:
        _backward[double](be.threads, dq, dk, dv, q, k, dqkv)
    return dqkv


cdef _backward(int threads, const real[:, ::1] dq, const real[:, ::1] dk, const real[:, ::1] dv,
               const real[:, ::1] q, const real[:, ::1] k, real[:, :, :] dqkv):
    cdef int64_t T = dqkv.shape[1], rows = q.shape[0], nq = q.shape[1], nk = k.shape[1], r
    cdef real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        row = &dqkv[r // T, r % T, 0]
        _relu_backward(&dq[r, 0], &q[r, 0], row, nq)
        _relu_backward(&dk[r, 0], &k[r, 0], row + nq, nk)
        memcpy(row + nq + nk, &dv[r, 0], nk * sizeof(real))


cdef inline void _relu_backward(const real* dy, const real* y, real* dx, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef real d, passed
    for i in range(n):
        d = dy[i]
        passed = d if y[i] > 0 else <real>0
        dx[i] = passed if d == d else d  # NaN passes everywhere


def sigmoid_heads_forward(be, qkv, heads, kv_heads, head_dim, tied=False):
    B, T, N = qkv.shape
    assert N >= ends(heads, kv_heads, head_dim)[2]
    q = np.empty((B, T, heads, head_dim), qkv.dtype)
    k, v, log_g = [np.empty((B, T, kv_heads, head_dim), qkv.dtype) for _ in range(3)]
    if qkv.strides[2] != qkv.itemsize:
        qkv = np.ascontiguousarray(qkv)
    flat = [x.reshape(B * T, -1) for x in (q, k, v, log_g)]
    if qkv.dtype == np.float32:
        _sigmoid_forward[float](be.threads, qkv, *flat, tied)
    else:
        _sigmoid_forward[double](be.threads, qkv, *flat, tied)
    return q, k, v, log_g if tied else None, (q, k, tied)


cdef _sigmoid_forward(int threads, const real[:, :, :] qkv, real[:, ::1] q, real[:, ::1] k, real[:, ::1] v,
                      real[:, ::1] log_g, bint tied):
    cdef int64_t T = qkv.shape[1], rows = q.shape[0], nq = q.shape[1], nk = k.shape[1], r
    cdef const real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        row = &qkv[r // T, r % T, 0]
        _sigmoid(row, &q[r, 0], nq)
        if tied:
            tied_gate(row + nq, &k[r, 0], &log_g[r, 0], nk)
        else:
            _sigmoid(row + nq, &k[r, 0], nk)
        memcpy(&v[r, 0], row + nq + nk, nk * sizeof(real))


cdef inline void _sigmoid(const real* x, real* y, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        y[i] = sigmoid_real(x[i])


def sigmoid_heads_backward(be, dq, dk, dv, dlog_g, saved, dqkv):
    q, k, tied = saved
    B, T, heads, head_dim = dq.shape
    assert dqkv.shape[:2] == (B, T) and dqkv.shape[2] >= ends(heads, dk.shape[2], head_dim)[2]
    assert dqkv.strides[2] == dqkv.itemsize, "rows of dqkv must be contiguous"
    dlog_g = dlog_g if tied else dk  # not read
    dq, dk, dv, dlog_g, q, k = [np.ascontiguousarray(a).reshape(B * T, -1) for a in (dq, dk, dv, dlog_g, q, k)]
    if dq.dtype == np.float32:
        _sigmoid_backward[float](be.threads, dq, dk, dv, dlog_g, q, k, tied, dqkv)
    else:
        _sigmoid_backward[double](be.threads, dq, dk, dv, dlog_g, q, k, tied, dqkv)
    return dqkv


cdef _sigmoid_backward(int threads, const real[:, ::1] dq, const real[:, ::1] dk, const real[:, ::1] dv,
                       const real[:, ::1] dlog_g, const real[:, ::1] q, const real[:, ::1] k, bint tied,
                       real[:, :, :] dqkv):
    cdef int64_t T = dqkv.shape[1], rows = q.shape[0], nq = q.shape[1], nk = k.shape[1], r
    cdef real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        row = &dqkv[r // T, r % T, 0]
        _sigmoid_back(&dq[r, 0], &q[r, 0], row, nq)
        if tied:
            tied_gate_back(&dk[r, 0], &dlog_g[r, 0], &k[r, 0], row + nq, nk)
        else:
            _sigmoid_back(&dk[r, 0], &k[r, 0], row + nq, nk)
        memcpy(row + nq + nk, &dv[r, 0], nk * sizeof(real))


cdef inline void _sigmoid_back(const real* dy, const real* y, real* dx, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        dx[i] = dy[i] * y[i] * (<real>1 - y[i])


TWINS = {
    "relu_heads_forward": relu_heads_forward,
    "relu_heads_backward": relu_heads_backward,
    "sigmoid_heads_forward": sigmoid_heads_forward,
    "sigmoid_heads_backward": sigmoid_heads_backward,
}
