"""ops/decode.py's fast twin: half a layer in one call, for a single sequence.

Rows are computed by the functions that the operations' own twins use, so bits are equal to theirs.  What
a call would learn anew about its matrices each time, their Int8Matrix keeps for it (Prepared).  The products
take all threads; what lies between them is too little to wake one for.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport pow
from libc.stdint cimport int8_t, int16_t, int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from minisb.cpu.common cimport team
from minisb.cpu.gate cimport log_gate_row
from minisb.cpu.gla cimport walk_token, walks
from minisb.cpu.heads cimport relu_row
from minisb.cpu.norm cimport norm_rows
from minisb.cpu.rope cimport rotate_heads
from minisb.cpu.swiglu cimport swiglu_row
from minisb.cpu.w8aspike cimport Matrix, Path, Spikes, chosen_path, multiply, product, spike_room, spikes_in
from minisb.ops import decode as reference
from minisb.ops.spike import VTH_MAX, VTH_MIN

cdef float LEAST = VTH_MIN, MOST = VTH_MAX
cdef int64_t LINE = 64  # bytes of a cache line


cdef class Prepared:
    """An Int8Matrix as a product reads it.  It holds the arrays that its pointers lead to."""
    cdef Matrix m
    cdef object w8, scales, columns


cdef Prepared _prepared(matrix):
    cdef Prepared p = matrix.prepared
    cdef const int8_t[:, ::1] w
    cdef const float[:, ::1] s
    if p is None or p.w8 is not matrix.w8 or p.scales is not matrix.scales:
        p = Prepared()
        p.w8, p.scales, p.columns = matrix.w8, matrix.scales, np.asfortranarray(matrix.scales).T
        w, s = p.w8, p.columns
        p.m.w, p.m.O, p.m.I, p.m.scales, p.m.groups = &w[0, 0], w.shape[0], w.shape[1], &s[0, 0], s.shape[0]
        matrix.prepared = p
    return p


cdef Matrix _with_bias(Prepared p, float[::1] b) noexcept:
    cdef Matrix m = p.m
    m.b = NULL if b is None else &b[0]
    return m


cdef class Room:
    """Memory of one call, given out in whole cache lines."""
    cdef int8_t* start
    cdef int8_t* free

    def __cinit__(self, int64_t bytes):
        self.start = <int8_t*>malloc(bytes + LINE)
        if self.start == NULL:
            raise MemoryError
        self.free = self.start + (LINE - <int64_t><uintptr_t>self.start % LINE)

    def __dealloc__(self):
        free(self.start)


cdef inline int64_t _lines(int64_t bytes) noexcept nogil:
    return (bytes + LINE - 1) // LINE * LINE


cdef inline void* _take(Room room, int64_t bytes) noexcept:
    cdef int8_t* at = room.free
    room.free += _lines(bytes)
    return at


cdef void _add_norm(const float* x, const float* delta, const float* w, float eps, int64_t C, float* z,
                    float* h) noexcept nogil:
    """z = x + delta, h = its norm; delta may be NULL."""
    cdef float rstd
    if delta == NULL:
        memcpy(z, x, C * sizeof(float))
    norm_rows(1, x, delta, w, eps, 1, C, NULL if delta == NULL else z, h, &rstd)


cdef inline void _project(int threads, const float* x, const Matrix* m, float k, Spikes* spikes,
                          float* y) noexcept nogil:
    """y (O) = spikes(x) W^T + b."""
    chosen_path().spike(x, spikes, m.I, k, LEAST, MOST)
    multiply(threads, m, 1, spikes, y)


# --------------------------------------------------------------------------------------- feed-forward

def decode_ffn(be, x, delta, norm, eps, gate_up, down):
    """See ops/decode.py."""
    if x.size != norm.size:
        return reference.decode_ffn.reference(be, x, delta, norm, eps, gate_up, down)
    z, y = np.empty_like(x), np.empty_like(x)
    _ffn(be.threads, x, delta, norm, eps, _prepared(gate_up), gate_up.k, _prepared(down), down.k, z, y)
    return z, y


cdef _ffn(int threads, const float[:, :, ::1] x, const float[:, :, ::1] delta, const float[::1] norm, float eps,
          Prepared gate_up, float k_in, Prepared down, float k_out, float[:, :, ::1] z, float[:, :, ::1] y):
    cdef int64_t C = norm.shape[0], F = down.m.I
    cdef Room room = Room(_lines(4 * C) + _lines(8 * F) + _lines(4 * F) + spike_room(C) + spike_room(F))
    cdef float *a = <float*>_take(room, 4 * C), *rows = <float*>_take(room, 8 * F), *h = <float*>_take(room, 4 * F)
    cdef Spikes s_in = spikes_in(<int8_t*>_take(room, spike_room(C)), C)
    cdef Spikes s_out = spikes_in(<int8_t*>_take(room, spike_room(F)), F)
    cdef const float* d = NULL if delta is None else &delta[0, 0, 0]
    assert gate_up.m.O == 2 * F and gate_up.m.I == down.m.O == C == z.shape[2]
    with nogil:
        _add_norm(&x[0, 0, 0], d, &norm[0], eps, C, &z[0, 0, 0], a)
        chosen_path().spike(a, &s_in, C, k_in, LEAST, MOST)
        _gate_up(threads, &gate_up.m, F, &s_in, rows, h)
        _project(threads, h, &down.m, k_out, &s_out, &y[0, 0, 0])


cdef void _gate_up(int threads, const Matrix* m, int64_t F, const Spikes* s, float* rows, float* h) noexcept nogil:
    """A thread takes some rows of gate, the same of up, and joins them."""
    cdef int64_t i, first, last, fours = (F + 3) // 4
    cdef int used = team(threads, 2 * F * m.I // 8)
    for i in prange(used, schedule="static", num_threads=used):
        first, last = 4 * (fours * i // used), min(F, 4 * (fours * (i + 1) // used))
        product(chosen_path(), m, first, last, 1, s, rows)
        product(chosen_path(), m, F + first, F + last, 1, s, rows)
        swiglu_row(rows + first, rows + F + first, h + first, last - first)


# --------------------------------------------------------------------------------------- linear attention

def decode_gla(be, x, delta, norm, eps, inputs, b, heads, kv_heads, divisor, g_norm, state, output):
    """See ops/decode.py."""
    if x.size != norm.size or not walks(g_norm.size) or not state.flags.c_contiguous:
        return reference.decode_gla.reference(be, x, delta, norm, eps, inputs, b, heads, kv_heads, divisor, g_norm,
                                              state, output)
    z, y = np.empty_like(x), np.empty_like(x)
    _gla(be.threads, x, delta, norm, eps, _prepared(inputs), b, inputs.k, heads, divisor, g_norm, state,
         _prepared(output), output.k, z, y)
    return z, y


cdef _gla(int threads, const float[:, :, ::1] x, const float[:, :, ::1] delta, const float[::1] norm, float eps,
          Prepared inputs, float[::1] b, float k_in, int64_t H, float divisor, const float[::1] g_norm,
          float[:, :, :, ::1] state, Prepared output, float k_out, float[:, :, ::1] z, float[:, :, ::1] y):
    cdef int64_t C = norm.shape[0], G = state.shape[1], D = state.shape[3], R = H // G, Q = H * D, K = G * D, g
    cdef Room room = Room(_lines(4 * C) + _lines(4 * inputs.m.O) + 2 * _lines(4 * Q) + 2 * _lines(4 * K)
                          + _lines(4 * H) + spike_room(C) + spike_room(Q))
    cdef float* rstd = <float*>_take(room, 4 * H)
    cdef float *h = <float*>_take(room, 4 * C), *rows = <float*>_take(room, 4 * inputs.m.O)
    cdef float *q = <float*>_take(room, 4 * Q), *o = <float*>_take(room, 4 * Q)
    cdef float *k = <float*>_take(room, 4 * K), *log_g = <float*>_take(room, 4 * K), *v = rows + Q + K
    cdef Spikes s_in = spikes_in(<int8_t*>_take(room, spike_room(C)), C)
    cdef Spikes s_out = spikes_in(<int8_t*>_take(room, spike_room(Q)), Q)
    cdef Matrix m_in = _with_bias(inputs, b)
    cdef const float* d = NULL if delta is None else &delta[0, 0, 0]
    cdef int used = team(threads, K * D // 4)
    assert inputs.m.O == Q + 3 * K and inputs.m.I == output.m.O == C and output.m.I == Q and g_norm.shape[0] == D
    with nogil:
        _add_norm(&x[0, 0, 0], d, &norm[0], eps, C, &z[0, 0, 0], h)
        _project(threads, h, &m_in, k_in, &s_in, rows)
        relu_row(rows, q, Q)
        relu_row(rows + Q, k, K)
        log_gate_row(rows + Q + 2 * K, divisor, log_g, K)
        for g in prange(G, schedule="static", num_threads=used):
            walk_token(D, R, q + g * R * D, k + g * D, v + g * D, log_g + g * D, &state[0, g, 0, 0], o + g * R * D)
        norm_rows(1, o, NULL, &g_norm[0], eps, H, D, NULL, q, rstd)
        _project(threads, q, &output.m, k_out, &s_out, &y[0, 0, 0])


# --------------------------------------------------------------------------------------- softmax attention

def decode_attention(be, x, delta, norm, eps, inputs, b, cos, sin, heads, kv_heads, spike_k, cache, output):
    """See ops/decode.py."""
    if x.size != norm.size:
        return reference.decode_attention.reference(be, x, delta, norm, eps, inputs, b, cos, sin, heads, kv_heads,
                                                    spike_k, cache, output)
    z, y = np.empty_like(x), np.empty_like(x)
    slot = cache.claim()
    _attention(be.threads, x, delta, norm, eps, _prepared(inputs), b, inputs.k, cos, sin, heads, spike_k, cache.k,
               cache.ku, cache.v, cache.vu, slot, cache.count, _prepared(output), output.k, z, y)
    return z, y


cdef _attention(int threads, const float[:, :, ::1] x, const float[:, :, ::1] delta, const float[::1] norm, float eps,
                Prepared inputs, float[::1] b, float k_in, const float[:, ::1] cos, const float[:, ::1] sin, int64_t H,
                float spike_k, int8_t[:, :, :, ::1] k8, float[:, :, ::1] ku, int8_t[:, :, :, ::1] v8,
                float[:, :, ::1] vu, int64_t slot, int64_t count, Prepared output, float k_out, float[:, :, ::1] z,
                float[:, :, ::1] y):
    cdef int64_t C = norm.shape[0], G = k8.shape[2], D = k8.shape[3], R = H // G, Q = H * D, K = G * D, g, r
    cdef int used = team(threads, Q * count // 16)
    cdef Room room = Room(_lines(4 * C) + _lines(4 * inputs.m.O) + 2 * _lines(4 * Q) + _lines(4 * K) + _lines(2 * Q)
                          + _lines(4 * H) + used * _lines(4 * count) + spike_room(C) + spike_room(Q))
    cdef float *h = <float*>_take(room, 4 * C), *rows = <float*>_take(room, 4 * inputs.m.O), *v = rows + Q + K
    cdef float *q = <float*>_take(room, 4 * Q), *o = <float*>_take(room, 4 * Q), *k = <float*>_take(room, 4 * K)
    cdef int16_t* q16 = <int16_t*>_take(room, 2 * Q)
    cdef float *qv = <float*>_take(room, 4 * H), *p = <float*>_take(room, used * _lines(4 * count))
    cdef int64_t p_step = _lines(4 * count) // 4
    cdef Spikes s_in = spikes_in(<int8_t*>_take(room, spike_room(C)), C)
    cdef Spikes s_out = spikes_in(<int8_t*>_take(room, spike_room(Q)), Q)
    cdef Matrix m_in = _with_bias(inputs, b)
    cdef const float* d = NULL if delta is None else &delta[0, 0, 0]
    cdef const Path* path = chosen_path()
    cdef float scale = <float>pow(D, -0.5)
    assert inputs.m.O == Q + 2 * K and inputs.m.I == output.m.O == C and output.m.I == Q and 2 * cos.shape[1] == D
    with nogil:
        _add_norm(&x[0, 0, 0], d, &norm[0], eps, C, &z[0, 0, 0], h)
        _project(threads, h, &m_in, k_in, &s_in, rows)
        rotate_heads(rows, q, &cos[0, 0], &sin[0, 0], Q, D // 2, 1)
        rotate_heads(rows + Q, k, &cos[0, 0], &sin[0, 0], K, D // 2, 1)
        for r in range(H):
            qv[r] = path.query(q + r * D, q16 + r * D, D, spike_k, LEAST, MOST)
        for g in range(G):
            ku[0, slot, g] = path.to_int8(k + g * D, &k8[0, slot, g, 0], D)
            vu[0, slot, g] = path.to_int8(v + g * D, &v8[0, slot, g, 0], D)
        for g in prange(G, schedule="static", num_threads=used):
            path.attend(q16 + g * R * D, qv + g * R, &k8[0, 0, g, 0], &ku[0, 0, g], &v8[0, 0, g, 0], &vu[0, 0, g],
                        R, D, G, count, scale, p + threadid() * p_step, o + g * R * D)
        _project(threads, o, &output.m, k_out, &s_out, &y[0, 0, 0])


TWINS = {"decode_ffn": decode_ffn, "decode_gla": decode_gla, "decode_attention": decode_attention}
