"""ops/ffn.py's fast twin: a block of rows goes through both products and the SwiGLU between them at once.

Rows do not depend on each other, so what the first product wrote is read by the next step while it is in
the second cache, and threads meet once instead of after every step.  Blocks are handed out as threads
come free; each value is summed by one thread in one order, so bits depend neither on blocks nor on threads.
Gradients of weights, sums over all rows, are products of their own.
"""

import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real
from minisb.cpu.strips cimport (
    BLOCK_K, BLOCK_STRIPS, STRIPS_PAY, TILE_BYTES, TILE_ROWS, multiply_strips, pack_panels,
)
from minisb.cpu.swiglu cimport swiglu_backward_row, swiglu_row

from minisb.cpu.linear import room
from minisb.ops import ffn as reference

cdef int64_t BYTES = 256 * 1024  # of gate, up and h in a block, about: half the second cache
cdef int64_t OWN = BLOCK_STRIPS * TILE_ROWS * BLOCK_K + TILE_BYTES  # values that a product of strips packs


def ffn_forward(be, x, w_in, w_out):
    """See ops/ffn.py."""
    C, F = x.shape[x.ndim - 1], w_out.shape[1]
    rows, w_in, w_out = np.ascontiguousarray(x).reshape(-1, C), np.ascontiguousarray(w_in), np.ascontiguousarray(w_out)
    N = len(rows)
    if not _pays(N, C, F):
        return reference.ffn_forward.reference(be, x, w_in, w_out)
    gate_up, h, y = [np.empty((N, n), x.dtype) for n in (2 * F, F, C)]
    packed_in, packed_out = _packed("in", C, 2 * F, x.dtype), _packed("out", F, C, x.dtype)
    own = room("own", be.threads * _own(0), x.dtype)
    if x.dtype == np.float32:
        _forward[float](be.threads, rows, w_in, w_out, gate_up, h, y, packed_in, packed_out, own)
    else:
        _forward[double](be.threads, rows, w_in, w_out, gate_up, h, y, packed_in, packed_out, own)
    lead = x.shape[: x.ndim - 1]
    return y.reshape(x.shape), (x, gate_up.reshape(*lead, 2 * F), h.reshape(*lead, F))


def ffn_backward(be, dy, saved, w_in, w_out, dw_in, dw_out):
    """See ops/ffn.py."""
    x, gate_up, h = saved
    C, F = dy.shape[dy.ndim - 1], w_out.shape[1]
    rows = np.ascontiguousarray(dy).reshape(-1, C)
    N = len(rows)
    if not _pays(N, C, F):
        return reference.ffn_backward.reference(be, dy, saved, w_in, w_out, dw_in, dw_out)
    w_in, w_out, gate_up = [np.ascontiguousarray(a) for a in (w_in, w_out, gate_up)]
    gate_up, dgate_up, dx = gate_up.reshape(N, 2 * F), np.empty((N, 2 * F), dy.dtype), np.empty((N, C), dy.dtype)
    packed_in, packed_out = _packed("in", C, 2 * F, dy.dtype), _packed("out", F, C, dy.dtype)
    own = room("own", be.threads * _own(_strips(F, dy.itemsize) * TILE_ROWS * F), dy.dtype)
    if dy.dtype == np.float32:
        _backward[float](be.threads, rows, gate_up, w_in, w_out, dgate_up, dx, packed_in, packed_out, own)
    else:
        _backward[double](be.threads, rows, gate_up, w_in, w_out, dgate_up, dx, packed_in, packed_out, own)
    be.gemm(rows, h.reshape(N, F), out=dw_out, ta=True, accumulate=True)
    be.gemm(dgate_up, x.reshape(N, C), out=dw_in, ta=True, accumulate=True)
    return dx.reshape(dy.shape)


cdef bint _pays(int64_t N, int64_t C, int64_t F):
    return STRIPS_PAY and N >= 4 * TILE_ROWS and N * C * F > 1 << 18


cdef int64_t _strips(int64_t F, int64_t size) noexcept nogil:
    """Of a block."""
    return max(2, min(BLOCK_STRIPS, BYTES // (3 * F * size * TILE_ROWS)))


cdef int64_t _own(int64_t values):
    """A thread's own room: for packed strips, and so many values.  Whole cache lines."""
    return (OWN + values + TILE_BYTES) // TILE_BYTES * TILE_BYTES


def _packed(name, int64_t k, int64_t n, dtype):
    """Room for a matrix packed in either direction."""
    return room(name, (k + TILE_BYTES) * (n + TILE_BYTES), dtype)


cdef _forward(int threads, const real[:, ::1] x, const real[:, ::1] w_in, const real[:, ::1] w_out,
              real[:, ::1] gate_up, real[:, ::1] h, real[:, ::1] y, real[::1] packed_in, real[::1] packed_out,
              real[::1] own):
    cdef int64_t N = x.shape[0], C = x.shape[1], F = h.shape[1], i
    cdef int64_t size = _strips(F, sizeof(real)) * TILE_ROWS, share = own.shape[0] // threads // TILE_BYTES * TILE_BYTES
    with nogil, parallel(num_threads=threads):
        for i in prange(_panels(2 * F, sizeof(real)) + _panels(C, sizeof(real)), schedule="static"):
            _pack(1, C, F, &w_in[0, 0], &w_out[0, 0], &packed_in[0], &packed_out[0], i)
        for i in prange((N + size - 1) // size, schedule="dynamic"):
            _forward_rows(min(size, N - i * size), C, F, &x[i * size, 0], &packed_in[0], &packed_out[0],
                          &gate_up[i * size, 0], &h[i * size, 0], &y[i * size, 0], &own[threadid() * share])


cdef void _forward_rows(int64_t rows, int64_t C, int64_t F, const real* x, const real* packed_in,
                        const real* packed_out, real* gate_up, real* h, real* y, real* own) noexcept nogil:
    cdef int64_t r, strips = (rows + TILE_ROWS - 1) // TILE_ROWS
    multiply_strips(0, rows, 2 * F, C, x, C, packed_in, 0, gate_up, 2 * F, 0, strips, own)
    for r in range(rows):
        swiglu_row(gate_up + 2 * r * F, gate_up + (2 * r + 1) * F, h + r * F, F)
    multiply_strips(0, rows, C, F, h, F, packed_out, 0, y, C, 0, strips, own)


cdef _backward(int threads, const real[:, ::1] dy, const real[:, ::1] gate_up, const real[:, ::1] w_in,
               const real[:, ::1] w_out, real[:, ::1] dgate_up, real[:, ::1] dx, real[::1] packed_in,
               real[::1] packed_out, real[::1] own):
    cdef int64_t N = dy.shape[0], C = dy.shape[1], F = w_out.shape[1], i
    cdef int64_t size = _strips(F, sizeof(real)) * TILE_ROWS, share = own.shape[0] // threads // TILE_BYTES * TILE_BYTES
    with nogil, parallel(num_threads=threads):
        for i in prange(_panels(C, sizeof(real)) + _panels(F, sizeof(real)), schedule="static"):
            _pack(0, C, F, &w_in[0, 0], &w_out[0, 0], &packed_in[0], &packed_out[0], i)
        for i in prange((N + size - 1) // size, schedule="dynamic"):
            _backward_rows(min(size, N - i * size), C, F, &dy[i * size, 0], &gate_up[i * size, 0], &packed_in[0],
                           &packed_out[0], &own[threadid() * share + OWN], &dgate_up[i * size, 0], &dx[i * size, 0],
                           &own[threadid() * share])


cdef void _backward_rows(int64_t rows, int64_t C, int64_t F, const real* dy, const real* gate_up, const real* packed_in,
                         const real* packed_out, real* dh, real* dgate_up, real* dx, real* own) noexcept nogil:
    cdef int64_t r, strips = (rows + TILE_ROWS - 1) // TILE_ROWS, gate, up
    multiply_strips(0, rows, F, C, dy, C, packed_out, 0, dh, F, 0, strips, own)
    for r in range(rows):
        gate, up = 2 * r * F, (2 * r + 1) * F
        swiglu_backward_row(dh + r * F, gate_up + gate, gate_up + up, dgate_up + gate, dgate_up + up, F)
    multiply_strips(0, rows, C, 2 * F, dgate_up, 2 * F, packed_in, 0, dx, C, 0, strips, own)


cdef inline int64_t _panels(int64_t n, int64_t size) noexcept nogil:
    return (n * size + TILE_BYTES - 1) // TILE_BYTES


cdef inline void _pack(int forward, int64_t C, int64_t F, const real* w_in, const real* w_out, real* packed_in,
                       real* packed_out, int64_t i) noexcept nogil:
    """Panel i of the two matrices, w_in's first: of their transposes forward, as they are backward."""
    cdef int64_t n_in = 2 * F if forward else C, n_out = C if forward else F, first = _panels(n_in, sizeof(real))
    if i < first:
        pack_panels(forward, 2 * F + C - n_in, n_in, w_in, C, packed_in, i, i + 1)
    else:
        pack_panels(forward, F + C - n_out, n_out, w_out, F, packed_out, i - first, i - first + 1)


TWINS = {"ffn_forward": ffn_forward, "ffn_backward": ffn_backward}
