# A row of rope, for decode.pyx: the same compiled function, hence the same bits.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef void rotate_heads(const real* x, real* y, const real* cos, const real* sin, int64_t n, int64_t half,
                       real direction) noexcept nogil
