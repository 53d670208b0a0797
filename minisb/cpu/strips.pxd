# The large products of gemm.h, by C type.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef extern from "linear.h" nogil:
    enum: TILE_ROWS, TILE_BYTES, BLOCK_K, BLOCK_STRIPS, STRIPS_PAY
    void gemm_pack_float(int tb, int64_t k, int64_t n, const float* b, int64_t ldb, float* packed, int64_t first,
                         int64_t last)
    void gemm_pack_double(int tb, int64_t k, int64_t n, const double* b, int64_t ldb, double* packed, int64_t first,
                          int64_t last)
    void gemm_strips_float(int ta, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* packed,
                           int accumulate, float* c, int64_t ldc, int64_t first, int64_t last, float* own)
    void gemm_strips_double(int ta, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda,
                            const double* packed, int accumulate, double* c, int64_t ldc, int64_t first, int64_t last,
                            double* own)


cdef inline void pack_panels(int tb, int64_t k, int64_t n, const real* b, int64_t ldb, real* packed, int64_t first,
                             int64_t last) noexcept nogil:
    """Panels first .. last-1 of op(b)."""
    if real is float:
        gemm_pack_float(tb, k, n, b, ldb, packed, first, last)
    else:
        gemm_pack_double(tb, k, n, b, ldb, packed, first, last)


cdef inline void multiply_strips(int ta, int64_t m, int64_t n, int64_t k, const real* a, int64_t lda,
                                 const real* packed, int accumulate, real* c, int64_t ldc, int64_t first, int64_t last,
                                 real* own) noexcept nogil:
    """Strips first .. last-1 of c (+)= op(a) times the packed panels."""
    if real is float:
        gemm_strips_float(ta, m, n, k, a, lda, packed, accumulate, c, ldc, first, last, own)
    else:
        gemm_strips_double(ta, m, n, k, a, lda, packed, accumulate, c, ldc, first, last, own)


cdef inline void dots(int64_t n, int64_t k, const real* x, const real* w, int64_t ldw, real beta,
                      real* y) noexcept nogil:
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
