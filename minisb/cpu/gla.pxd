# One token of linear attention, for decode.pyx: the same compiled function, hence the same bits.
from libc.stdint cimport int64_t

# Is it a head size for walk_token?
cdef bint walks(int64_t D) noexcept nogil

# gla_step for one key head with the usual scale: q, o (R,D), k, v, log_g (D), S (D,D)
cdef void walk_token(int64_t D, int64_t R, const float* q, const float* k, const float* v, const float* log_g,
                     float* S, float* o) noexcept nogil
