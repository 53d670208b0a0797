"""ops/linear.py's fast twin: the matrix product of a training step, on all threads.

Three ways, chosen by shape alone: a single row (decoding) is a dot product a weight row; large
products go through our own strips (gemm.h); what is left goes to NumPy's BLAS, one slice a call
and a thread.  None cuts a sum by the number of threads, so 1, 2 and 4 threads give the same bits,
and BLAS's own pool of threads, which would fight with OpenMP's, stays asleep.

Backward is one operation: what dw is a sum of is packed while dx brings it into the cache.
"""

import threading

import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t

from minisb import blas
from minisb.cpu.common cimport gemm_init, gemm_real, real
from minisb.cpu.strips cimport (
    BLOCK_STRIPS, DEPTH, OWN, STRIPS_PAY, TALL_ROWS, TILE_BYTES, TOGETHER, add_sum, dots, keep_rows,
    multiply_strips, pack_panels,
)

from minisb.ops import linear as reference

cdef object _addresses = blas.gemm_addresses()
gemm_init(_addresses[0], _addresses[1], _addresses[2])

cdef int64_t SLICE = 256   # rows of a slice, about
cdef int64_t MOST = 16     # slices at most: each one packs the other matrix again
cdef int64_t BLOCK = DEPTH // 2  # rows of dx that a thread takes at a time


def linear_forward(be, x, w, b=None, out=None):
    """See ops/linear.py."""
    last = x.ndim - 1
    y = np.empty((*x.shape[:last], w.shape[0]), x.dtype) if out is None else out
    gemm(be, x.reshape(-1, x.shape[last]), w, out=y.reshape(-1, w.shape[0]), tb=True, bias=b)
    return y


def linear_backward(be, dy, x, w, dw, db=None, dx=None):
    """See ops/linear.py.  Rows of dy and x are packed for dw while they are in cache for dx."""
    O, I = w.shape
    rows, xs = _rows(dy.reshape(-1, O)), _rows(x.reshape(-1, I))
    N = len(rows)
    if not STRIPS_PAY or N < 4 * TALL_ROWS or N * O * I <= 1 << 15:
        return reference.linear_backward.reference(be, dy, x, w, dw, db, dx)
    accumulate = dx is not None
    if dx is None:
        dx = np.empty((*dy.shape[: dy.ndim - 1], I), dy.dtype)
    blocks = (N + BLOCK - 1) // BLOCK
    partial = np.zeros((blocks, 0 if db is None else db.size), dy.dtype)
    packed = packed_room("packed", O, I, dy.dtype)
    kept = [packed_room("dy", TOGETHER, O, dy.dtype), packed_room("x", TOGETHER, I, dy.dtype)]
    own = room("own", be.threads * OWN, dy.dtype)
    arrays = rows, xs, w, dw, dx.reshape(-1, I), partial, packed, *kept, own
    if dy.dtype == np.float32:
        _backward[float](be.threads, accumulate, *arrays)
    else:
        _backward[double](be.threads, accumulate, *arrays)
    if db is not None:
        db += partial.sum(0)
    return dx


cdef _backward(int threads, bint accumulate, const real[:, :] dy, const real[:, :] x, const real[:, :] w, real[:, :] dw,
               real[:, ::1] dx, real[:, ::1] partial, real[::1] packed, real[::1] kept_dy, real[::1] kept_x,
               real[::1] own):
    cdef int64_t N = dy.shape[0], O = w.shape[0], I = w.shape[1], J = partial.shape[1], n, part, at, all, i, r, j
    cdef int64_t ldy = dy.strides[0] // sizeof(real), ldx = x.strides[0] // sizeof(real)
    cdef int64_t panels = (I * sizeof(real) + TILE_BYTES - 1) // TILE_BYTES
    cdef int used = threads if N * O * I > 1 << 18 else 1
    with nogil, parallel(num_threads=used):
        for i in prange(used, schedule="static"):
            pack_panels(0, O, I, &w[0, 0], w.strides[0] // sizeof(real), &packed[0], panels * i // used,
                        panels * (i + 1) // used)
        for part in range((N + TOGETHER - 1) // TOGETHER):
            all = min(TOGETHER, N - part * TOGETHER)
            for i in prange((all + BLOCK - 1) // BLOCK, schedule="dynamic"):
                at, n = part * TOGETHER + i * BLOCK, min(BLOCK, all - i * BLOCK)
                multiply_strips(0, n, I, O, &dy[at, 0], ldy, &packed[0], accumulate, &dx[at, 0], I, 0,
                                (n + TALL_ROWS - 1) // TALL_ROWS, &own[threadid() * OWN])
                keep_rows(1, O, n, &dy[at, 0], ldy, i * BLOCK, all, &kept_dy[0])
                keep_rows(0, I, n, &x[at, 0], ldx, i * BLOCK, all, &kept_x[0])
                for r in range(n if J else 0):
                    for j in range(J):
                        partial[at // BLOCK, j] += dy[at + r, j]
            for i in prange(4 * used, schedule="dynamic"):
                add_sum(O, I, all, &kept_dy[0], &kept_x[0], &dw[0, 0], dw.strides[0] // sizeof(real), i, 4 * used)


def gemm(be, a, b, out=None, bint ta=False, bint tb=False, bint accumulate=False, bias=None):
    """op(a) @ op(b), see Backend.gemm.  Last axes must be contiguous, as NumPy makes them.

    bias (J,): added to the first J columns of every row.
    """
    m, k = (a.shape[1], a.shape[0]) if ta else (a.shape[0], a.shape[1])
    n = b.shape[0] if tb else b.shape[1]
    assert k == (b.shape[1] if tb else b.shape[0]), f"inner sizes differ: {a.shape} {b.shape} {ta} {tb}"
    if out is None:
        out = np.empty((m, n), a.dtype)
    assert out.shape == (m, n) and a.dtype == b.dtype == out.dtype
    a, b = _rows(a), _rows(b)
    if STRIPS_PAY and m >= 4 * TALL_ROWS and m * n * k > 1 << 15:
        packed = room("packed", k * (n + TILE_BYTES // a.itemsize), a.dtype)
        if a.dtype == np.float32:
            _by_strips[float](be.threads, a, b, out, packed, ta, tb, accumulate, m, n, k, bias, a.dtype)
        else:
            _by_strips[double](be.threads, a, b, out, packed, ta, tb, accumulate, m, n, k, bias, a.dtype)
        return out
    if a.dtype == np.float32:
        _by_slices[float](be.threads, a, b, out, ta, tb, accumulate, m, n, k)
    else:
        _by_slices[double](be.threads, a, b, out, ta, tb, accumulate, m, n, k)
    if bias is not None:
        out[:, : bias.size] += bias
    return out


_kept = threading.local()


def room(str name, int64_t size, dtype):
    """Room for `size` values, kept for the next product: its memory is in cache then.  It starts on a
    cache line, so that a vector never lies across two."""
    rooms = _kept.__dict__
    kept = rooms.get((name, dtype))
    if kept is None or kept.size < size:
        kept = np.empty(size + 64 // dtype.itemsize, dtype)
        kept = rooms[name, dtype] = kept[-kept.ctypes.data % 64 // dtype.itemsize :]
    return kept


def packed_room(name, int64_t k, int64_t n, dtype):
    """Room for a matrix packed in either direction."""
    return room(name, (k + TILE_BYTES) * (n + TILE_BYTES), dtype)


def _rows(x):
    """x itself if its rows are contiguous, else a copy."""
    return x if x.strides[1] == x.itemsize or x.shape[1] == 1 else np.ascontiguousarray(x)


cdef _by_strips(int threads, real[:, :] a, real[:, :] b, real[:, :] c, real[::1] packed, bint ta, bint tb,
                bint accumulate, int64_t m, int64_t n, int64_t k, const real[::1] bias, dtype):
    """Pack b, then compute strips of c; a thread takes a range of panels, then blocks of strips."""
    cdef int64_t lda = a.strides[0] // sizeof(real), ldb = b.strides[0] // sizeof(real)
    cdef int64_t ldc = c.strides[0] // sizeof(real), i
    cdef int64_t columns = TILE_BYTES // sizeof(real)
    cdef int64_t panels = (n + columns - 1) // columns, strips = (m + TALL_ROWS - 1) // TALL_ROWS
    cdef int used = threads if m * n * k > 1 << 18 else 1
    # Few strips are shared out evenly, so that each thread reads the packed panels once.
    cdef int64_t blocks = strips // BLOCK_STRIPS if strips > 4 * used * BLOCK_STRIPS else used
    cdef real[::1] own = room("own", used * OWN, dtype)
    cdef const real* added = NULL if bias is None else &bias[0]
    cdef int64_t biased = 0 if bias is None else bias.shape[0]
    with nogil, parallel(num_threads=used):
        for i in prange(used, schedule="static"):
            pack_panels(tb, k, n, &b[0, 0], ldb, &packed[0], panels * i // used, panels * (i + 1) // used)
        for i in prange(blocks, schedule="dynamic"):
            multiply_strips(ta, m, n, k, &a[0, 0], lda, &packed[0], accumulate, &c[0, 0], ldc,
                            strips * i // blocks, strips * (i + 1) // blocks, &own[threadid() * OWN])
            _add_bias(added, biased, &c[0, 0], ldc, strips * i // blocks * TALL_ROWS,
                      min(m, strips * (i + 1) // blocks * TALL_ROWS))


cdef inline void _add_bias(const real* bias, int64_t columns, real* c, int64_t ldc, int64_t first,
                           int64_t last) noexcept nogil:
    """To rows first .. last-1, while they are in cache."""
    cdef int64_t i, j
    for i in range(first if columns else last, last):
        for j in range(columns):
            c[i * ldc + j] += bias[j]


cdef _by_slices(int threads, real[:, :] a, real[:, :] b, real[:, :] c, bint ta, bint tb, bint accumulate,
           int64_t m, int64_t n, int64_t k):
    """Cut the longer side of the result into slices and compute them in parallel."""
    cdef int64_t lda = a.strides[0] // sizeof(real), ldb = b.strides[0] // sizeof(real)
    cdef int64_t ldc = c.strides[0] // sizeof(real), i, start, size
    cdef real beta = 1 if accumulate else 0
    cdef bint by_rows = m >= n
    cdef int64_t length = m if by_rows else n
    cdef int64_t slices = max(1, min(MOST, length // SLICE, m * n * k >> 17))
    cdef real* pa = &a[0, 0]
    cdef real* pb = &b[0, 0]
    cdef real* pc = &c[0, 0]
    if slices == 1 and m * n * k > 1 << 18 and length >= 64:
        slices = 2  # a short but heavy product (a weight gradient): two threads at least
    cdef bint by_dots = m == 1 and tb and not ta
    for i in prange(slices, nogil=True, schedule="static", num_threads=min(threads, slices)):
        start = length * i // slices
        size = length * (i + 1) // slices - start
        if by_dots:
            dots(size, k, pa, pb + start * ldb, ldb, beta, pc + start)
        elif by_rows:
            gemm_real(ta, tb, size, n, k, <real>1, pa + (start if ta else start * lda), lda, pb, ldb,
                      beta, pc + start * ldc, ldc)
        else:
            gemm_real(ta, tb, m, size, k, <real>1, pa, lda, pb + (start * ldb if tb else start), ldb,
                      beta, pc + start, ldc)


TWINS = {"linear_forward": linear_forward, "linear_backward": linear_backward}
