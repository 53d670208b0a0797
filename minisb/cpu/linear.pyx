"""ops/linear.py's fast twin: NumPy's BLAS, one slice of the product a thread.

A product is cut into slices by its shape alone, never by the number of threads, and each slice
is one call of BLAS on one thread: the bits of the result are the same for 1, 2 and 4 threads.
OpenMP is then the only pool of threads in a training step.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from minisb import blas
from minisb.cpu.common cimport gemm_init, gemm_real, real

cdef object _addresses = blas.gemm_addresses()
gemm_init(_addresses[0], _addresses[1], _addresses[2])

cdef int64_t SLICE = 256   # rows of a slice, about
cdef int64_t MOST = 16     # slices at most: each one packs the other matrix again


def gemm(be, a, b, out=None, bint ta=False, bint tb=False, bint accumulate=False):
    """op(a) @ op(b), see Backend.gemm.  Last axes must be contiguous, as NumPy makes them."""
    m, k = (a.shape[1], a.shape[0]) if ta else (a.shape[0], a.shape[1])
    n = b.shape[0] if tb else b.shape[1]
    assert k == (b.shape[1] if tb else b.shape[0]), f"inner sizes differ: {a.shape} {b.shape} {ta} {tb}"
    if out is None:
        out = np.empty((m, n), a.dtype)
    assert out.shape == (m, n) and a.dtype == b.dtype == out.dtype
    if a.dtype == np.float32:
        _gemm[float](be.threads, _rows(a), _rows(b), out, ta, tb, accumulate, m, n, k)
    else:
        _gemm[double](be.threads, _rows(a), _rows(b), out, ta, tb, accumulate, m, n, k)
    return out


def _rows(x):
    """x itself if its rows are contiguous, else a copy."""
    return x if x.strides[1] == x.itemsize or x.shape[1] == 1 else np.ascontiguousarray(x)


cdef _gemm(int threads, real[:, :] a, real[:, :] b, real[:, :] c, bint ta, bint tb, bint accumulate,
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
    for i in prange(slices, nogil=True, schedule="static", num_threads=threads):
        start = length * i // slices
        size = length * (i + 1) // slices - start
        if by_dots:
            _dots(size, k, pa, pb + start * ldb, ldb, beta, pc + start)
        elif by_rows:
            gemm_real(ta, tb, size, n, k, <real>1, pa + (start if ta else start * lda), lda, pb, ldb,
                      beta, pc + start * ldc, ldc)
        else:
            gemm_real(ta, tb, m, size, k, <real>1, pa, lda, pb + (start * ldb if tb else start), ldb,
                      beta, pc + start, ldc)


cdef void _dots(int64_t n, int64_t k, const real* x, const real* w, int64_t ldw, real beta, real* y) noexcept nogil:
    """y = w x + beta y: one row times a matrix, as in decoding.  Four rows of w at a time."""
    cdef int64_t j = 0, p
    cdef real a, b, c, d
    while j + 4 <= n:
        a = b = c = d = 0
        for p in range(k):
            a += x[p] * w[p]
            b += x[p] * w[ldw + p]
            c += x[p] * w[2 * ldw + p]
            d += x[p] * w[3 * ldw + p]
        y[j] = a + (beta * y[j] if beta else 0)
        y[j + 1] = b + (beta * y[j + 1] if beta else 0)
        y[j + 2] = c + (beta * y[j + 2] if beta else 0)
        y[j + 3] = d + (beta * y[j + 3] if beta else 0)
        w += 4 * ldw
        j += 4
    while j < n:
        a = 0
        for p in range(k):
            a += x[p] * w[p]
        y[j] = a + (beta * y[j] if beta else 0)
        w += ldw
        j += 1


TWINS = {}
