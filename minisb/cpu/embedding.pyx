"""ops/embedding.py's fast twin: rows copied by several threads, gradients added without a sort.

Backward gives each thread a slice of the channels and all tokens: a row of the table receives its
contributions in token order, as np.add.at adds them, whatever the number of threads.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from minisb.cpu.common cimport real, team

cdef int64_t WIDTH = 32  # channels of a slice


def embedding_forward(be, tokens, table):
    table = np.ascontiguousarray(table)
    ids = _ids(tokens, table.shape[0])
    x = np.empty((*tokens.shape, table.shape[1]), table.dtype)
    if table.dtype == np.float32:
        _forward[float](be.threads, ids, table, x.reshape(-1, table.shape[1]))
    else:
        _forward[double](be.threads, ids, table, x.reshape(-1, table.shape[1]))
    return x


def _ids(tokens, V):
    """Flat int64 token ids, none below 0 or at V and above: C would read past the table."""
    ids = np.ascontiguousarray(tokens, np.int64).reshape(-1)
    if ids.size and not (0 <= ids.min() and ids.max() < V):
        raise IndexError(f"token ids run from {ids.min()} to {ids.max()}, the table has {V} rows")
    return ids


cdef _forward(int threads, const int64_t[::1] ids, const real[:, ::1] table, real[:, ::1] x):
    cdef int64_t i, N = ids.shape[0], C = table.shape[1]
    for i in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * C)):
        memcpy(&x[i, 0], &table[ids[i], 0], C * sizeof(real))


def embedding_backward(be, dx, tokens, dtable):
    dx = np.ascontiguousarray(dx).reshape(-1, dtable.shape[1])
    ids = _ids(tokens, dtable.shape[0])
    assert len(ids) == len(dx)
    if dtable.dtype == np.float32:
        _backward[float](be.threads, dx, ids, dtable)
    else:
        _backward[double](be.threads, dx, ids, dtable)


cdef _backward(int threads, const real[:, ::1] dx, const int64_t[::1] ids, real[:, ::1] dtable):
    cdef int64_t s, N = ids.shape[0], C = dtable.shape[1]
    for s in prange((C + WIDTH - 1) // WIDTH, nogil=True, schedule="static", num_threads=team(threads, N * C)):
        _add_rows(&dx[0, 0], &ids[0], &dtable[0, 0], N, C, s * WIDTH, min(C, (s + 1) * WIDTH))


cdef inline void _add_rows(const real* dx, const int64_t* ids, real* dtable, int64_t N, int64_t C,
                           int64_t first, int64_t end) noexcept nogil:
    cdef int64_t i, c
    for i in range(N):
        for c in range(first, end):
            dtable[ids[i] * C + c] += dx[i * C + c]


TWINS = {"embedding_forward": embedding_forward, "embedding_backward": embedding_backward}
