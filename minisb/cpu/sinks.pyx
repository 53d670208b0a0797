"""ops/sinks.py's fast twin: few keys that all queries see, so nothing is masked.

Keys and values of the sinks are packed once a call.  A task is a run of tokens and a key head: its rows
(token, head) go in strips of six through the small products of tile.h, as in attention.pyx.  The sinks'
own gradients are sums over all tokens: one partial sum a slice of tokens, added in the slices' order.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport log
from libc.stdint cimport int64_t
from libc.string cimport memset

from minisb.cpu.common cimport exp_real, real, row_max, team
from minisb.cpu.tile cimport TILE_BYTES, TILE_ROWS, six_rows

cdef enum:
    SLICES = 8          # partial sums of the sinks' gradients
    PER_VALUE = 64      # multiply-adds that take as long as one value of an elementwise loop, about

cdef struct Shape:
    int64_t rows, H, G, D, S   # rows: tokens of the whole batch
    int64_t R                  # query heads of a key head
    int64_t wide, keys         # D and S rounded up to whole tiles
    int64_t columns            # of a tile


def sinks_forward(be, q, k, v, o=None, lse=None, scale=None):
    """See ops/sinks.py."""
    q, k, v = [np.ascontiguousarray(x) for x in (q, k, v)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if o is None:  # nothing seen so far: weight exp(-inf) = 0
        o, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf, q.dtype)
    else:
        o, lse = np.array(o, order="C"), np.array(lse, order="C")
    if q.dtype == np.float32:
        _forward[float](be.threads, _tokens(q), k, v, _tokens(o), lse.reshape(-1, q.shape[2]), scale)
    else:
        _forward[double](be.threads, _tokens(q), k, v, _tokens(o), lse.reshape(-1, q.shape[2]), scale)
    return o, lse


def sinks_backward(be, do, q, k, v, o, lse, scale=None, dq=None):
    """See ops/sinks.py."""
    do, q, k, v, o, lse = [np.ascontiguousarray(x) for x in (do, q, k, v, o, lse)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dq = np.zeros_like(q) if dq is None else np.array(dq, order="C")
    dk, dv = np.empty_like(k), np.empty_like(v)
    partial = np.zeros((SLICES, 2, *k.shape), k.dtype)
    if q.dtype == np.float32:
        _backward[float](be.threads, _tokens(do), _tokens(q), k, v, _tokens(o), lse.reshape(-1, q.shape[2]), scale,
                         _tokens(dq), partial)
    else:
        _backward[double](be.threads, _tokens(do), _tokens(q), k, v, _tokens(o), lse.reshape(-1, q.shape[2]), scale,
                          _tokens(dq), partial)
    dk[...], dv[...] = partial[0]
    for part in partial[1:]:
        dk += part[0]
        dv += part[1]
    return dq, dk, dv


def _tokens(x):
    """(B,T,H,D) -> (B T,H,D)."""
    return x.reshape(-1, *x.shape[2:])


cdef _forward(int threads, const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v,
              real[:, :, ::1] o, real[:, ::1] lse, real scale):
    cdef Shape z = _shape(q, k)
    cdef int64_t task, g, tokens = max(1, 48 // z.R), tasks = (z.rows + tokens - 1) // tokens
    cdef int64_t rows = (tokens * z.R + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    cdef int64_t room = rows * (2 * z.wide + z.keys)
    cdef int used = team(threads, z.rows * z.H * z.S * z.D // PER_VALUE)
    cdef real[:, ::1] kt = np.empty((z.G, z.keys * z.D), np.asarray(o).dtype)
    cdef real[:, ::1] vb = np.empty((z.G, z.keys * z.wide), np.asarray(o).dtype)
    cdef real[:, ::1] scratch = np.empty((used, room), np.asarray(o).dtype)
    for g in range(z.G):
        _pack_columns(&z, &k[0, g, 0], &kt[g, 0])
        _pack_rows(&v[0, g, 0], z.G * z.D, z.S, z.D, z.wide, z.keys, 1, &vb[g, 0])
    for task in prange(tasks * z.G, nogil=True, schedule="static", num_threads=used):
        g = task % z.G
        _forward_task(&z, task // z.G * tokens, min(tokens, z.rows - task // z.G * tokens), g, &q[0, 0, 0], &kt[g, 0],
                      &vb[g, 0], &o[0, 0, 0], &lse[0, 0], scale, &scratch[threadid(), 0])


cdef void _forward_task(Shape* z, int64_t first, int64_t tokens, int64_t g, const real* q, const real* kt,
                        const real* vb, real* o, real* lse, real scale, real* scratch) noexcept nogil:
    """Tokens first .. first + tokens of one key head: softmax over the sinks, joined to what was seen before."""
    cdef int64_t n, i, j, d, at, rows = tokens * z.R, padded = (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    cdef real *qb = scratch, *ob = qb + padded * z.wide, *s = ob + padded * z.wide
    cdef real *row
    cdef real top, total, weight
    _pack_queries(z, q, first, tokens, g, padded, scale, qb)
    for n in range(padded // TILE_ROWS):
        i = n * TILE_ROWS
        six_rows(z.keys, z.D, qb + i * z.wide, z.wide, 1, kt, z.columns, z.columns * z.D, s + i * z.keys, z.keys, 0)
    for i in range(rows):
        at = ((first + i // z.R) * z.H + g * z.R + i % z.R)
        row = s + i * z.keys
        top = row_max(row, z.S)
        top = lse[at] if lse[at] > top else top
        for j in range(z.S):
            row[j] = exp_real(row[j] - top)
        total = 0
        for j in range(z.S):
            total += row[j]
        weight = exp_real(lse[at] - top)
        total += weight
        for j in range(z.S):
            row[j] /= total
        for j in range(z.S, z.keys):
            row[j] = 0
        for d in range(z.D):
            o[at * z.D + d] *= weight / total
        lse[at] = top + <real>log(total)
    memset(s + rows * z.keys, 0, (padded - rows) * z.keys * sizeof(real))
    for n in range(padded // TILE_ROWS):
        i = n * TILE_ROWS
        six_rows(z.wide, z.S, s + i * z.keys, z.keys, 1, vb, z.wide, z.columns, ob + i * z.wide, z.wide, 0)
    for i in range(rows):
        at = ((first + i // z.R) * z.H + g * z.R + i % z.R) * z.D
        for d in range(z.D):
            o[at + d] += ob[i * z.wide + d]


cdef _backward(int threads, const real[:, :, ::1] do, const real[:, :, ::1] q, const real[:, :, ::1] k,
               const real[:, :, ::1] v, const real[:, :, ::1] o, const real[:, ::1] lse, real scale,
               real[:, :, ::1] dq, real[:, :, :, :, ::1] partial):
    """Tasks: slice of the tokens x key head; a slice goes block by block through one scratch."""
    cdef Shape z = _shape(q, k)
    cdef int64_t task, g, n, tokens = max(1, 48 // z.R), first, last, start
    cdef int64_t rows = (tokens * z.R + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    cdef int64_t sinks = (z.S + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    cdef int64_t keys = max(z.keys, sinks)
    cdef int64_t room = rows * (3 * z.wide + 2 * keys) + 2 * sinks * z.wide
    cdef int used = team(threads, z.rows * z.H * z.S * z.D // PER_VALUE)
    cdef real[:, ::1] kt = np.empty((z.G, z.keys * z.D), np.asarray(dq).dtype)
    cdef real[:, ::1] vt = np.empty((z.G, z.keys * z.D), np.asarray(dq).dtype)
    cdef real[:, ::1] kb = np.empty((z.G, z.keys * z.wide), np.asarray(dq).dtype)
    cdef real[:, ::1] scratch = np.empty((used, room), np.asarray(dq).dtype)
    for g in range(z.G):
        _pack_columns(&z, &k[0, g, 0], &kt[g, 0])
        _pack_columns(&z, &v[0, g, 0], &vt[g, 0])
        _pack_rows(&k[0, g, 0], z.G * z.D, z.S, z.D, z.wide, z.keys, 1, &kb[g, 0])
    for task in prange(SLICES * z.G, nogil=True, schedule="static", num_threads=used):
        g = task % z.G
        n = task // z.G
        _backward_slice(&z, z.rows * n // SLICES, z.rows * (n + 1) // SLICES, tokens, g, &do[0, 0, 0], &q[0, 0, 0],
                        &kt[g, 0], &vt[g, 0], &kb[g, 0], &o[0, 0, 0], &lse[0, 0], scale, &dq[0, 0, 0],
                        &partial[n, 0, 0, g, 0], &partial[n, 1, 0, g, 0], &scratch[threadid(), 0])


cdef void _backward_slice(Shape* z, int64_t first, int64_t last, int64_t tokens, int64_t g, const real* do,
                          const real* q, const real* kt, const real* vt, const real* kb, const real* o,
                          const real* lse, real scale, real* dq, real* dk, real* dv, real* scratch) noexcept nogil:
    cdef int64_t sinks = (z.S + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS, ld = max(z.keys, sinks)
    cdef int64_t most = (tokens * z.R + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    cdef int64_t block, start, n, i, j, d, at, rows, padded
    cdef real *qb = scratch, *dob = qb + most * z.wide, *dqb = dob + most * z.wide, *p = dqb + most * z.wide
    cdef real *ds = p + most * ld, *dkb = ds + most * ld, *dvb = dkb + sinks * z.wide
    cdef real delta
    memset(dkb, 0, 2 * sinks * z.wide * sizeof(real))
    for block in range((last - first + tokens - 1) // tokens):
        start = first + block * tokens
        rows = min(tokens, last - start) * z.R
        padded = (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        _pack_queries(z, q, start, rows // z.R, g, padded, scale, qb)
        _pack_queries(z, do, start, rows // z.R, g, padded, 1, dob)
        for n in range(padded // TILE_ROWS):
            i = n * TILE_ROWS
            six_rows(z.keys, z.D, qb + i * z.wide, z.wide, 1, kt, z.columns, z.columns * z.D, p + i * ld, ld, 0)
            six_rows(z.keys, z.D, dob + i * z.wide, z.wide, 1, vt, z.columns, z.columns * z.D, ds + i * ld, ld, 0)
        for i in range(rows):
            at = (start + i // z.R) * z.H + g * z.R + i % z.R
            delta = 0
            for d in range(z.D):
                delta += o[at * z.D + d] * dob[i * z.wide + d]
            _softmax_backward(p + i * ld, ds + i * ld, lse[at], delta, z.S, ld)
        memset(p + rows * ld, 0, (padded - rows) * ld * sizeof(real))
        memset(ds + rows * ld, 0, (padded - rows) * ld * sizeof(real))
        for n in range(padded // TILE_ROWS):
            i = n * TILE_ROWS
            six_rows(z.wide, z.S, ds + i * ld, ld, 1, kb, z.wide, z.columns, dqb + i * z.wide, z.wide, 0)
        for i in range(rows):
            at = ((start + i // z.R) * z.H + g * z.R + i % z.R) * z.D
            for d in range(z.D):
                dq[at + d] += scale * dqb[i * z.wide + d]
        for n in range(sinks // TILE_ROWS):  # the six sinks from j on: a sum over rows, which stand ld apart
            j = n * TILE_ROWS
            six_rows(z.wide, rows, ds + j, 1, ld, qb, z.wide, z.columns, dkb + j * z.wide, z.wide, 1)
            six_rows(z.wide, rows, p + j, 1, ld, dob, z.wide, z.columns, dvb + j * z.wide, z.wide, 1)
    for j in range(z.S):
        for d in range(z.D):
            dk[j * z.G * z.D + d] = dkb[j * z.wide + d]
            dv[j * z.G * z.D + d] = dvb[j * z.wide + d]


cdef inline void _softmax_backward(real* p, real* ds, real lse, real delta, int64_t n, int64_t ld) noexcept nogil:
    """Scores p and dp in ds -> probabilities and ds, and zeros up to ld."""
    cdef int64_t j
    for j in range(n):
        p[j] = exp_real(p[j] - lse)
        ds[j] = p[j] * (ds[j] - delta)
    for j in range(n, ld):
        p[j] = ds[j] = 0


# --------------------------------------------------------------------------- packing, products

cdef void _pack_queries(Shape* z, const real* x, int64_t first, int64_t tokens, int64_t g, int64_t padded,
                        real scale, real* to) noexcept nogil:
    """The R heads of group g at each token, one row each, filled up with zeros."""
    cdef int64_t t
    for t in range(tokens):
        _pack_rows(x + ((first + t) * z.H + g * z.R) * z.D, z.D, z.R, z.D, z.wide, z.R, scale, to + t * z.R * z.wide)
    memset(to + tokens * z.R * z.wide, 0, (padded - tokens * z.R) * z.wide * sizeof(real))


cdef void _pack_rows(const real* x, int64_t ld, int64_t n, int64_t D, int64_t wide, int64_t padded, real scale,
                     real* to) noexcept nogil:
    cdef int64_t i, d
    for i in range(n):
        for d in range(D):
            to[i * wide + d] = x[i * ld + d] * scale
        for d in range(D, wide):
            to[i * wide + d] = 0
    memset(to + n * wide, 0, (padded - n) * wide * sizeof(real))


cdef void _pack_columns(Shape* z, const real* x, real* to) noexcept nogil:
    """S keys -> tiles (D, columns), filled up with zeros."""
    cdef int64_t j, d, at
    for j in range(z.keys):
        for d in range(z.D):
            at = j // z.columns * z.columns * z.D + d * z.columns + j % z.columns
            to[at] = x[j * z.G * z.D + d] if j < z.S else 0


cdef Shape _shape(const real[:, :, ::1] q, const real[:, :, ::1] k) noexcept:
    cdef Shape z
    z.rows, z.H, z.D = q.shape[0], q.shape[1], q.shape[2]
    z.S, z.G = k.shape[0], k.shape[1]
    z.R = z.H // z.G
    z.columns = TILE_BYTES // sizeof(real)
    z.wide = (z.D + z.columns - 1) // z.columns * z.columns
    z.keys = (z.S + z.columns - 1) // z.columns * z.columns
    return z


TWINS = {"sinks_forward": sinks_forward, "sinks_backward": sinks_backward}
