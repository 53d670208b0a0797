"""ops/cross_entropy.py's fast twin: a row of logits is read from memory once.

Maximum, exponentials, their sum and the gradient are taken while the row is in the near cache;
with `dloss` the exponentials are written over the logits, without it nothing is written.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport log
from libc.stdint cimport int64_t

from minisb.cpu.common cimport exp_real, real, row_max, team
from minisb.ops.cross_entropy import IGNORE

cdef int64_t SKIP = IGNORE


def cross_entropy(be, logits, targets, dloss=None):
    N, V = logits.shape
    rows = logits if logits.strides[1] == logits.itemsize else np.ascontiguousarray(logits)
    ids = np.ascontiguousarray(targets, np.int64)
    if N and not (IGNORE <= ids.min() and ids.max() < V):
        raise IndexError(f"targets run from {ids.min()} to {ids.max()}, there are {V} classes")
    losses = np.empty(N, logits.dtype)
    scale = np.empty(N, logits.dtype)
    if dloss is not None:
        assert logits.flags.writeable
        scale[...] = dloss
    if logits.dtype == np.float32:
        _rows[float](be.threads, rows, ids, losses, scale, dloss is not None)
    else:
        _rows[double](be.threads, rows, ids, losses, scale, dloss is not None)
    if dloss is not None and rows is not logits:
        logits[...] = rows
    return losses


cdef _rows(int threads, const real[:, :] logits, const int64_t[::1] ids, real[::1] losses, const real[::1] scale,
           bint write):
    cdef int64_t n, N = losses.shape[0], V = logits.shape[1]
    for n in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * V)):
        if write:
            losses[n] = _loss_and_gradient(<real*>&logits[n, 0], V, ids[n], scale[n])
        else:
            losses[n] = _loss(&logits[n, 0], V, ids[n])


cdef inline real _loss(const real* x, int64_t V, int64_t target) noexcept nogil:
    cdef int64_t j
    cdef real top = row_max(x, V), total = 0
    for j in range(V):
        total += exp_real(x[j] - top)
    return <real>0 if target == SKIP else <real>log(total) - (x[target] - top)


cdef inline real _loss_and_gradient(real* x, int64_t V, int64_t target, real scale) noexcept nogil:
    cdef int64_t j
    cdef real top = row_max(x, V), total = 0, at_target = x[0 if target == SKIP else target]
    for j in range(V):
        x[j] = exp_real(x[j] - top)
        total += x[j]
    if target == SKIP:
        scale *= 0
    for j in range(V):
        x[j] *= scale / total
    if target == SKIP:
        return 0
    x[target] -= scale
    return <real>log(total) - (at_target - top)


TWINS = {"cross_entropy": cross_entropy}
