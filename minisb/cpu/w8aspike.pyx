"""ops/w8aspike.py's fast twin, in integer instructions (w8aspike.h): equal bits, on any path and any threads.

Rows of the weights are divided among threads and nothing else is, so that a sum never depends on how
many there are.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.stdint cimport int8_t, int16_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from minisb.cpu.common cimport team
from minisb.errors import MinisbError
from minisb.ops import w8aspike as reference
from minisb.ops.spike import VTH_MAX, VTH_MIN

cdef extern from "w8aspike.h" nogil:
    int find_paths(Path* found)
    uint64_t read_bytes(const uint64_t* x, int64_t n)

cdef Path found[4]
cdef int _count = find_paths(found)
cdef Path path = found[0]
cdef float LEAST = VTH_MIN, MOST = VTH_MAX


def paths():
    """Names of the instruction sets that can be used here, the best first."""
    return [found[i].name.decode() for i in range(_count)]


def use_path(name):
    """Choose one of paths() for every later call; tests and benchmarks do."""
    global path
    if name not in paths():
        raise MinisbError(f"this processor has no path {name!r}; choose from {', '.join(paths())}.")
    path = found[paths().index(name)]


cdef const Path* chosen_path() noexcept nogil:
    return &path


# --------------------------------------------------------------------------------------- counts

cdef class Counts:
    """The counts of N tokens of C channels, in memory of their own."""
    cdef Spikes* of
    cdef int8_t* room
    cdef int64_t N, C

    def __cinit__(self, int64_t N, int64_t C):
        cdef int64_t size = spike_room(C), t, start
        self.N, self.C = N, C
        self.of = <Spikes*>malloc(max(N, 1) * sizeof(Spikes))
        self.room = <int8_t*>malloc(N * size + 64)
        if self.of == NULL or self.room == NULL:
            raise MemoryError
        start = 64 - <int64_t><uintptr_t>self.room % 64
        for t in range(N):
            self.of[t] = spikes_in(self.room + start + t * size, C)

    def __dealloc__(self):
        free(self.of)
        free(self.room)


cdef Counts _counts(int threads, const float[:, ::1] x, float k):
    cdef int64_t N = x.shape[0], C = x.shape[1], t
    cdef Counts counts = Counts(N, C)
    cdef Spikes* of = counts.of
    if N == 1:
        path.spike(&x[0, 0], of, C, k, LEAST, MOST)
        return counts
    for t in prange(N, nogil=True, schedule="static", num_threads=team(threads, N * C)):
        path.spike(&x[t, 0], of + t, C, k, LEAST, MOST)
    return counts


def spike_int8(be, x, k):
    """See ops/w8aspike.py."""
    cdef Counts c = _counts(be.threads, np.ascontiguousarray(x, np.float32), k)
    s8, thresholds = np.empty((c.N, c.C), np.int8), np.empty((c.N, 1), np.float32)
    cdef int8_t[:, ::1] s = s8
    cdef float[:, ::1] vth = thresholds
    cdef int64_t t
    cdef Rest* rest
    beyond = []
    for t in range(c.N):
        memcpy(&s[t, 0], c.of[t].s, c.C)
        vth[t, 0] = c.of[t].vth
        rest = c.of[t].rest
        while rest.channel < c.C:
            beyond.append((t, rest.channel, rest.value))
            rest += 1
    return s8, thresholds, tuple(np.array(beyond, np.int32).reshape(-1, 3).T.copy())


# --------------------------------------------------------------------------------------- product

def w8aspike_linear(be, x, w8, scales, k, b=None):
    """See ops/w8aspike.py."""
    if x.dtype != np.float32:
        return reference.w8aspike_linear.reference(be, x, w8, scales, k, b)
    shape, O, I = x.shape, w8.shape[0], w8.shape[1]
    assert shape[len(shape) - 1] == I and scales.shape[0] == O and (b is None or b.shape == (O,))
    assert scales.shape[1] == 1 or scales.shape[1] == (I + 127) // 128
    y = np.empty((*shape[: len(shape) - 1], O), np.float32)
    if y.size:
        counts = _counts(be.threads, np.ascontiguousarray(x).reshape(-1, I), k)
        _product(be.threads, w8, np.asfortranarray(scales).T, b, counts, y.reshape(-1))
    return y


cdef _product(int threads, const int8_t[:, ::1] w, const float[:, ::1] scales, float[::1] b, Counts x, float[::1] y):
    """scales (groups,O)."""
    cdef Matrix m
    m.w, m.scales, m.O, m.I, m.groups = &w[0, 0], &scales[0, 0], w.shape[0], x.C, scales.shape[0]
    m.b = NULL if b is None else &b[0]
    multiply(threads, &m, x.N, x.of, &y[0])


cdef void multiply(int threads, const Matrix* m, int64_t N, const Spikes* x, float* y) noexcept nogil:
    """A thread takes whole fours of rows."""
    cdef int64_t i, O = m.O, fours = (O + 3) // 4
    cdef int used = team(threads, N * O * m.I // 8)
    for i in prange(used, schedule="static", num_threads=used):
        product(&path, m, 4 * (fours * i // used), min(O, 4 * (fours * (i + 1) // used)), N, x, y)


# --------------------------------------------------------------------------------------- attention

def code_heads(be, q, k, v, spike_k):
    """See ops/w8aspike.py."""
    q, k, v = [np.ascontiguousarray(x, np.float32) for x in (q, k, v)]
    q16, qv = np.empty(q.shape, np.int16), np.empty(q.shape[:3], np.float32)
    k8, ku = np.empty(k.shape, np.int8), np.empty(k.shape[:3], np.float32)
    v8, vu = np.empty(v.shape, np.int8), np.empty(v.shape[:3], np.float32)
    _code(q, k, v, q16, qv, k8, ku, v8, vu, spike_k)
    return q16, qv, k8, ku, v8, vu


cdef _code(const float[:, :, :, ::1] q, const float[:, :, :, ::1] k, const float[:, :, :, ::1] v,
           int16_t[:, :, :, ::1] q16, float[:, :, ::1] qv, int8_t[:, :, :, ::1] k8, float[:, :, ::1] ku,
           int8_t[:, :, :, ::1] v8, float[:, :, ::1] vu, float spike_k):
    cdef int64_t b, t, h, H = q.shape[2], G = k.shape[2], D = q.shape[3]
    with nogil:
        for b in range(q.shape[0]):
            for t in range(q.shape[1]):
                for h in range(H):
                    qv[b, t, h] = path.query(&q[b, t, h, 0], &q16[b, t, h, 0], D, spike_k, LEAST, MOST)
                for h in range(G):
                    ku[b, t, h] = path.to_int8(&k[b, t, h, 0], &k8[b, t, h, 0], D)
                    vu[b, t, h] = path.to_int8(&v[b, t, h, 0], &v8[b, t, h, 0], D)


def attention_step_int8(be, q16, qv, k8, ku, v8, vu, count, scale=None):
    """See ops/w8aspike.py."""
    q16, qv = np.ascontiguousarray(q16), np.ascontiguousarray(qv)
    o = np.empty(q16.shape, np.float32)
    _attend(be.threads, q16, qv, k8, ku, v8, vu, count, q16.shape[3] ** -0.5 if scale is None else scale, o)
    return o


cdef _attend(int threads, const int16_t[:, :, :, ::1] q, const float[:, :, ::1] qv, const int8_t[:, :, :, ::1] k,
             const float[:, :, ::1] ku, const int8_t[:, :, :, ::1] v, const float[:, :, ::1] vu, int64_t count,
             float scale, float[:, :, :, ::1] o):
    """Tasks: batch x key head."""
    cdef int64_t H = q.shape[2], G = k.shape[2], D = q.shape[3], R = H // G, task, b, g
    cdef int used = team(threads, q.shape[0] * H * count * D // 16)
    cdef float[:, ::1] p = np.empty((used, count), np.float32)
    for task in prange(q.shape[0] * G, nogil=True, schedule="static", num_threads=used):
        b = task // G
        g = task % G
        path.attend(&q[b, 0, g * R, 0], &qv[b, 0, g * R], &k[b, 0, g, 0], &ku[b, 0, g], &v[b, 0, g, 0], &vu[b, 0, g],
                    R, D, G, count, scale, &p[threadid(), 0], &o[b, 0, g * R, 0])


# --------------------------------------------------------------------------------------- the limit

def read_all(be, x):
    """Read all of x (a flat uint64 array) by all threads and return a sum: the speed limit of a product."""
    cdef const uint64_t[::1] values = x
    cdef int64_t n = values.shape[0] // 32, i
    cdef int used = be.threads
    cdef uint64_t[::1] sums = np.zeros(used, np.uint64)
    for i in prange(used, nogil=True, schedule="static", num_threads=used):
        sums[i] = read_bytes(&values[32 * (n * i // used)], 256 * (n * (i + 1) // used - n * i // used))
    return int(np.sum(sums))


TWINS = {
    "spike_int8": spike_int8,
    "w8aspike_linear": w8aspike_linear,
    "code_heads": code_heads,
    "attention_step_int8": attention_step_int8,
}
