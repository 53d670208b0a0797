# The small products of tile.h, by C type.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef extern from "tile.h" nogil:
    enum: TILE_ROWS, TILE_BYTES
    void strip_float(int64_t n, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                     int64_t ldb, int64_t hop, float* c, int64_t ldc, int add)
    void strip_double(int64_t n, int64_t depth, const double* a, int64_t row, int64_t step, const double* b,
                      int64_t ldb, int64_t hop, double* c, int64_t ldc, int add)


cdef inline void six_rows(int64_t n, int64_t depth, const real* a, int64_t row, int64_t step, const real* b,
                       int64_t ldb, int64_t hop, real* c, int64_t ldc, int add) noexcept nogil:
    """Six rows of c (+)= a b, see tile.h."""
    if real is float:
        strip_float(n, depth, a, row, step, b, ldb, hop, c, ldc, add)
    else:
        strip_double(n, depth, a, row, step, b, ldb, hop, c, ldc, add)
