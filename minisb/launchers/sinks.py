"""Twins of attention sinks."""

from __future__ import annotations

from minisb.launchers.grid import LARGEST_HEAD, MULTIPROCESSORS, WARPS, contiguous, each, warp_a_row, wide_type
from minisb.ops import sinks


def sinks_forward(be, q, k, v, o=None, lse=None, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return sinks.sinks_forward.reference(be, q, k, v, o, lse, scale)
    q, k, v, o, lse = contiguous(be, q, k, v, o, lse)
    joined, both = be.xp.empty_like(q), be.xp.empty(q.shape[:3], wide_type(q))
    inputs, sizes = (q, k, v, o, lse), _sizes(q, k, scale)
    be.launch("sinks_forward", q, *warp_a_row(both.size), *inputs, joined, both, both.size, *sizes)
    return joined, both


def sinks_backward(be, do, q, k, v, o, lse, scale=None, dq=None):
    if q.shape[3] > LARGEST_HEAD:
        return sinks.sinks_backward.reference(be, do, q, k, v, o, lse, scale, dq)
    do, q, k, v, o, lse, dq = contiguous(be, do, q, k, v, o, lse, dq)
    sizes, delta, add = _sizes(q, k, scale), be.xp.empty_like(lse), dq is not None
    be.launch("attention_delta", q, *warp_a_row(lse.size), do, o, delta, lse.size, q.shape[3])
    dq = dq if add else be.xp.empty_like(q)
    inputs = do, q, k, v, lse, delta
    be.launch("sinks_backward_q", q, *warp_a_row(lse.size), *inputs, dq, add, lse.size, *sizes)
    # A few blocks for each multiprocessor, each with enough tokens that the partial sums stay the smaller part.
    tokens, G = q.shape[0] * q.shape[1], k.shape[1]
    a_slice = -(-tokens // max(1, min(4 * MULTIPROCESSORS // G, tokens // 16)))
    slices = -(-tokens // a_slice)
    partial = be.xp.empty((slices, 2, *k.shape), wide_type(q))
    be.launch("sinks_backward_kv", q, (G, slices), 32 * WARPS, *inputs, partial, tokens, a_slice, *sizes)
    dkv = be.xp.empty((2, *k.shape), wide_type(q))
    each(be, "sum_slices", q, dkv.size, partial, dkv, slices, dkv.size)
    return dq, *(x.astype(k.dtype, copy=False) for x in dkv)


def sinks_state_backward(be, dstate):
    (dstate,) = contiguous(be, dstate)
    total = be.xp.empty((1, *dstate.shape[1:]), dstate.dtype)
    each(be, "sum_slices", dstate, total.size, dstate, total, len(dstate), total.size)
    return total


def _sizes(q, k, scale):
    """S, H, G, D and the scale."""
    return k.shape[0], q.shape[2], k.shape[1], q.shape[3], q.shape[3] ** -0.5 if scale is None else scale


TWINS = {"sinks": (sinks_forward, sinks_backward, sinks_state_backward)}
