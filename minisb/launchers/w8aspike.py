"""Twins of W8ASpike: counts, the product with int8 weights, alone and per expert, int8 heads and a step over them."""

from __future__ import annotations

import numpy as np

from minisb.launchers.attention import STEP_THREADS, host_or_device
from minisb.launchers.grid import LARGEST_HEAD, contiguous, each, flat, int32, warp_a_row
from minisb.ops import w8aspike
from minisb.ops.spike import VTH_MAX, VTH_MIN

BLOCK = 128  # channels of a block (BLOCK in cuda/w8aspike.cu)
MANY, TILE = 4, 64  # tokens that share a look at the weights, few of them or many
FEW = 16  # tokens, at most, that are few
FLOAT = np.empty(0, "float32")  # what these kernels compute in


def count_spikes(be, x, k):
    *_, vth, counts = _counts(be, x, k, whole=True)
    return counts, vth


def spike_int8(be, x, k):
    """How many counts are beyond int8 only the GPU knows: reading the rest waits for it."""
    s, _, vth, counts = _counts(be, x, k, whole=True)
    s = be.xp.ascontiguousarray(s[:, : x.shape[1]])
    token, channel = be.xp.nonzero(counts != s)
    return s, vth, (token.astype("int32"), channel.astype("int32"), (counts - s)[token, channel])


def _counts(be, x, k, whole=False):
    """x (N,C) -> s (N,blocks 128), beyond (N,blocks), vth (N,1), counts (N,C) if asked for: cuda/w8aspike.cu."""
    x = be.xp.ascontiguousarray(x, dtype="float32")
    N, C = x.shape
    blocks = -(-C // BLOCK)
    s, beyond = be.xp.empty((N, blocks * BLOCK), "int8"), be.xp.empty((N, blocks), "int32")
    vth, counts = be.xp.empty((N, 1), "float32"), be.xp.empty((N, C), "int32") if whole else None
    arrays, sizes = (x, s, beyond, vth, counts), (N, C, blocks, k, VTH_MIN, VTH_MAX)
    be.launch("spike_int8", x, *warp_a_row(N), *arrays, *sizes)
    return s, beyond, vth, counts


def w8aspike_linear(be, x, w8, scales, k, b=None):
    rows = flat(be.xp.ascontiguousarray(x, dtype="float32"))
    return _product(be, rows, w8, scales, k, b, None).reshape(*x.shape[:-1], w8.shape[0])


def w8aspike_grouped(be, x, w8, scales, k, offsets):
    return _product(be, be.xp.ascontiguousarray(x, dtype="float32"), w8, scales, k, None, int32(be, offsets))


def _product(be, x, w8, scales, k, b, offsets):
    w8, scales, b = contiguous(be, w8, scales.swapaxes(-1, -2), b)
    (N, I), O, E = x.shape, w8.shape[-2], 1 if offsets is None else len(w8)
    s, beyond, vth, _ = _counts(be, x, k)
    y = be.xp.empty((N, O), "float32")
    arguments = x, s, beyond, vth, w8, scales, b, offsets, y, E, N, I, O, scales.shape[-2]
    if N <= FEW:
        many = MANY if offsets is None else 1
        blocks, threads = warp_a_row(O)
        be.launch("w8aspike_few", FLOAT, (blocks, -(-N // many)), threads, *arguments, many)
    else:
        tiles = -(-N // TILE) if offsets is None else N // TILE + E + 1
        be.launch("w8aspike_many", FLOAT, (-(-O // TILE), tiles), (16, 16), *arguments)
    return y


def embedding_int8(be, tokens, w8, scales):
    tokens = int32(be, tokens)
    w8, scales = contiguous(be, w8, scales)
    V, I = w8.shape
    x = be.xp.empty((*tokens.shape, I), "float32")
    each(be, "embedding_int8", FLOAT, x.size, tokens, w8, scales, x, tokens.size, V, I)
    return x


def code_heads(be, q, k, v, spike_k):
    q, k, v = (be.xp.ascontiguousarray(x, dtype="float32") for x in (q, k, v))
    q16, k8, v8 = be.xp.empty(q.shape, "int16"), be.xp.empty(k.shape, "int8"), be.xp.empty(v.shape, "int8")
    qv, ku, vu = (be.xp.empty(x.shape[:-1], "float32") for x in (q, k, v))
    arrays, sizes = (q, k, v, q16, qv, k8, ku, v8, vu), (qv.size, ku.size, q.shape[-1])
    limits = spike_k, VTH_MIN, VTH_MAX, w8aspike.TINY
    be.launch("code_heads", FLOAT, *warp_a_row(qv.size + 2 * ku.size), *arrays, *sizes, *limits)
    return q16, qv, k8, ku, v8, vu


def store_token_int8(be, keys, key_units, values, value_units, k8, ku, v8, vu, slot):
    new, (B, S, G, D) = contiguous(be, k8, ku, v8, vu), keys.shape
    where = host_or_device(slot)
    each(be, "store_token_int8", FLOAT, k8.size, *new, keys, key_units, values, value_units, *where, B, S, G, D)


def attention_step_int8(be, q16, qv, k8, ku, v8, vu, count, scale=None):
    (B, _, H, D), (_, S, G, _) = q16.shape, k8.shape
    if D > LARGEST_HEAD:
        return w8aspike.attention_step_int8.reference(be, q16, qv, k8, ku, v8, vu, count, scale)
    arrays, o = contiguous(be, q16, qv, k8, ku, v8, vu), be.xp.empty(q16.shape, "float32")
    sizes = *host_or_device(count), S, H, G, D, D**-0.5 if scale is None else scale
    be.launch("attention_step_int8", FLOAT, B * H, STEP_THREADS, *arrays, o, *sizes)
    return o


TWINS = {
    "w8aspike": (
        count_spikes, spike_int8, w8aspike_linear, w8aspike_grouped, embedding_int8, code_heads, store_token_int8,
        attention_step_int8,
    )
}  # fmt: skip
