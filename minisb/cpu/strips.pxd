# The large products of gemm.h, by C type.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef extern from "linear.h" nogil:
    enum: TALL_ROWS, TILE_BYTES, BLOCK_STRIPS, OWN, DEPTH, TOGETHER, STRIPS_PAY
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


cdef inline void keep_rows(bint left, int64_t n, int64_t rows, const real* x, int64_t ldx, int64_t at, int64_t all,
                           real* to) noexcept nogil:
    """Rows at .. of `all` rows x (all x n), packed for add_sum while they are in cache: left or right of its sum.
    They do not go beyond a multiple of DEPTH."""
    cdef int64_t unit = TALL_ROWS if left else TILE_BYTES // sizeof(real), count = (n + unit - 1) // unit
    cdef int64_t first = at // DEPTH * DEPTH, depth = min(DEPTH, all - first)
    to += (first * count + at - first) * unit
    if real is float:
        if left:
            slice_strips_float(n, rows, x, ldx, depth, to, 0, count)
        else:
            slice_panels_float(n, rows, x, ldx, depth, to, 0, count)
    else:
        if left:
            slice_strips_double(n, rows, x, ldx, depth, to, 0, count)
        else:
            slice_panels_double(n, rows, x, ldx, depth, to, 0, count)


cdef inline void add_sum(int64_t m, int64_t n, int64_t all, const real* left, const real* right, real* c, int64_t ldc,
                         int64_t i, int64_t parts) noexcept nogil:
    """Part i of c (m x n) += x^T y, of which keep_rows packed all the rows."""
    cdef int64_t count = (m + TALL_ROWS - 1) // TALL_ROWS, unit = TILE_BYTES // sizeof(real)
    cdef int64_t wide = (n + unit - 1) // unit * unit, first = count * i // parts, last = count * (i + 1) // parts
    cdef int64_t block, depth
    for block in range((all + DEPTH - 1) // DEPTH):
        depth = min(DEPTH, all - block * DEPTH)
        if real is float:
            gemm_block_float(m, n, depth, left + (block * DEPTH * count + first * depth) * TALL_ROWS, NULL, 0,
                             right + block * DEPTH * wide, 1, c, ldc, first, last)
        else:
            gemm_block_double(m, n, depth, left + (block * DEPTH * count + first * depth) * TALL_ROWS, NULL, 0,
                              right + block * DEPTH * wide, 1, c, ldc, first, last)


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
