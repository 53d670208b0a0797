# Norms for decode.pyx: the same compiled loop, hence the same bits.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

# z = x + delta and its norm y, both (rows,C); z NULL: the norm of x.  w (C), rstd (rows)
cdef void norm_rows(int threads, const real* x, const real* delta, const real* w, real eps, int64_t rows, int64_t C,
                    real* z, real* y, real* rstd) noexcept nogil
