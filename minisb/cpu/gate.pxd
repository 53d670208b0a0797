# Gates for other modules: the one tied to the key for heads.pyx, which splits q, k and v on the way, and a row of the
# low-rank one for decode.pyx.
from libc.math cimport fabs
from libc.stdint cimport int64_t

from minisb.cpu.common cimport exp_real, log1p_real, real


cdef inline void tied_gate(const real* z, real* k, real* log_g, int64_t n) noexcept nogil:
    """k = sigmoid(z) and log(1 - k), see ops/gate.py."""
    cdef int64_t i
    cdef real e, most
    for i in range(n):
        e = exp_real(-<real>fabs(z[i]))
        most = <real>0 if z[i] < 0 else z[i]
        k[i] = (e if z[i] < 0 else <real>1) / (<real>1 + e)
        log_g[i] = -most - log1p_real(e)


cdef inline void tied_gate_back(const real* dk, const real* dlog_g, const real* k, real* dz, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        dz[i] = k[i] * (dk[i] * (<real>1 - k[i]) - dlog_g[i])


cdef void log_gate_row(const real* z, real divisor, real* log_g, int64_t n) noexcept nogil
