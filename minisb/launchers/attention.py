"""Twins of softmax attention."""

from __future__ import annotations

from minisb.launchers.grid import LARGEST_HEAD, WARPS, contiguous, warp_a_row, wide_type
from minisb.ops import attention


def attention_forward(be, q, k, v, window, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_forward.reference(be, q, k, v, window, scale)
    q, k, v = contiguous(be, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = be.xp.empty_like(q), be.xp.empty(q.shape[:-1], wide_type(q))
    blocks = q.shape[0] * q.shape[2], _tiles(q, q.shape[1])
    be.launch("attention_forward", q, blocks, (16, 16), q, k, v, o, lse, *_sizes(q, k, window), scale)
    return o, (q, k, v, o, lse, window, scale)


def attention_backward(be, do, saved):
    q, k, v, o, lse, window, scale = saved
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_backward.reference(be, do, saved)
    do, q, k, v, o, lse = contiguous(be, do, q, k, v, o, lse)
    dq, dk, dv, delta = *(be.xp.empty_like(x) for x in (q, k, v)), be.xp.empty_like(lse)
    be.launch("attention_delta", q, *warp_a_row(lse.size), do, o, delta, lse.size, q.shape[3])
    inputs, sizes = (do, q, k, v, lse, delta), (*_sizes(q, k, window), scale)
    blocks = q.shape[0] * q.shape[2], _tiles(q, q.shape[1])
    be.launch("attention_backward_q", q, blocks, (16, 16), *inputs, dq, *sizes)
    blocks = k.shape[0] * k.shape[2], _tiles(q, k.shape[1])
    for of_values, found in ((0, dk), (1, dv)):
        be.launch("attention_backward_kv", q, blocks, (16, 16), *inputs, found, of_values, *sizes)
    return dq, dk, dv


def attention_step(be, q, k, v, count, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_step.reference(be, q, k, v, count, scale)
    q, k, v = contiguous(be, q, k, v)
    (B, _, H, D), (_, S, G, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else scale
    o = be.xp.empty_like(q)
    be.launch("attention_step", q, B * H, 32 * WARPS, q, k, v, o, count, S, H, G, D, scale)
    return o


def _sizes(q, k, window):
    """T, S, H, G, D and the window; one longer than the text is the text."""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], min(window, k.shape[1])


def _tiles(q, count: int) -> int:
    """TILE in cuda/attention.cu."""
    return -(-count // (32 if q.dtype.itemsize == 8 else 64))


TWINS = {"attention": (attention_forward, attention_backward, attention_step)}
