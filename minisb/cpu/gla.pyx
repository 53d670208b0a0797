"""ops/gla.py's fast twin: the recurrence, one key/value head a thread (see gla_walk.h).

Head sizes that are no multiple of 4 are left to the reference.  Saved is what the reference saves.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport pow
from libc.stdint cimport int64_t

from minisb.cpu.common cimport aligned, real
from minisb.ops import gla as reference

cdef extern from "gla.h" nogil:
    int MOST_D
    void gla_walk_forward_float(int64_t D, int64_t T, int64_t R, int64_t chunk, float scale, const float* q,
                                const float* k, const float* v, const float* log_g, int64_t q_step, int64_t k_step,
                                float* S, float* states, int64_t states_step, float* o)
    void gla_walk_forward_double(int64_t D, int64_t T, int64_t R, int64_t chunk, double scale, const double* q,
                                 const double* k, const double* v, const double* log_g, int64_t q_step, int64_t k_step,
                                 double* S, double* states, int64_t states_step, double* o)
    void gla_walk_backward_float(int64_t D, int64_t T, int64_t R, int64_t chunk, float scale, const float* q,
                                 const float* k, const float* v, const float* log_g, const float* d_o,
                                 int64_t q_step, int64_t k_step, const float* states, int64_t states_step, float* dS,
                                 float* dq, float* dk, float* dv, float* dlog_g, float* scratch)
    void gla_walk_backward_double(int64_t D, int64_t T, int64_t R, int64_t chunk, double scale, const double* q,
                                  const double* k, const double* v, const double* log_g, const double* d_o,
                                  int64_t q_step, int64_t k_step, const double* states, int64_t states_step,
                                  double* dS, double* dq, double* dk, double* dv, double* dlog_g, double* scratch)


def gla_forward(be, q, k, v, log_g, state=None, scale=None, int64_t chunk=reference.CHUNK):
    """See ops/gla.py."""
    if not walks(k.shape[3]):
        return reference.gla_forward.reference(be, q, k, v, log_g, state, scale, chunk)
    q, k, v, log_g = _contiguous(q, k, v, log_g)
    B, T, G, D = k.shape
    scale = D**-0.5 if scale is None else scale
    final = np.zeros((B, G, D, D), k.dtype) if state is None else np.array(state, k.dtype, order="C")
    states = np.empty((B, -(-T // chunk), G, D, D), k.dtype)
    o = np.empty(q.shape, q.dtype)
    if q.dtype == np.float32:
        _forward[float](be.threads, q, k, v, log_g, final, states, o, scale, chunk)
    else:
        _forward[double](be.threads, q, k, v, log_g, final, states, o, scale, chunk)
    return o, final, (q, k, v, log_g, scale, chunk, states)


def gla_backward(be, do, dstate, saved):
    """See ops/gla.py."""
    q, k, v, log_g, scale, chunk, states = saved
    if not walks(k.shape[3]):
        return reference.gla_backward.reference(be, do, dstate, saved)
    q, k, v, log_g, do, states = _contiguous(q, k, v, log_g, do, states)
    B, T, G, D = k.shape
    first = np.zeros((B, G, D, D), k.dtype) if dstate is None else np.array(dstate, k.dtype, order="C")
    dq, dk, dv, dlog_g = [np.empty(x.shape, x.dtype) for x in (q, k, v, log_g)]
    scratch = np.empty((B * G, 2 * D * D + 8 * D + 16), k.dtype)
    if q.dtype == np.float32:
        _backward[float](be.threads, q, k, v, log_g, do, states, first, dq, dk, dv, dlog_g, scratch, scale, chunk)
    else:
        _backward[double](be.threads, q, k, v, log_g, do, states, first, dq, dk, dv, dlog_g, scratch, scale, chunk)
    return dq, dk, dv, dlog_g, first


def gla_step(be, q, k, v, log_g, state, scale=None):
    """See ops/gla.py."""
    D = k.shape[3]
    if not walks(D) or not state.flags.c_contiguous:
        return reference.gla_step.reference(be, q, k, v, log_g, state, scale)
    q, k, v, log_g = _contiguous(q, k, v, log_g)
    o = np.empty(q.shape, q.dtype)
    scale = D**-0.5 if scale is None else scale
    if q.dtype == np.float32:
        _forward[float](be.threads, q, k, v, log_g, state, None, o, scale, 1)
    else:
        _forward[double](be.threads, q, k, v, log_g, state, None, o, scale, 1)
    return o


cdef bint walks(int64_t D) noexcept nogil:
    return D % 4 == 0 and D <= MOST_D


cdef void walk_token(int64_t D, int64_t R, const float* q, const float* k, const float* v, const float* log_g,
                     float* S, float* o) noexcept nogil:
    gla_walk_forward_float(D, 1, R, 1, <float>pow(D, -0.5), q, k, v, log_g, R * D, D, S, NULL, 0, o)


def _contiguous(*arrays):
    return [np.ascontiguousarray(x) for x in arrays]


cdef _forward(int threads, real[:, :, :, ::1] q, real[:, :, :, ::1] k, real[:, :, :, ::1] v,
              real[:, :, :, ::1] log_g, real[:, :, :, ::1] S, real[:, :, :, :, ::1] states,
              real[:, :, :, ::1] o, real scale, int64_t chunk):
    """S (B,G,D,D) is updated; states (B,N,G,D,D) or None gets the state before each chunk."""
    cdef int64_t T = k.shape[1], G = k.shape[2], D = k.shape[3], H = q.shape[2], R = H // G
    cdef int64_t tasks = k.shape[0] * G, i, b, g, at_q, at_k
    cdef real* saved
    # A single token of a small model is done before a second thread has woken up.
    cdef int used = threads if tasks * T * D * D > 1 << 16 else 1
    for i in prange(tasks, nogil=True, schedule="static", num_threads=used):
        b, g = i // G, i % G
        at_q, at_k = b * T * H * D + g * R * D, b * T * G * D + g * D
        saved = NULL if states is None else &states[b, 0, g, 0, 0]
        if real is float:
            gla_walk_forward_float(D, T, R, chunk, scale, &q[0, 0, 0, 0] + at_q, &k[0, 0, 0, 0] + at_k,
                                   &v[0, 0, 0, 0] + at_k, &log_g[0, 0, 0, 0] + at_k, H * D, G * D,
                                   &S[b, g, 0, 0], saved, G * D * D, &o[0, 0, 0, 0] + at_q)
        else:
            gla_walk_forward_double(D, T, R, chunk, scale, &q[0, 0, 0, 0] + at_q, &k[0, 0, 0, 0] + at_k,
                                    &v[0, 0, 0, 0] + at_k, &log_g[0, 0, 0, 0] + at_k, H * D, G * D,
                                    &S[b, g, 0, 0], saved, G * D * D, &o[0, 0, 0, 0] + at_q)


cdef _backward(int threads, real[:, :, :, ::1] q, real[:, :, :, ::1] k, real[:, :, :, ::1] v,
               real[:, :, :, ::1] log_g, real[:, :, :, ::1] do, real[:, :, :, :, ::1] states,
               real[:, :, :, ::1] dS, real[:, :, :, ::1] dq, real[:, :, :, ::1] dk, real[:, :, :, ::1] dv,
               real[:, :, :, ::1] dlog_g, real[:, ::1] scratch, real scale, int64_t chunk):
    cdef int64_t T = k.shape[1], G = k.shape[2], D = k.shape[3], H = q.shape[2], R = H // G
    cdef int64_t tasks = k.shape[0] * G, i, b, g, at_q, at_k
    for i in prange(tasks, nogil=True, schedule="static", num_threads=threads):
        b, g = i // G, i % G
        at_q, at_k = b * T * H * D + g * R * D, b * T * G * D + g * D
        if real is float:
            gla_walk_backward_float(D, T, R, chunk, scale, &q[0, 0, 0, 0] + at_q, &k[0, 0, 0, 0] + at_k,
                                    &v[0, 0, 0, 0] + at_k, &log_g[0, 0, 0, 0] + at_k, &do[0, 0, 0, 0] + at_q,
                                    H * D, G * D, &states[b, 0, g, 0, 0], G * D * D, &dS[b, g, 0, 0],
                                    &dq[0, 0, 0, 0] + at_q, &dk[0, 0, 0, 0] + at_k, &dv[0, 0, 0, 0] + at_k,
                                    &dlog_g[0, 0, 0, 0] + at_k, aligned(&scratch[i, 0]))
        else:
            gla_walk_backward_double(D, T, R, chunk, scale, &q[0, 0, 0, 0] + at_q, &k[0, 0, 0, 0] + at_k,
                                     &v[0, 0, 0, 0] + at_k, &log_g[0, 0, 0, 0] + at_k, &do[0, 0, 0, 0] + at_q,
                                     H * D, G * D, &states[b, 0, g, 0, 0], G * D * D, &dS[b, g, 0, 0],
                                     &dq[0, 0, 0, 0] + at_q, &dk[0, 0, 0, 0] + at_k, &dv[0, 0, 0, 0] + at_k,
                                     &dlog_g[0, 0, 0, 0] + at_k, aligned(&scratch[i, 0]))


TWINS = {"gla_forward": gla_forward, "gla_backward": gla_backward, "gla_step": gla_step}
