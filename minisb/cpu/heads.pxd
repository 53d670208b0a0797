# A row of heads, for decode.pyx: the same compiled function, hence the same bits.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef void relu_row(const real* x, real* y, int64_t n) noexcept nogil
