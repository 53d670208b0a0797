"""ops/rope.py's fast twin: split and rotation in one pass, a token a step."""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from minisb.cpu.common cimport real, team
from minisb.ops.heads import ends


def rope_forward(be, qkv, cos, sin, heads, kv_heads, head_dim):
    B, T, N = qkv.shape
    assert N >= ends(heads, kv_heads, head_dim)[2] and cos.shape == sin.shape == (T, head_dim / 2)
    q = np.empty((B, T, heads, head_dim), qkv.dtype)
    k, v = np.empty((B, T, kv_heads, head_dim), qkv.dtype), np.empty((B, T, kv_heads, head_dim), qkv.dtype)
    if qkv.strides[2] != qkv.itemsize:
        qkv = np.ascontiguousarray(qkv)
    cos, sin = np.ascontiguousarray(cos, qkv.dtype), np.ascontiguousarray(sin, qkv.dtype)
    if qkv.dtype == np.float32:
        _forward[float](be.threads, qkv, cos, sin, q.reshape(B * T, -1), k.reshape(B * T, -1), v.reshape(B * T, -1))
    else:
        _forward[double](be.threads, qkv, cos, sin, q.reshape(B * T, -1), k.reshape(B * T, -1), v.reshape(B * T, -1))
    return q, k, v


cdef _forward(int threads, const real[:, :, :] qkv, const real[:, ::1] cos, const real[:, ::1] sin,
              real[:, ::1] q, real[:, ::1] k, real[:, ::1] v):
    cdef int64_t T = qkv.shape[1], rows = q.shape[0], nq = q.shape[1], nk = k.shape[1], half = cos.shape[1], r, t
    cdef const real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        t = r % T
        row = &qkv[r // T, t, 0]
        rotate_heads(row, &q[r, 0], &cos[t, 0], &sin[t, 0], nq, half, 1)
        rotate_heads(row + nq, &k[r, 0], &cos[t, 0], &sin[t, 0], nk, half, 1)
        memcpy(&v[r, 0], row + nq + nk, nk * sizeof(real))


def rope_backward(be, dq, dk, dv, cos, sin, dqkv):
    B, T, heads, head_dim = dq.shape
    assert dqkv.shape[:2] == (B, T) and dqkv.shape[2] >= ends(heads, dk.shape[2], head_dim)[2]
    assert dqkv.strides[2] == dqkv.itemsize, "rows of dqkv must be contiguous"
    cos, sin = np.ascontiguousarray(cos, dq.dtype), np.ascontiguousarray(sin, dq.dtype)
    dq, dk, dv = [np.ascontiguousarray(a).reshape(B * T, -1) for a in (dq, dk, dv)]
    if dq.dtype == np.float32:
        _backward[float](be.threads, dq, dk, dv, cos, sin, dqkv)
    else:
        _backward[double](be.threads, dq, dk, dv, cos, sin, dqkv)
    return dqkv


cdef _backward(int threads, const real[:, ::1] dq, const real[:, ::1] dk, const real[:, ::1] dv,
               const real[:, ::1] cos, const real[:, ::1] sin, real[:, :, :] dqkv):
    cdef int64_t T = dqkv.shape[1], rows = dq.shape[0], nq = dq.shape[1], nk = dk.shape[1], half = cos.shape[1], r, t
    cdef real* row
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * (nq + 2 * nk))):
        t = r % T
        row = &dqkv[r // T, t, 0]
        rotate_heads(&dq[r, 0], row, &cos[t, 0], &sin[t, 0], nq, half, -1)
        rotate_heads(&dk[r, 0], row + nq, &cos[t, 0], &sin[t, 0], nk, half, -1)
        memcpy(row + nq + nk, &dv[r, 0], nk * sizeof(real))


cdef void rotate_heads(const real* x, real* y, const real* cos, const real* sin, int64_t n, int64_t half,
                       real direction) noexcept nogil:
    """n channels, heads of 2 * half; direction 1 turns, -1 turns back."""
    cdef int64_t h, start, i
    cdef real a, b, s
    for h in range(n // (2 * half)):
        start = 2 * half * h
        for i in range(half):
            a, b, s = x[start + i], x[start + half + i], direction * sin[i]
            y[start + i] = a * cos[i] - b * s
            y[start + half + i] = b * cos[i] + a * s


TWINS = {"rope_forward": rope_forward, "rope_backward": rope_backward}
