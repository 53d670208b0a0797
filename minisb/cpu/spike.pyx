"""ops/spike.py's fast twin: mean, threshold and rounding while the row is in L1.

The reference walks the array five times (|x|, mean, x / vth, rint, times vth); this one once.
Counts are divided, not multiplied by a reciprocal, and rounded half to even, so that they are the
reference's wherever the mean is.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport fabs, rint
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real, team
from minisb.ops.spike import VTH_MAX, VTH_MIN


def spike_forward(be, x, k):
    x = np.ascontiguousarray(x)
    x_hat, vth = np.empty_like(x), np.empty_like(x[..., :1], order="C")
    if x.dtype == np.float32:
        _spike[float](be.threads, x.reshape(-1), x_hat.reshape(-1), vth.reshape(-1), k, VTH_MIN, VTH_MAX)
    else:
        _spike[double](be.threads, x.reshape(-1), x_hat.reshape(-1), vth.reshape(-1), k, VTH_MIN, VTH_MAX)
    return x_hat, vth


cdef _spike(int threads, const real[::1] x, real[::1] x_hat, real[::1] vth, real k, real least, real most):
    cdef int64_t r, rows = vth.shape[0], C = x.shape[0] // max(rows, 1)
    for r in prange(rows, nogil=True, schedule="static", num_threads=team(threads, rows * C)):
        vth[r] = _spike_row(&x[r * C], &x_hat[r * C], C, k, least, most)


cdef inline real _spike_row(const real* x, real* x_hat, int64_t C, real k, real least, real most) noexcept nogil:
    cdef int64_t c
    cdef real total = 0, vth
    for c in range(C):
        total += <real>fabs(x[c])
    vth = total / C / k
    vth = least if vth < least else vth  # NaN passes both
    vth = most if vth > most else vth
    for c in range(C):
        x_hat[c] = <real>rint(x[c] / vth) * vth
    return vth


TWINS = {"spike_forward": spike_forward}
