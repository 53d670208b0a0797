"""ops/attention.py's fast twin: every query against just the keys that it sees.

One task takes a key head and the R query heads that share it.  Queries go in blocks; a block's rows
(query, head) stand one below the other, so that a loaded key serves all R heads.  Six rows at a
time, a strip, go through the small products of tile.h, over the keys that a row of the strip sees:
what is computed follows the diagonal band of visible pairs closely, whatever the block's size.
Everything is first packed into scratch memory, padded with zeros, so that products have no edges.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, log
from libc.stdint cimport int64_t
from libc.string cimport memset

from minisb.cpu.common cimport aligned, exp_real, real, row_max, team
from minisb.cpu.tile cimport TILE_BYTES, TILE_ROWS, six_rows

cdef enum:
    ROWS = 48                 # of a block, about
    KEYS = 240                # keys that stay in cache while a block goes over them; whole strips and columns
    CHUNK = 256               # queries of a forward task, where key heads alone are too few tasks
    FEW_TASKS = 8
    PER_VALUE = 64            # multiply-adds that take as long as one value of an elementwise loop, about
    LINE = 64                 # bytes of a cache line

cdef struct Shape:
    int64_t T, S, H, G, D, window
    int64_t R                 # query heads of a key head
    int64_t columns           # of a tile of the small products
    int64_t wide              # D rounded up to whole tiles
    int64_t queries, rows     # of a block; rows rounded up to whole strips

cdef struct Block:
    int64_t start, queries, rows, strips
    int64_t at                # the first query's own position, counted like the task's keys
    int64_t low, high         # the keys that the block sees, rounded out to whole tiles

cdef struct Range:
    int64_t first, last       # one past


def attention_forward(be, q, k, v, window, scale=None):
    """See ops/attention.py."""
    q, k, v = [np.ascontiguousarray(x) for x in (q, k, v)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, lse = np.empty(q.shape, q.dtype), np.empty(q.shape[:3], q.dtype)
    if q.dtype == np.float32:
        _forward[float](be.threads, q, k, v, o, lse, window, scale)
    else:
        _forward[double](be.threads, q, k, v, o, lse, window, scale)
    return o, (q, k, v, o, lse, window, scale)


def attention_backward(be, do, saved):
    """See ops/attention.py."""
    q, k, v, o, lse, window, scale = saved
    do, q, k, v, o, lse = [np.ascontiguousarray(x) for x in (do, q, k, v, o, lse)]
    dq, dk, dv = np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype), np.empty(v.shape, v.dtype)
    if q.dtype == np.float32:
        _backward[float](be.threads, do, q, k, v, o, lse, window, scale, dq, dk, dv)
    else:
        _backward[double](be.threads, do, q, k, v, o, lse, window, scale, dq, dk, dv)
    return dq, dk, dv


def attention_step(be, q, k, v, count, scale=None):
    """See ops/attention.py."""
    q, k, v = np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = np.empty(q.shape, q.dtype)
    if q.dtype == np.float32:
        _step[float](be.threads, q, k, v, o, count, scale)
    else:
        _step[double](be.threads, q, k, v, o, count, scale)
    return o


# ------------------------------------------------------------------------------------ forward

cdef _forward(int threads, const real[:, :, :, ::1] q, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v,
              real[:, :, :, ::1] o, real[:, :, ::1] lse, int64_t window, real scale):
    """Tasks: batch x key head, and chunks of queries where those are few.  Each has scratch of its own."""
    cdef Shape z = _shape(q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], window, sizeof(real))
    cdef int64_t heads = q.shape[0] * z.G, task, b, g, start
    cdef int64_t chunk = CHUNK if heads < FEW_TASKS else z.T
    cdef int64_t chunks = (z.T + chunk - 1) // chunk
    cdef int64_t keys = _up(min(z.S, chunk + z.window), z.columns)
    cdef int64_t room = _up(keys * (z.D + z.wide) + z.rows * (2 * z.wide + keys + 1), LINE)
    cdef int used = team(threads, q.shape[0] * z.H * z.T * z.window * z.D // PER_VALUE)
    cdef real[::1] scratch = np.empty(used * room + LINE, np.asarray(lse).dtype)
    cdef real* base = aligned(&scratch[0])
    for task in prange(heads * chunks, nogil=True, schedule="static", chunksize=1, num_threads=used):
        b = task // (z.G * chunks)
        g = task // chunks % z.G
        start = task % chunks * chunk
        _forward_task(&z, &q[b, 0, g * z.R, 0], &k[b, 0, g, 0], &v[b, 0, g, 0], &o[b, 0, g * z.R, 0],
                      &lse[b, 0, g * z.R], start, min(start + chunk, z.T), scale, base + threadid() * room)


cdef void _forward_task(Shape* z, const real* q, const real* k, const real* v, real* o, real* lse,
                        int64_t start, int64_t end, real scale, real* scratch) noexcept nogil:
    """Queries start .. end of one key head.  Keys are counted from the first that one of them sees."""
    cdef int64_t first = max(0, z.S - z.T + start - z.window + 1)
    cdef int64_t keys = z.S - z.T + end - first, padded = _up(keys, z.columns)
    cdef int64_t n, strip, i, d, tile, ld, to
    cdef Range all
    cdef Block b
    cdef real *kt = scratch, *vb = kt + padded * z.D
    cdef real *qb = vb + padded * z.wide, *ob = qb + z.rows * z.wide
    cdef real *s = ob + z.rows * z.wide, *total = s + z.rows * padded
    cdef real top
    _pack_columns(z, k + first * z.G * z.D, keys, kt)
    _pack_rows(z, v + first * z.G * z.D, z.G, 1, keys, padded, 1, vb)
    for n in range((end - start + z.queries - 1) // z.queries):
        b = _block(z, start + n * z.queries, end, first)
        ld = b.high - b.low
        _pack_rows(z, q + b.start * z.H * z.D, z.H, z.R, b.queries, b.strips * TILE_ROWS, scale, qb)
        for tile in range((ld + KEYS - 1) // KEYS):
            _with_keys(z, &b, b.low + tile * KEYS, qb, kt, s + tile * KEYS, ld)
        for strip in range(b.strips):
            all = _strip_sees(z, &b, strip * TILE_ROWS, b.low, b.high)
            for i in range(strip * TILE_ROWS, min((strip + 1) * TILE_ROWS, b.rows)):
                top = _softmax(s + i * ld - b.low, all, _row_sees(z, &b, i), total + i)
                lse[(b.start + i // z.R) * z.H + i % z.R] = top + <real>log(total[i])
        memset(ob, 0, b.strips * TILE_ROWS * z.wide * sizeof(real))
        for tile in range((ld + KEYS - 1) // KEYS):
            _over_keys(z, &b, b.low + tile * KEYS, s + tile * KEYS, ld, vb, ob)
        for i in range(b.rows):
            to = (b.start + i // z.R) * z.H + i % z.R
            total[i] = 1 / total[i]
            for d in range(z.D):
                o[to * z.D + d] = ob[i * z.wide + d] * total[i]


cdef inline real _softmax(real* s, Range all, Range seen, real* total) noexcept nogil:
    """Scores -> exp(score - largest) where seen, else 0, and their total.  Returns the largest."""
    cdef int64_t j
    cdef real top, sum = 0
    for j in range(all.first, seen.first):
        s[j] = -INFINITY
    for j in range(seen.last, all.last):
        s[j] = -INFINITY
    top = row_max(s + all.first, all.last - all.first)
    for j in range(all.first, all.last):
        s[j] = exp_real(s[j] - top)
        sum += s[j]
    total[0] = sum
    return top


# ----------------------------------------------------------------------------------- backward

cdef _backward(int threads, const real[:, :, :, ::1] do, const real[:, :, :, ::1] q, const real[:, :, :, ::1] k,
               const real[:, :, :, ::1] v, const real[:, :, :, ::1] o, const real[:, :, ::1] lse, int64_t window,
               real scale, real[:, :, :, ::1] dq, real[:, :, :, ::1] dk, real[:, :, :, ::1] dv):
    """Tasks: batch x key head, so that one task alone, in one order, writes a key's gradient."""
    cdef Shape z = _shape(q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], window, sizeof(real))
    cdef int64_t task, b, g
    cdef int64_t keys = _up(min(z.S, z.T + z.window), z.columns)
    cdef int64_t room = _up(keys * 2 * z.D + (3 * keys + 2 * TILE_ROWS) * z.wide
                            + z.rows * (3 * z.wide + 2 * (min(keys, KEYS) + z.columns) + 1), LINE)
    cdef int used = team(threads, q.shape[0] * z.H * z.T * z.window * z.D // PER_VALUE)
    cdef real[::1] scratch = np.empty(used * room + LINE, np.asarray(dq).dtype)
    cdef real* base = aligned(&scratch[0])
    for task in prange(q.shape[0] * z.G, nogil=True, schedule="static", chunksize=1, num_threads=used):
        b = task // z.G
        g = task % z.G
        _backward_task(&z, &do[b, 0, g * z.R, 0], &q[b, 0, g * z.R, 0], &k[b, 0, g, 0], &v[b, 0, g, 0],
                       &o[b, 0, g * z.R, 0], &lse[b, 0, g * z.R], scale,
                       &dq[b, 0, g * z.R, 0], &dk[b, 0, g, 0], &dv[b, 0, g, 0], base + threadid() * room)


cdef void _backward_task(Shape* z, const real* do, const real* q, const real* k, const real* v, const real* o,
                         const real* lse, real scale, real* dq, real* dk, real* dv, real* scratch) noexcept nogil:
    """All queries of one key head.  Keys are counted from the first that is seen."""
    cdef int64_t first = max(0, z.S - z.T - z.window + 1)
    cdef int64_t keys = z.S - first, padded = _up(keys, z.columns), ld = min(padded, KEYS) + z.columns
    cdef int64_t n, strip, i, d, tile, start, to
    cdef Range all
    cdef Block b
    cdef real *kt = scratch, *vt = kt + padded * z.D, *kb = vt + padded * z.D
    cdef real *dkb = kb + padded * z.wide, *dvb = dkb + (padded + TILE_ROWS) * z.wide
    cdef real *qb = dvb + (padded + TILE_ROWS) * z.wide, *dob = qb + z.rows * z.wide, *dqb = dob + z.rows * z.wide
    cdef real *p = dqb + z.rows * z.wide, *ds = p + z.rows * ld, *delta = ds + z.rows * ld
    cdef real sum
    _pack_columns(z, k + first * z.G * z.D, keys, kt)
    _pack_columns(z, v + first * z.G * z.D, keys, vt)
    _pack_rows(z, k + first * z.G * z.D, z.G, 1, keys, padded, 1, kb)
    memset(dkb, 0, 2 * (padded + TILE_ROWS) * z.wide * sizeof(real))
    for n in range((z.T + z.queries - 1) // z.queries):
        b = _block(z, n * z.queries, z.T, first)
        _pack_rows(z, q + b.start * z.H * z.D, z.H, z.R, b.queries, b.strips * TILE_ROWS, scale, qb)
        _pack_rows(z, do + b.start * z.H * z.D, z.H, z.R, b.queries, b.strips * TILE_ROWS, 1, dob)
        memset(dqb, 0, b.strips * TILE_ROWS * z.wide * sizeof(real))
        for i in range(b.rows):
            to = (b.start + i // z.R) * z.H + i % z.R
            sum = 0
            for d in range(z.D):
                sum += o[to * z.D + d] * dob[i * z.wide + d]
            delta[i] = sum
        for tile in range((b.high - b.low + KEYS - 1) // KEYS):
            start = b.low + tile * KEYS
            _with_keys(z, &b, start, qb, kt, p, ld)
            _with_keys(z, &b, start, dob, vt, ds, ld)
            for strip in range(b.strips):
                all = _strip_sees(z, &b, strip * TILE_ROWS, start, start + KEYS)
                for i in range(strip * TILE_ROWS, min((strip + 1) * TILE_ROWS, b.rows)):
                    _softmax_backward(p + i * ld - start, ds + i * ld - start, start,
                                      lse[(b.start + i // z.R) * z.H + i % z.R], delta[i], all, _row_sees(z, &b, i))
            _over_keys(z, &b, start, ds, ld, kb, dqb)
            _over_rows(z, &b, start, p, ld, dob, dvb)
            _over_rows(z, &b, start, ds, ld, qb, dkb)
        for i in range(b.rows):
            to = (b.start + i // z.R) * z.H + i % z.R
            for d in range(z.D):
                dq[to * z.D + d] = scale * dqb[i * z.wide + d]
    for i in range(z.S):
        for d in range(z.D):
            dk[i * z.G * z.D + d] = dkb[(i - first) * z.wide + d] if i >= first else 0
            dv[i * z.G * z.D + d] = dvb[(i - first) * z.wide + d] if i >= first else 0


cdef inline void _softmax_backward(real* p, real* ds, int64_t start, real lse, real delta, Range all,
                                   Range seen) noexcept nogil:
    """Scores p and dp in ds -> probabilities and ds, 0 where not seen.  The zeros go on for six keys on
    either side: _over_rows takes strips of six keys, of which a row may see only some."""
    cdef int64_t j
    for j in range(all.first, all.last):
        p[j] = exp_real(p[j] - lse)
        ds[j] = p[j] * (ds[j] - delta)
    for j in range(max(start, all.first - TILE_ROWS), min(seen.first, all.last)):
        p[j] = ds[j] = 0
    for j in range(max(start, seen.last), all.last + TILE_ROWS):
        p[j] = ds[j] = 0


# --------------------------------------------------------- what a block sees, and its products

cdef inline Block _block(Shape* z, int64_t start, int64_t end, int64_t first) noexcept nogil:
    """The block of queries from `start` on; keys are counted from `first`."""
    cdef Block b
    b.start = start
    b.queries = min(z.queries, end - start)
    b.rows = b.queries * z.R
    b.strips = (b.rows + TILE_ROWS - 1) // TILE_ROWS
    b.at = z.S - z.T + start - first
    b.low = _down(max(0, b.at - z.window + 1), z.columns)
    b.high = _up(b.at + b.queries, z.columns)
    return b


cdef inline Range _row_sees(Shape* z, Block* b, int64_t i) noexcept nogil:
    cdef Range keys
    keys.last = b.at + i // z.R + 1
    keys.first = max(0, keys.last - z.window)
    return keys


cdef inline Range _strip_sees(Shape* z, Block* b, int64_t i, int64_t start, int64_t stop) noexcept nogil:
    """The keys in start .. stop that a row of the strip at row i sees, rounded out to whole tiles."""
    cdef Range keys
    keys.first = max(start, _down(_row_sees(z, b, i).first, z.columns))
    keys.last = min(stop, _up(_row_sees(z, b, min(i + TILE_ROWS, b.rows) - 1).last, z.columns))
    return keys


cdef void _with_keys(Shape* z, Block* b, int64_t start, const real* x, const real* kt, real* to,
                     int64_t ld) noexcept nogil:
    """to = x k^T: rows x against the KEYS keys from `start` on, where a strip sees them."""
    cdef int64_t strip, i
    cdef Range keys
    for strip in range(b.strips):
        i = strip * TILE_ROWS
        keys = _strip_sees(z, b, i, start, start + KEYS)
        six_rows(keys.last - keys.first, z.D, x + i * z.wide, z.wide, 1, kt + keys.first * z.D, z.columns,
                 z.columns * z.D, to + i * ld + keys.first - start, ld, 0)


cdef void _over_keys(Shape* z, Block* b, int64_t start, const real* s, int64_t ld, const real* v,
                     real* to) noexcept nogil:
    """to += s v: the sum over the KEYS keys from `start` on, for every row."""
    cdef int64_t strip, i, first, last
    for strip in range(b.strips):
        i = strip * TILE_ROWS
        first = max(start, _row_sees(z, b, i).first)
        last = min(start + KEYS, _row_sees(z, b, min(i + TILE_ROWS, b.rows) - 1).last)
        six_rows(z.wide if first < last else 0, last - first, s + i * ld + first - start, ld, 1, v + first * z.wide,
                 z.wide, z.columns, to + i * z.wide, z.wide, 1)


cdef void _over_rows(Shape* z, Block* b, int64_t start, const real* s, int64_t ld, const real* x,
                     real* to) noexcept nogil:
    """to += s^T x: the sum over the rows that see a strip of keys, for the KEYS keys from `start` on."""
    cdef int64_t strip, j, first, last
    for strip in range((min(start + KEYS, b.at + b.queries) - start + TILE_ROWS - 1) // TILE_ROWS):
        j = start + strip * TILE_ROWS
        first = max(0, j - b.at) * z.R
        last = min(b.rows, (j + TILE_ROWS - 1 + z.window - b.at) * z.R)
        six_rows(z.wide if first < last else 0, last - first, s + first * ld + j - start, 1, ld, x + first * z.wide,
                 z.wide, z.columns, to + j * z.wide, z.wide, 1)


cdef void _pack_rows(Shape* z, const real* x, int64_t heads, int64_t R, int64_t n, int64_t padded, real scale,
                     real* to) noexcept nogil:
    """R of `heads` heads at n positions -> rows (position, head), times scale, filled up with zeros."""
    cdef int64_t i, d
    for i in range(n * R):
        for d in range(z.D):
            to[i * z.wide + d] = x[(i // R * heads + i % R) * z.D + d] * scale
        for d in range(z.D, z.wide):
            to[i * z.wide + d] = 0
    memset(to + n * R * z.wide, 0, (padded - n * R) * z.wide * sizeof(real))


cdef void _pack_columns(Shape* z, const real* x, int64_t n, real* to) noexcept nogil:
    """n keys -> tiles (D, columns), filled up with zeros.  Four keys at a time make whole vectors."""
    cdef int64_t i, j, d, ld = z.G * z.D
    cdef const real* four
    cdef real* tile
    for j in range(0, n - 3, 4):
        four = x + j * ld
        tile = to + _down(j, z.columns) * z.D + (j & (z.columns - 1))
        for d in range(z.D):
            tile[0], tile[1], tile[2], tile[3] = four[d], four[d + ld], four[d + 2 * ld], four[d + 3 * ld]
            tile += z.columns
    for j in range(n & -4, _up(n, z.columns)):
        for d in range(z.D):
            to[_down(j, z.columns) * z.D + d * z.columns + (j & (z.columns - 1))] = x[j * ld + d] if j < n else 0


cdef Shape _shape(int64_t T, int64_t S, int64_t H, int64_t G, int64_t D, int64_t window, int64_t size) noexcept:
    cdef Shape z
    z.T, z.S, z.H, z.G, z.D, z.window = T, S, H, G, D, min(window, S)
    z.R = H // G
    z.columns = TILE_BYTES // size
    z.wide = _up(D, z.columns)
    z.queries = max(1, ROWS // z.R)
    z.rows = (z.queries * z.R + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    return z


cdef inline int64_t _down(int64_t x, int64_t unit) noexcept nogil:
    """Down to a multiple of a power of two."""
    return x & -unit


cdef inline int64_t _up(int64_t x, int64_t unit) noexcept nogil:
    return (x + unit - 1) & -unit


# --------------------------------------------------------------------------------------- step

cdef _step(int threads, const real[:, :, :, ::1] q, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v,
           real[:, :, :, ::1] o, int64_t count, real scale):
    """Tasks: batch x key head."""
    cdef int64_t H = q.shape[2], G = k.shape[2], D = q.shape[3], R = H // G, task, b, g
    cdef int used = team(threads, q.shape[0] * H * count * D // PER_VALUE)
    cdef real[::1] scratch = np.empty(used * R * count, np.asarray(o).dtype)
    for task in prange(q.shape[0] * G, nogil=True, schedule="static", num_threads=used):
        b = task // G
        g = task % G
        _step_task(&q[b, 0, g * R, 0], &k[b, 0, g, 0], &v[b, 0, g, 0], &o[b, 0, g * R, 0], R, G * D, D, count, scale,
                   &scratch[threadid() * R * count])


cdef void _step_task(const real* q, const real* k, const real* v, real* o, int64_t R, int64_t ld, int64_t D,
                     int64_t count, real scale, real* s) noexcept nogil:
    """A cached key, loaded once, serves R query heads.  Values join four at a time, so that the sum
    in o is loaded and stored once for all four."""
    cdef int64_t r, i, j, d
    cdef real sum, total
    cdef real* w
    cdef Range all = Range(0, count)
    for j in range(count):
        for r in range(R):
            sum = 0
            for d in range(D):
                sum += q[r * D + d] * k[j * ld + d]
            s[r * count + j] = sum * scale
    for r in range(R):
        w = s + r * count
        _softmax(w, all, all, &total)
        for d in range(D):
            o[r * D + d] = 0
        for i in range(count // 4):
            j = 4 * i
            for d in range(D):
                o[r * D + d] += (w[j] * v[j * ld + d] + w[j + 1] * v[(j + 1) * ld + d]
                                 + w[j + 2] * v[(j + 2) * ld + d] + w[j + 3] * v[(j + 3) * ld + d])
        for j in range(count - count % 4, count):
            for d in range(D):
                o[r * D + d] += w[j] * v[j * ld + d]
        for d in range(D):
            o[r * D + d] /= total


TWINS = {"attention_forward": attention_forward, "attention_backward": attention_backward,
         "attention_step": attention_step}
