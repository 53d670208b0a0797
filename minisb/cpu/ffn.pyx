"""ops/ffn.py's fast twin: a block of rows goes through both products and the SwiGLU between them at once.

Rows do not depend on each other, so what one product wrote is read by the next while it is in the second
cache, and threads meet once instead of after every step.  The weights' gradients are sums over all rows.
Backward adds a few blocks at a time: while rows are in cache, what these products read is packed for them,
and neither h nor the gradient between the products ever goes to memory.  Blocks are handed out as threads come
free; each value is summed by one thread in one order, so bits depend neither on blocks nor on threads.
"""

import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real
from minisb.cpu.strips cimport (
    BLOCK_STRIPS, DEPTH, OWN, STRIPS_PAY, TALL_ROWS, TILE_BYTES, TOGETHER, add_sum, keep_rows, multiply_strips,
    pack_panels,
)
from minisb.cpu.swiglu cimport swiglu_again_row, swiglu_row

from minisb.cpu.linear import packed_room, room
from minisb.ops import ffn as reference

cdef int64_t BYTES = 256 * 1024  # of gate, up and h in a block, about: half of a small second cache


def ffn_forward(be, x, w_in, w_out):
    """See ops/ffn.py."""
    C, F = x.shape[x.ndim - 1], w_out.shape[1]
    rows, w_in, w_out = np.ascontiguousarray(x).reshape(-1, C), np.ascontiguousarray(w_in), np.ascontiguousarray(w_out)
    N = len(rows)
    if not _pays(N, C, F):
        return reference.ffn_forward.reference(be, x, w_in, w_out)
    gate_up, y = np.empty((N, 2 * F), x.dtype), np.empty((N, C), x.dtype)
    packed_in, packed_out = packed_room("in", C, 2 * F, x.dtype), packed_room("out", F, C, x.dtype)
    own = room("own", be.threads * _own(_rows(F, x.itemsize) * F), x.dtype)
    if x.dtype == np.float32:
        _forward[float](be.threads, rows, w_in, w_out, gate_up, y, packed_in, packed_out, own)
    else:
        _forward[double](be.threads, rows, w_in, w_out, gate_up, y, packed_in, packed_out, own)
    return y.reshape(x.shape), (x, gate_up.reshape(*x.shape[: x.ndim - 1], 2 * F), None)


def ffn_backward(be, dy, saved, w_in, w_out, dw_in, dw_out):
    """See ops/ffn.py."""
    x, gate_up, _ = saved
    C, F = dy.shape[dy.ndim - 1], w_out.shape[1]
    rows = np.ascontiguousarray(dy).reshape(-1, C)
    N = len(rows)
    if not _pays(N, C, F):
        return reference.ffn_backward.reference(be, dy, saved, w_in, w_out, dw_in, dw_out)
    w_in, w_out, gate_up, x = [np.ascontiguousarray(a) for a in (w_in, w_out, gate_up, x)]
    dx = np.empty((N, C), dy.dtype)
    packed = [packed_room("in", C, 2 * F, dy.dtype), packed_room("out", F, C, dy.dtype)]
    kept = [packed_room(name, TOGETHER, n, dy.dtype) for name, n in (("d", 2 * F), ("x", C), ("dy", C), ("h", F))]
    own = room("own", be.threads * _own(3 * _rows(F, dy.itemsize) * F), dy.dtype)
    arrays = rows, x.reshape(N, C), gate_up.reshape(N, 2 * F), w_in, w_out, dx, dw_in, dw_out, *packed, *kept, own
    if dy.dtype == np.float32:
        _backward[float](be.threads, *arrays)
    else:
        _backward[double](be.threads, *arrays)
    return dx.reshape(dy.shape)


cdef bint _pays(int64_t N, int64_t C, int64_t F):
    return STRIPS_PAY and N >= 4 * TALL_ROWS and N * C * F > 1 << 18


cdef int64_t _rows(int64_t F, int64_t size) noexcept nogil:
    """Of a block: whole strips, and DEPTH is a multiple."""
    cdef int64_t strips = BLOCK_STRIPS
    while strips > 2 and (DEPTH % (strips * TALL_ROWS) or strips * TALL_ROWS * 3 * F * size > BYTES):
        strips -= 1
    return strips * TALL_ROWS


cdef int64_t _own(int64_t values):
    """A thread's own room: for packed strips, and so many values.  Whole cache lines."""
    return (OWN + values + TILE_BYTES) // TILE_BYTES * TILE_BYTES


cdef _forward(int threads, const real[:, ::1] x, const real[:, ::1] w_in, const real[:, ::1] w_out,
              real[:, ::1] gate_up, real[:, ::1] y, real[::1] packed_in, real[::1] packed_out, real[::1] own):
    cdef int64_t N = x.shape[0], C = x.shape[1], F = w_out.shape[1], i
    cdef int64_t size = _rows(F, sizeof(real)), share = own.shape[0] // threads // TILE_BYTES * TILE_BYTES
    with nogil, parallel(num_threads=threads):
        for i in prange(_panels(2 * F, sizeof(real)) + _panels(C, sizeof(real)), schedule="static"):
            _pack(1, C, F, &w_in[0, 0], &w_out[0, 0], &packed_in[0], &packed_out[0], i)
        for i in prange((N + size - 1) // size, schedule="dynamic"):
            _forward_rows(min(size, N - i * size), C, F, &x[i * size, 0], &packed_in[0], &packed_out[0],
                          &gate_up[i * size, 0], &own[threadid() * share + OWN], &y[i * size, 0],
                          &own[threadid() * share])


cdef void _forward_rows(int64_t rows, int64_t C, int64_t F, const real* x, const real* packed_in,
                        const real* packed_out, real* gate_up, real* h, real* y, real* own) noexcept nogil:
    cdef int64_t r, strips = (rows + TALL_ROWS - 1) // TALL_ROWS
    multiply_strips(0, rows, 2 * F, C, x, C, packed_in, 0, gate_up, 2 * F, 0, strips, own)
    for r in range(rows):
        swiglu_row(gate_up + 2 * r * F, gate_up + (2 * r + 1) * F, h + r * F, F)
    multiply_strips(0, rows, C, F, h, F, packed_out, 0, y, C, 0, strips, own)


cdef _backward(int threads, const real[:, ::1] dy, const real[:, ::1] x, const real[:, ::1] gate_up,
               const real[:, ::1] w_in, const real[:, ::1] w_out, real[:, ::1] dx, real[:, ::1] dw_in,
               real[:, ::1] dw_out, real[::1] packed_in, real[::1] packed_out, real[::1] kept_d, real[::1] kept_x,
               real[::1] kept_dy, real[::1] kept_h, real[::1] own):
    """h, d: a block's h and dgate_up.  kept_: packed for the weights' gradients; their longer parts come first."""
    cdef int64_t N = dy.shape[0], C = dy.shape[1], F = w_out.shape[1], part, at, all, n, i
    cdef int64_t size = _rows(F, sizeof(real)), share = own.shape[0] // threads // TILE_BYTES * TILE_BYTES
    cdef real *mine, *h, *d
    with nogil, parallel(num_threads=threads):
        mine = &own[threadid() * share]
        h = mine + OWN
        d = h + size * F
        for i in prange(_panels(C, sizeof(real)) + _panels(F, sizeof(real)), schedule="static"):
            _pack(0, C, F, &w_in[0, 0], &w_out[0, 0], &packed_in[0], &packed_out[0], i)
        for part in range((N + TOGETHER - 1) // TOGETHER):
            all = min(TOGETHER, N - part * TOGETHER)
            for i in prange((all + size - 1) // size, schedule="dynamic"):
                at, n = part * TOGETHER + i * size, min(size, all - i * size)
                _backward_rows(n, C, F, &dy[at, 0], &gate_up[at, 0], &packed_in[0], &packed_out[0], h, d, &dx[at, 0],
                               mine)
                keep_rows(1, 2 * F, n, d, 2 * F, i * size, all, &kept_d[0])
                keep_rows(0, C, n, &x[at, 0], C, i * size, all, &kept_x[0])
                keep_rows(1, C, n, &dy[at, 0], C, i * size, all, &kept_dy[0])
                keep_rows(0, F, n, h, F, i * size, all, &kept_h[0])
            for i in prange(6 * threads, schedule="dynamic"):
                if i < 2 * threads:
                    add_sum(C, F, all, &kept_dy[0], &kept_h[0], &dw_out[0, 0], F, i, 2 * threads)
                else:
                    add_sum(2 * F, C, all, &kept_d[0], &kept_x[0], &dw_in[0, 0], C, i - 2 * threads, 4 * threads)


cdef void _backward_rows(int64_t rows, int64_t C, int64_t F, const real* dy, const real* gate_up, const real* packed_in,
                         const real* packed_out, real* h, real* dgate_up, real* dx, real* own) noexcept nogil:
    """-> dgate_up, dx, and h, where dh was before."""
    cdef int64_t r, strips = (rows + TALL_ROWS - 1) // TALL_ROWS, gate, up
    multiply_strips(0, rows, F, C, dy, C, packed_out, 0, h, F, 0, strips, own)
    for r in range(rows):
        gate, up = 2 * r * F, (2 * r + 1) * F
        swiglu_again_row(h + r * F, gate_up + gate, gate_up + up, dgate_up + gate, dgate_up + up, F)
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
