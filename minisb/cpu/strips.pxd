# The large products of gemm.h, by C type.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef extern from "linear.h" nogil:
    enum: TALL_ROWS, TILE_BYTES, BLOCK_K, BLOCK_STRIPS, STRIPS_PAY
    void gemm_pack_float(int tb, int64_t k, int64_t n, const float* b, int64_t ldb, float* packed, int64_t first,
                         int64_t last)
    void gemm_pack_double(int tb, int64_t k, int64_t n, const double* b, int64_t ldb, double* packed, int64_t first,
                          int64_t last)
    void slice_strips_float(int64_t n, int64_t rows, const float* x, int64_t ldx, int64_t depth, float* to,
                            int64_t first, int64_t last)
    void slice_strips_double(int64_t n, int64_t rows, const double* x, int64_t ldx, int64_t depth, double* to,
                             int64_t first, int64_t last)
    void slice_panels_float(int64_t n, int64_t rows, const float* x, int64_t ldx, int64_t depth, float* to,
                            int64_t first, int64_t last)
    void slice_panels_double(int64_t n, int64_t rows, const double* x, int64_t ldx, int64_t depth, double* to,
                             int64_t first, int64_t last)
    void gemm_block_float(int64_t m, int64_t n, int64_t depth, const float* strips, const float* a, int64_t lda,
                          const float* panels, int add, float* c, int64_t ldc, int64_t first, int64_t last)
    void gemm_block_double(int64_t m, int64_t n, int64_t depth, const double* strips, const double* a, int64_t lda,
                           const double* panels, int add, double* c, int64_t ldc, int64_t first, int64_t last)
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


cdef inline void slice_rows(int64_t n, int64_t rows, const real* x, int64_t at, int64_t depth, real* strips,
                            real* panels) noexcept nogil:
    """Rows of x (rows x n) as rows at .. of x^T's packed strips (on the left of a product) or of x's packed
    panels (on its right), whichever is not NULL; `depth` rows in all."""
    cdef int64_t columns = TILE_BYTES // sizeof(real)
    cdef int64_t count = (n + TALL_ROWS - 1) // TALL_ROWS if strips else (n + columns - 1) // columns
    if real is float:
        if strips:
            slice_strips_float(n, rows, x, n, depth, strips + at * TALL_ROWS, 0, count)
        else:
            slice_panels_float(n, rows, x, n, depth, panels + at * columns, 0, count)
    else:
        if strips:
            slice_strips_double(n, rows, x, n, depth, strips + at * TALL_ROWS, 0, count)
        else:
            slice_panels_double(n, rows, x, n, depth, panels + at * columns, 0, count)


cdef inline void multiply_packed(int64_t m, int64_t n, int64_t depth, const real* strips, const real* panels, real* c,
                                 int64_t first, int64_t last) noexcept nogil:
    """Strips first .. last-1 of c (m x n) += those packed strips times the packed panels."""
    strips += first * depth * TALL_ROWS
    if real is float:
        gemm_block_float(m, n, depth, strips, NULL, 0, panels, 1, c, n, first, last)
    else:
        gemm_block_double(m, n, depth, strips, NULL, 0, panels, 1, c, n, first, last)


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
