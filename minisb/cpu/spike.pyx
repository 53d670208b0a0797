"""ops/spike.py's fast twin: mean, threshold and rounding while the row is in L1 (spike.h).

The reference walks the array five times (|x|, mean, x / vth, rint, times vth); this one once.
Counts are the reference's wherever the mean is.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from minisb.cpu.common cimport real, team
from minisb.ops.spike import VTH_MAX, VTH_MIN, check_finite


cdef extern from "spike.h" nogil:
    float spike_row_float(const float* x, float* x_hat, int64_t n, float k, float least, float most)
    double spike_row_double(const double* x, double* x_hat, int64_t n, double k, double least, double most)


def spike_forward(be, x, k):
    if be.checked:
        check_finite(be, x)
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
        if real is float:
            vth[r] = spike_row_float(&x[r * C], &x_hat[r * C], C, k, least, most)
        else:
            vth[r] = spike_row_double(&x[r * C], &x_hat[r * C], C, k, least, most)


TWINS = {"spike_forward": spike_forward}
