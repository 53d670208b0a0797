# A row of swiglu, for decode.pyx and ffn.pyx: the same compiled function, hence the same bits.
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real

cdef void swiglu_row(const real* gate, const real* up, real* h, int64_t F) noexcept nogil
cdef void swiglu_again_row(real* h, const real* gate, const real* up, real* dgate, real* dup, int64_t F) noexcept nogil
