"""Twins of gated linear attention: the plain kernels, and the ones on tensor cores where they fit."""

from __future__ import annotations

from minisb.launchers.grid import LARGEST_HEAD, MULTIPROCESSORS, WARPS, contiguous, each, tensor_cores, wide_type
from minisb.ops import gla

FAST_CHUNK = 64  # tokens of a chunk on tensor cores (CHUNK in cuda/gla_fast.cu)
CHUNK = 16  # tokens between two saved states (CHUNK in cuda/gla.cu)
#: Forward: from so many states on, a block walks each; below, chunks are shared out once their states are known.
MANY = MULTIPROCESSORS // 2
#: Heads of D channels -> the kernel of backward and its threads.
BACKWARD = {64: ("gla_fast_backward_64", 256), 128: ("gla_fast_backward_128", 512)}


def gla_forward(be, q, k, v, log_g, state=None, scale=None, chunk=CHUNK):
    if tensor_cores(be, q, _fast_bytes(q.shape[3])):
        return _gla_forward_fast(be, q, k, v, log_g, state, scale)
    if not _walkable(q, k):
        return gla.gla_forward.reference(be, q, k, v, log_g, state, scale, chunk)
    return _gla_forward_plain(be, q, k, v, log_g, state, scale, chunk)


def _gla_forward_plain(be, q, k, v, log_g, state, scale, chunk):
    q, k, v, log_g, state = contiguous(be, q, k, v, log_g, state)
    B, T, G, D = k.shape
    scale = D**-0.5 if scale is None else scale
    o, final = be.xp.empty_like(q), be.xp.empty((B, G, D, D), wide_type(q))
    states = be.xp.empty((B, -(-T // chunk), G, D, D), wide_type(q))
    _walk(be, q, k, v, _decay(be, q, log_g), state, o, final, states, scale, chunk)
    return o, final, (q, k, v, log_g, scale, chunk, states)


def gla_step(be, q, k, v, log_g, state, scale=None):
    if not _walkable(q, k):
        return gla.gla_step.reference(be, q, k, v, log_g, state, scale)
    q, k, v, log_g = contiguous(be, q, k, v, log_g)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    o = be.xp.empty_like(q)
    _walk(be, q, k, v, _decay(be, q, log_g), state, o, state, None, scale, 1)
    return o


def gla_backward(be, do, dstate, saved):
    q, k, v, log_g, scale, chunk, states = saved
    if chunk == FAST_CHUNK and states.dtype == "float32" and tensor_cores(be, q, _backward_bytes(q.shape[3])):
        return _gla_backward_fast(be, do, dstate, saved)
    if not _walkable(q, k):
        return gla.gla_backward.reference(be, do, dstate, saved)
    if chunk > CHUNK:  # more than a thread keeps: walk once more, saving oftener
        return gla_backward(be, do, dstate, _gla_forward_plain(be, q, k, v, log_g, states[:, 0], scale, CHUNK)[2])
    do, dstate, q, k, v, log_g, states = contiguous(be, do, dstate, q, k, v, log_g, states)
    B, T, G, D = k.shape
    decay = _decay(be, q, log_g)
    dq, dk, dv, dlog_g = (be.xp.empty_like(x) for x in (q, k, v, log_g))
    dfirst = be.xp.empty((B, G, D, D), wide_type(q))
    sizes = T, q.shape[2], G, D, scale
    blocks, threads, parts = _lines(B * G, D, per_thread=16)
    be.launch("gla_backward_columns", q, blocks, threads, do, q, k, decay, dstate, dv, dfirst, *sizes, parts)
    blocks, threads, parts = _lines(B * G, D, per_thread=8)
    inputs = do, q, k, v, decay, states, dstate
    be.launch("gla_backward_rows", q, blocks, threads, *inputs, dq, dk, dlog_g, *sizes, chunk, parts)
    return dq, dk, dv, dlog_g, dfirst


def _fast_bytes(D: int) -> int:
    """sizeof(Shared<D>) in cuda/gla_fast.cu."""
    padded = 2 * (D + 8)
    stage = FAST_CHUNK * (4 * D + 2 * D + padded)
    return 2 * stage + 3 * FAST_CHUNK * padded + D * padded + 8 * 4 * D


def _gla_forward_fast(be, q, k, v, log_g, first, scale):
    q, k, v, log_g, first = contiguous(be, q, k, v, log_g, first)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    forward = _forward_by_walks if k.shape[0] * k.shape[2] >= MANY else _forward_by_chunks
    o, final, states = forward(be, q, k, v, log_g, first, scale)
    return o, final, (q, k, v, log_g, scale, FAST_CHUNK, states)


def _forward_by_walks(be, q, k, v, log_g, first, scale):
    """Where there are many states: a block walks the text of each."""
    (B, T, G, D), H = k.shape, q.shape[2]
    o, final = be.xp.empty_like(q), be.xp.empty((B, G, D, D), "float32")
    states = be.xp.empty((B, -(-T // FAST_CHUNK), G, D, D), "float32")
    kernel = {64: "gla_fast_forward_64", 128: "gla_fast_forward_128"}[D]
    arrays, sizes = (q, k, v, log_g, first, o, final, states), (T, H, G, scale)
    be.launch(kernel, q, B * G, 256, *arrays, *sizes, shared=_fast_bytes(D))
    return o, final, states


def _forward_by_chunks(be, q, k, v, log_g, first, scale):
    """Where there are few: the states from chunk to chunk, and then every chunk by itself."""
    (B, T, G, D), H = k.shape, q.shape[2]
    states, final = _chunk_states(be, k, v, log_g, first, 1.0, forwards=1)
    o = be.xp.empty_like(q)
    kernel = {64: "gla_fast_outputs_64", 128: "gla_fast_outputs_128"}[D]
    grid, shared = (states.shape[1], B * G), _outputs_bytes(D)
    be.launch(kernel, q, grid, 256, q, k, v, log_g, states, o, T, H, G, scale, shared=shared)
    return o, final, states


def _outputs_bytes(D: int) -> int:
    """sizeof(Shared<D>) in cuda/gla_outputs_fast.cu."""
    rows = FAST_CHUNK * (D + 8)
    return 2 * (6 * rows + D * (D + 8)) + 4 * (rows + 7 * D)


def _added_bytes(D: int) -> int:
    """sizeof(Shared<D>) in cuda/gla_states_fast.cu."""
    return FAST_CHUNK * (D + 8) * (4 * 2 + 4) + 3 * 4 * D


def _backward_bytes(D: int) -> int:
    """sizeof(Shared<D>) in cuda/gla_backward_fast.cu."""
    rows = FAST_CHUNK * (D + 8)
    scores = FAST_CHUNK * (FAST_CHUNK + 8)
    return 2 * (6 * rows + 2 * D * (D + 8) + 2 * scores) + 4 * (rows + 8 * D + FAST_CHUNK)


def _chunk_states(be, x, y, log_g, first, scale, forwards):
    """The state before each chunk from x = k, y = v, or the gradient of the state after each from x = q, y = do
    (B,N,G,D,D), and the one after the last; all float32."""
    (B, T, G, D), H = log_g.shape, x.shape[2]
    chunks = -(-T // FAST_CHUNK)
    states, decays = be.xp.empty((B, chunks, G, D, D), "float32"), be.xp.empty((B, chunks, G, D), "float32")
    last = be.xp.empty((B, G, D, D), "float32")
    kernel = {64: "gla_fast_added_64", 128: "gla_fast_added_128"}[D]
    sizes, shared = (T, H, G, scale, forwards), _added_bytes(D)
    be.launch(kernel, x, (chunks, B * G), 2 * D, x, y, log_g, states, decays, *sizes, shared=shared)
    sizes = B, chunks, G * D * D, D, forwards
    each(be, "gla_fast_scan", x, last.size, first, states, decays, last, *sizes)
    return states, last


def _gla_backward_fast(be, do, dstate, saved):
    """The gradients of the states from chunk to chunk, and then every chunk by itself."""
    q, k, v, log_g, scale, _, states = saved
    do, dstate, q, k, v, log_g, states = contiguous(be, do, dstate, q, k, v, log_g, states)
    (B, T, G, D), H = k.shape, q.shape[2]
    dstates, dfirst = _chunk_states(be, q, do, log_g, dstate, scale, forwards=0)
    dq, dk, dv, dlog_g = (be.xp.empty_like(x) for x in (q, k, v, log_g))
    kernel, threads = BACKWARD[D]
    arrays = do, q, k, v, log_g, states, dstates, dq, dk, dv, dlog_g
    be.launch(kernel, q, (states.shape[1], B * G), threads, *arrays, T, H, G, scale, shared=_backward_bytes(D))
    return dq, dk, dv, dlog_g, dfirst


def _walkable(q, k) -> bool:
    return walkable(k.shape[3], q.shape[2] // k.shape[2], q.dtype)


def walkable(D: int, heads: int, dtype) -> bool:
    """Whether one token of a group of `heads` query heads fits into a block's shared memory (STAGE in cuda/gla.cu)."""
    padded = 8 << (-(-D // 8) - 1).bit_length()
    size = 8 if dtype.itemsize == 8 else 4
    return D <= LARGEST_HEAD and (3 + 2 * heads) * max(padded, 16) * size <= 40960


def _decay(be, q, log_g):
    decay = be.xp.empty_like(log_g)
    each(be, "gla_decay", q, log_g.size, log_g, decay, log_g.size)
    return decay


def _walk(be, q, k, v, decay, first, o, final, states, scale, chunk):
    B, T, G, D = k.shape
    blocks, threads, parts = _lines(B * G, D, per_thread=16)
    sizes = T, q.shape[2], G, D, scale, chunk
    be.launch("gla_forward", q, blocks, threads, q, k, v, decay, first, o, final, states, *sizes, parts)


def _lines(states: int, D: int, per_thread: int):
    """Grid for columns or rows of states: blocks, threads, and the lanes that share one line of D entries."""
    parts = 1 << (-(-D // per_thread) - 1).bit_length()
    warps = -(-D // (32 // parts))
    a_block = min(warps, WARPS)
    return (states, -(-warps // a_block)), 32 * a_block, parts


TWINS = {"gla": (gla_forward, gla_backward, gla_step)}
