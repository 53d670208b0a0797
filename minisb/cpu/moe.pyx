"""ops/moe.py's fast twin: routing a row at a time, and one matrix product per expert.

An expert often has few rows, too few to share a product between threads.  So a task is one expert's
rows times some columns of its matrix, packed by the thread that uses it, small enough to stay in its
second cache.  Tasks are handed out as threads come free: experts differ in load, and as every value
is summed by one task, who takes it changes no bit.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport log
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from minisb import blas
from minisb.cpu.common cimport aligned, exp_real, gemm_init, gemm_real, real, row_max, team
from minisb.cpu.strips cimport (
    OWN, STRIPS_PAY, TALL_ROWS, TILE_BYTES, dots, multiply_strips, pack_panels,
)
from minisb.ops.moe import Plan

cdef object _addresses = blas.gemm_addresses()
gemm_init(_addresses[0], _addresses[1], _addresses[2])

cdef int64_t PACKED = 192 * 1024   # bytes of a matrix that a task packs, about


# ------------------------------------------------------------------------------------- router

def router_forward(be, logits, top_k):
    logits = np.ascontiguousarray(logits)
    N, E = logits.shape
    p, lse = np.empty_like(logits), np.empty(N, logits.dtype)
    gates, experts = np.empty((N, top_k), logits.dtype), np.empty((N, top_k), np.int64)
    if logits.dtype == np.float32:
        _route[float](be.threads, logits, p, lse, gates, experts)
    else:
        _route[double](be.threads, logits, p, lse, gates, experts)
    return gates, experts, p, lse, (experts, p, logits.dtype)


cdef _route(int threads, const real[:, ::1] logits, real[:, ::1] p, real[::1] lse, real[:, ::1] gates,
            int64_t[:, ::1] experts):
    cdef int64_t n, N = p.shape[0], E = p.shape[1], K = gates.shape[1]
    for n in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * E)):
        lse[n] = _route_token(&logits[n, 0], &p[n, 0], &gates[n, 0], &experts[n, 0], E, K)


cdef real _route_token(const real* logits, real* p, real* gates, int64_t* experts, int64_t E,
                       int64_t K) noexcept nogil:
    cdef int64_t e, k, j, best
    cdef real top = row_max(logits, E), total = 0
    for e in range(E):
        p[e] = exp_real(logits[e] - top)
    for e in range(E):
        total += p[e]
    for e in range(E):
        p[e] /= total
    for k in range(K):
        best = -1
        for e in range(E):
            if (best < 0 or logits[e] > logits[best]) and not _among(e, experts, k):
                best = e
        experts[k], gates[k] = best, p[best]
    return top + <real>log(total)


cdef inline bint _among(int64_t e, const int64_t* experts, int64_t k) noexcept nogil:
    cdef int64_t j
    for j in range(k):
        if experts[j] == e:
            return True
    return False


def router_backward(be, dgates, dp, dlse, saved):
    experts, p, _ = saved
    p, dgates, dlse = np.ascontiguousarray(p), np.ascontiguousarray(dgates), np.ascontiguousarray(dlse)
    dp = np.array(np.broadcast_to(dp, p.shape), p.dtype, order="C")  # written over
    if p.dtype == np.float32:
        _route_backward[float](be.threads, dgates, dp, dlse, _int64(experts), p)
    else:
        _route_backward[double](be.threads, dgates, dp, dlse, _int64(experts), p)
    return dp


cdef _route_backward(int threads, const real[:, ::1] dgates, real[:, ::1] d, const real[::1] dlse,
                     const int64_t[:, ::1] experts, const real[:, ::1] p):
    cdef int64_t n, N = p.shape[0], E = p.shape[1], K = dgates.shape[1]
    for n in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * E)):
        _route_token_backward(&dgates[n, 0], &d[n, 0], dlse[n], &experts[n, 0], &p[n, 0], E, K)


cdef void _route_token_backward(const real* dgates, real* d, real dlse, const int64_t* experts, const real* p,
                                int64_t E, int64_t K) noexcept nogil:
    cdef int64_t e, k
    cdef real sum = 0
    for k in range(K):
        d[experts[k]] += dgates[k]
    for e in range(E):
        sum += p[e] * d[e]
    for e in range(E):
        d[e] = p[e] * (d[e] - sum + dlse)


def dispatch_plan(be, experts, count, tile=1, capacity=None):
    N, K = experts.shape
    row, token = np.empty((N, K), np.int64), np.empty(N * K + count * (tile - 1), np.int64)
    offsets = np.zeros(count + 1, np.int64)
    _plan(_int64(experts), row, token, offsets, tile, N * K if capacity is None else capacity)
    return Plan(row, token, offsets)


cdef _plan(const int64_t[:, ::1] experts, int64_t[:, ::1] row, int64_t[::1] token, int64_t[::1] offsets,
           int64_t tile, int64_t capacity):
    """A counting sort: so few integers need no threads."""
    cdef int64_t N = row.shape[0], K = row.shape[1], E = offsets.shape[0] - 1, n, k, e, size
    cdef int64_t[::1] filled = np.zeros(E, np.int64)
    for n in range(N):
        for k in range(K):
            filled[experts[n, k]] += 1
    for e in range(E):
        size = min(filled[e], capacity)
        offsets[e + 1] = offsets[e] + (size + tile - 1) // tile * tile
        filled[e] = 0
    for n in range(token.shape[0]):
        token[n] = -1
    for n in range(N):
        for k in range(K):
            e = experts[n, k]
            if filled[e] < capacity:
                row[n, k] = offsets[e] + filled[e]
                token[row[n, k]] = n
                filled[e] += 1
            else:
                row[n, k] = -1


# --------------------------------------------------------------------------- rows and experts

def dispatch_forward(be, x, plan):
    x = np.ascontiguousarray(x)
    rows = np.empty((len(plan.token), x.shape[1]), x.dtype)
    if x.dtype == np.float32:
        _dispatch[float](be.threads, x, _int64(plan.token), rows)
    else:
        _dispatch[double](be.threads, x, _int64(plan.token), rows)
    return rows


cdef _dispatch(int threads, const real[:, ::1] x, const int64_t[::1] token, real[:, ::1] rows):
    cdef int64_t r, R = rows.shape[0], C = rows.shape[1]
    for r in prange(R, nogil=True, schedule="static", num_threads=team(threads, R * C)):
        if token[r] >= 0:
            memcpy(&rows[r, 0], &x[token[r], 0], C * sizeof(real))
        else:
            memset(&rows[r, 0], 0, C * sizeof(real))


def dispatch_backward(be, drows, plan):
    return _gather(be, drows, np.ones(plan.row.shape, drows.dtype), plan, None)


def combine_forward(be, rows, gates, plan, shared=None):
    return _gather(be, rows, gates, plan, shared), (rows, gates, plan)


def _gather(be, rows, gates, plan, shared):
    """A token's rows, weighted, added to its row of `shared`."""
    rows, gates = np.ascontiguousarray(rows), np.ascontiguousarray(gates)
    y = np.zeros((len(gates), rows.shape[1]), rows.dtype) if shared is None else np.array(shared, order="C")
    if rows.dtype == np.float32:
        _gather_rows[float](be.threads, rows, gates, _int64(plan.row), y)
    else:
        _gather_rows[double](be.threads, rows, gates, _int64(plan.row), y)
    return y


cdef _gather_rows(int threads, const real[:, ::1] rows, const real[:, ::1] gates, const int64_t[:, ::1] row,
                  real[:, ::1] y):
    cdef int64_t n, N = y.shape[0], C = y.shape[1]
    for n in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * C)):
        _gather_token(&rows[0, 0], &gates[n, 0], &row[n, 0], row.shape[1], C, &y[n, 0])


cdef void _gather_token(const real* rows, const real* gates, const int64_t* row, int64_t K, int64_t C,
                        real* y) noexcept nogil:
    cdef int64_t k, c
    cdef const real* x
    for k in range(K):
        if row[k] >= 0:
            x = rows + row[k] * C
            for c in range(C):
                y[c] += gates[k] * x[c]


def combine_backward(be, dy, saved):
    rows, gates, plan = saved
    rows, gates, dy = [np.ascontiguousarray(x) for x in (rows, gates, dy)]
    drows, dgates = np.empty_like(rows), np.empty_like(gates)
    if rows.dtype == np.float32:
        _combine_backward[float](be.threads, dy, rows, gates, _int64(plan.row), _int64(plan.token), drows, dgates)
    else:
        _combine_backward[double](be.threads, dy, rows, gates, _int64(plan.row), _int64(plan.token), drows, dgates)
    return drows, dgates


cdef _combine_backward(int threads, const real[:, ::1] dy, const real[:, ::1] rows, const real[:, ::1] gates,
                       const int64_t[:, ::1] row, const int64_t[::1] token, real[:, ::1] drows, real[:, ::1] dgates):
    cdef int64_t n, k, N = dy.shape[0], C = dy.shape[1], R = rows.shape[0]
    for n in range(R):
        if token[n] < 0:
            memset(&drows[n, 0], 0, C * sizeof(real))
    for n in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * C)):
        for k in range(gates.shape[1]):
            if row[n, k] >= 0:
                dgates[n, k] = _combine_slot(&dy[n, 0], &rows[row[n, k], 0], gates[n, k], &drows[row[n, k], 0], C)
            else:
                dgates[n, k] = 0


cdef inline real _combine_slot(const real* dy, const real* row, real gate, real* drow, int64_t C) noexcept nogil:
    cdef int64_t c
    cdef real dot = 0
    for c in range(C):
        drow[c] = gate * dy[c]
        dot += dy[c] * row[c]
    return dot


# ----------------------------------------------------------------------------------- products

cdef struct Product:
    # op(A) op(B), as in be.gemm, of one expert: n columns of the result at most are one task.
    int ta, tb, add
    int64_t lda, ldb, ldc
    int64_t columns


def grouped_forward(be, x, w, offsets, out=None):
    x, w, offsets = _rows(x), np.ascontiguousarray(w), _int64(offsets)
    y = np.empty((len(x), w.shape[1]), x.dtype) if out is None else out
    assert y.shape == (len(x), w.shape[1]) and y.strides[1] == y.itemsize and x.dtype == w.dtype == y.dtype
    y[int(offsets[len(w)]) :] = 0
    if x.dtype == np.float32:
        _grouped[float](be.threads, x, w, offsets, y)
    else:
        _grouped[double](be.threads, x, w, offsets, y)
    return y


def grouped_backward(be, dy, x, w, offsets, dw, dx=None):
    dy, x, w, offsets = _rows(dy), _rows(x), np.ascontiguousarray(w), _int64(offsets)
    accumulate = dx is not None
    if dx is None:
        dx = np.empty((len(dy), w.shape[2]), dy.dtype)
        dx[int(offsets[len(w)]) :] = 0
    assert dx.strides[1] == dx.itemsize and dy.dtype == x.dtype == w.dtype == dw.dtype == dx.dtype
    if x.dtype == np.float32:
        _grouped_backward[float](be.threads, dy, x, w, offsets, dw, dx, accumulate)
    else:
        _grouped_backward[double](be.threads, dy, x, w, offsets, dw, dx, accumulate)
    return dx


cdef _grouped(int threads, const real[:, :] x, const real[:, :, ::1] w, const int64_t[::1] offsets, real[:, :] y):
    cdef int64_t E = w.shape[0], O = w.shape[1], I = w.shape[2], task, e, start, rows
    cdef int64_t ldx = x.strides[0] // sizeof(real), ldy = y.strides[0] // sizeof(real)
    cdef int64_t columns = _columns(I, O, sizeof(real)), blocks = (O + columns - 1) // columns
    cdef int used = threads if x.shape[0] * O * I > 1 << 18 else 1
    cdef int64_t room = _room(I, columns)
    cdef real[::1] scratch = np.empty(used * room + TILE_BYTES, np.asarray(y).dtype)
    cdef Product z = Product(0, 1, 0, ldx, I, ldy, columns)
    for task in prange(E * blocks, nogil=True, schedule="dynamic", num_threads=used):
        e = task // blocks
        start = task % blocks * columns
        rows = offsets[e + 1] - offsets[e]
        if rows:
            _product(&z, rows, min(columns, O - start), I, &x[offsets[e], 0], &w[e, start, 0],
                     &y[offsets[e], start], aligned(&scratch[0]) + threadid() * room)


cdef _grouped_backward(int threads, const real[:, :] dy, const real[:, :] x, const real[:, :, ::1] w,
                       const int64_t[::1] offsets, real[:, :, ::1] dw, real[:, :] dx, bint accumulate):
    """First the tasks of dx = dy w, then those of dw += dy^T x, in one row."""
    cdef int64_t E = w.shape[0], O = w.shape[1], I = w.shape[2], task, e, start, rows, most = 1
    cdef int64_t lddy = dy.strides[0] // sizeof(real), ldx = x.strides[0] // sizeof(real)
    cdef int64_t lddx = dx.strides[0] // sizeof(real)
    for e in range(E):
        most = max(most, offsets[e + 1] - offsets[e])
    cdef int64_t columns = _columns(O, I, sizeof(real)), blocks = (I + columns - 1) // columns
    cdef int64_t columns_w = _columns(most, I, sizeof(real)), blocks_w = (I + columns_w - 1) // columns_w
    cdef int used = threads if x.shape[0] * O * I > 1 << 18 else 1
    cdef int64_t room = max(_room(O, columns), _room(most, columns_w))
    cdef real[::1] scratch = np.empty(used * room + TILE_BYTES, np.asarray(dx).dtype)
    cdef Product z = Product(0, 0, accumulate, lddy, I, lddx, columns)
    cdef Product z_w = Product(1, 0, 1, lddy, ldx, I, columns_w)
    for task in prange(E * (blocks + blocks_w), nogil=True, schedule="dynamic", num_threads=used):
        if task < E * blocks:
            e = task // blocks
            start = task % blocks * columns
            rows = offsets[e + 1] - offsets[e]
            if rows:
                _product(&z, rows, min(columns, I - start), O, &dy[offsets[e], 0], &w[e, 0, start],
                         &dx[offsets[e], start], aligned(&scratch[0]) + threadid() * room)
        else:
            e = (task - E * blocks) // blocks_w
            start = (task - E * blocks) % blocks_w * columns_w
            rows = offsets[e + 1] - offsets[e]
            if rows:
                _product(&z_w, O, min(columns_w, I - start), rows, &dy[offsets[e], 0], &x[offsets[e], start],
                         &dw[e, 0, start], aligned(&scratch[0]) + threadid() * room)


cdef void _product(Product* z, int64_t m, int64_t n, int64_t k, const real* a, const real* b, real* c,
                   real* scratch) noexcept nogil:
    """c (m,n) (+)= op(a) op(b), as linear.pyx does it: dots, our strips, or BLAS."""
    cdef int64_t tile = TILE_BYTES // sizeof(real)
    cdef real* packed = scratch + OWN
    if m == 1 and z.tb and not z.ta and not z.add:
        dots(n, k, a, b, z.ldb, <real>0, c)
    elif not STRIPS_PAY or m < 4 * TALL_ROWS:
        gemm_real(z.ta, z.tb, m, n, k, <real>1, a, z.lda, b, z.ldb, <real>(1 if z.add else 0), c, z.ldc)
    else:
        pack_panels(z.tb, k, n, b, z.ldb, packed, 0, (n + tile - 1) // tile)
        multiply_strips(z.ta, m, n, k, a, z.lda, packed, z.add, c, z.ldc, 0, (m + TALL_ROWS - 1) // TALL_ROWS, scratch)


cdef int64_t _columns(int64_t depth, int64_t most, int64_t size) noexcept:
    """Columns of a task: whole tiles, of PACKED bytes together, about."""
    cdef int64_t tile = TILE_BYTES // size
    cdef int64_t fitting = PACKED // (max(depth, 1) * size) // tile * tile
    return max(tile, min(fitting, (most + tile - 1) // tile * tile))


cdef int64_t _room(int64_t depth, int64_t columns) noexcept:
    """A task's own: for packed strips, and for its columns.  Whole cache lines."""
    return (OWN + depth * columns + TILE_BYTES) // TILE_BYTES * TILE_BYTES


cdef _rows(x):
    """x itself if its rows are contiguous, else a copy."""
    return x if x.strides[1] == x.itemsize or x.shape[1] == 1 else np.ascontiguousarray(x)


cdef _int64(x):
    return np.ascontiguousarray(x, np.int64)


TWINS = {
    "router_forward": router_forward,
    "router_backward": router_backward,
    "dispatch_plan": dispatch_plan,
    "dispatch_forward": dispatch_forward,
    "dispatch_backward": dispatch_backward,
    "combine_forward": combine_forward,
    "combine_backward": combine_backward,
    "grouped_forward": grouped_forward,
    "grouped_backward": grouped_backward,
}
