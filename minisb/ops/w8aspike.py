"""W8ASpike: INT8 weights times spike counts (report, section 3.3 and appendix A.8).

A product becomes an integer sum: weights are int8 with one fp32 scale a group of 128 consecutive
inputs of an output row, activations are spike counts with one threshold a token,

    y = vth * sum_group scale * (sum_i w8_i s_i) + b        the inner sum in int32, exact.

The rest of the arithmetic is fixed to the last bit: |x| is summed in 32 lanes, groups are added in
fp32 in index order, and no product is fused with its sum.  So this reference, every native and
any number of threads give equal bits.
"""

import numpy as np

from minisb.backend import op
from minisb.ops.moe import pieces
from minisb.ops.spike import VTH_MAX, VTH_MIN

GROUP = 128  # inputs that share a scale
INT8_MAX = 127  # -128 is left out: |s| and -w stay int8
LANES = 32  # partial sums of |x|
#: Larger counts are clipped, so that 128 of them times 127 stay in int32.  Only a mean |x| above
#: k * VTH_MAX leads there: otherwise the counts of n channels add up to at most n (k + 1/2).
COUNT_MAX = 1 << 17
TINY = np.float32(2.0**-126)  # the scale of a group of zeros: never 0, so that nothing divides by 0


# --- weights ------------------------------------------------------------------------------------


def group_starts(inputs, group=GROUP):
    """First input of each group; the last group may be shorter.  group None: one a row."""
    return np.arange(0, inputs, group or inputs)


def quantize_weight(w, group=GROUP, clip=1.0):
    """w (O,I) fp32 -> w8 int8 (O,I) in [-127, 127], scales fp32 (O,groups).

    scale = clip * max|w| / 127 of the group, w8 = rint(w / scale).  With clip 1 no weight is off by
    more than scale / 2; below 1 (a number, or (O,1): one a row) the largest are cut off and the
    others rounded more finely.
    """
    starts = group_starts(w.shape[1], group)
    largest = np.maximum.reduceat(np.abs(w), starts, axis=1)
    scales = np.maximum(largest * np.float32(1 / INT8_MAX) * np.asarray(clip, np.float32), TINY)
    w8 = np.rint(w / _spread(scales, w.shape[1], group).astype(np.float64))
    return w8.clip(-INT8_MAX, INT8_MAX).astype(np.int8), scales


def dequantize_weight(w8, scales, group=GROUP):
    """The fp32 matrix (O,I) that w8 and scales stand for."""
    return w8 * _spread(scales, w8.shape[1], group)


def group_of(inputs, groups):
    """The group size behind `groups` scales of `inputs` inputs: 128, or None for one a row."""
    return None if groups == 1 else GROUP


def _spread(scales, inputs, group):
    """(O,groups) -> (O,inputs)."""
    return np.repeat(scales, group or inputs, axis=1)[:, :inputs]


# --- activations --------------------------------------------------------------------------------


def row_threshold(x, k):
    """x (N,C) fp32 -> vth (N,1): eq. 19, with a sum whose order is written down.

    Lane j adds |x_j|, |x_(j+32)|, ... in turn; then lanes are added, the upper half to the lower,
    until one is left.  A token with NaN or infinity has the threshold NaN.
    """
    N, C = x.shape
    rounds = -(-C // LANES)
    lanes = np.zeros((N, rounds * LANES), np.float32)
    lanes[:, :C] = np.abs(x)
    with np.errstate(over="ignore"):
        lanes = lanes.reshape(N, rounds, LANES).sum(1)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        vth = lanes / np.float32(C) / np.float32(k)
    return np.where(np.isfinite(lanes), vth.clip(np.float32(VTH_MIN), np.float32(VTH_MAX)), np.float32(np.nan))


def row_counts(x, k):
    """x (N,C) fp32 -> counts int32 (N,C) = rint(x / vth) (eq. 21), vth (N,1)."""
    vth = row_threshold(x, k)
    with np.errstate(invalid="ignore"):
        counts = np.nan_to_num(np.rint(x / vth), nan=0.0).clip(-COUNT_MAX, COUNT_MAX)
    return counts.astype(np.int32), vth


@op
def count_spikes(be, x, k):
    """x (N,C) fp32 -> counts int32 (N,C), vth (N,1), as row_counts."""
    return row_counts(x, k)


@op
def spike_int8(be, x, k):
    """x (N,C) fp32 -> s int8 (N,C) in [-127, 127], vth (N,1), rest (token, channel, value).

    s + rest is the count, exactly: rest lists what the few counts beyond int8 exceed it by, three
    int32 arrays, ordered by token and channel.
    """
    counts, vth = row_counts(x, k)
    s = counts.clip(-INT8_MAX, INT8_MAX)
    token, channel = np.nonzero(counts != s)
    rest = (counts - s)[token, channel]
    return s.astype(np.int8), vth, (token.astype(np.int32), channel.astype(np.int32), rest)


# --- the product --------------------------------------------------------------------------------


@op
def w8aspike_linear(be, x, w8, scales, k, b=None):
    """x (...,I) fp32, w8 int8 (O,I), scales (O,groups), b (O,) or None -> y (...,O).

    The groups are those of `group_of`: 128 inputs each, or the whole row.
    """
    rows = x.reshape(-1, x.shape[-1])
    s, vth, (token, channel, rest) = spike_int8.reference(be, rows, k)
    counts = s.astype(np.int32)
    counts[token, channel] += rest
    O, I = w8.shape
    y = np.zeros((len(rows), O), np.float32)
    starts = group_starts(I, group_of(I, scales.shape[1]))
    for g, start in enumerate(starts):
        at = slice(start, starts[g + 1] if g + 1 < len(starts) else I)
        # float64 holds every such sum exactly, and has a fast matrix product where int32 has none
        sums = counts[:, at].astype(np.float64) @ w8[:, at].T.astype(np.float64)
        y += sums.astype(np.int32).astype(np.float32) * scales[:, g]
    y *= vth
    if b is not None:
        y += b
    return y.reshape(*x.shape[:-1], O)


@op
def w8aspike_grouped(be, x, w8, scales, k, offsets):
    """Experts: x (R,I) fp32, rows by expert, w8 int8 (E,O,I), scales (E,O,groups) -> y (R,O).

    Rows offsets[e] .. offsets[e+1] - 1 are expert e's (ops/moe.py); those past the last expert's are zero.
    """
    y = np.zeros((len(x), w8.shape[1]), np.float32)
    for e, rows in pieces(offsets):
        y[rows] = w8aspike_linear(be, x[rows], w8[e], scales[e], k)
    return y


@op
def embedding_int8(be, tokens, w8, scales):
    """Rows of an int8 table: tokens (...), w8 (V,C), scales (V,1) -> x (...,C) fp32."""
    return w8[tokens] * scales[tokens]


# --- attention on int8 keys and values ----------------------------------------------------------


@op
def code_heads(be, q, k, v, spike_k):
    """q (B,T,H,D), k, v (B,T,G,D) fp32, after RoPE -> the three as integers and their units.

    q16 int16 (B,T,H,D): spike counts, threshold a token and head, qv (B,T,H).
    k8, v8 int8 (B,T,G,D): rint(k / unit), unit = max|k| / 127 a token and head: ku, vu (B,T,G).
    Returns q16, qv, k8, ku, v8, vu.
    """
    counts, vth = row_counts(q.reshape(-1, q.shape[-1]), spike_k)
    q16 = counts.clip(-32767, 32767).astype(np.int16).reshape(q.shape)
    return q16, vth.reshape(q.shape[:-1]), *_to_int8(k), *_to_int8(v)


def _to_int8(x):
    """x (...,D) -> int8 (...,D), unit (...): NaN and infinity make the unit NaN."""
    unit = np.abs(x).max(-1) / np.float32(INT8_MAX)
    unit = np.where(np.isfinite(unit), np.maximum(unit, TINY), np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        x8 = np.nan_to_num(np.rint(x / unit[..., None]), nan=0.0)
    return x8.clip(-INT8_MAX, INT8_MAX).astype(np.int8), unit


def decode_heads(x, unit):
    """Integers (B,T,H,D) and their units (B,T,H) -> fp32."""
    return x.astype(np.float32) * unit[..., None]


def decode_pair(coded):
    """k8, ku, v8, vu, as code_heads gives them -> k, v in fp32."""
    k8, ku, v8, vu = coded
    return decode_heads(k8, ku), decode_heads(v8, vu)


@op
def store_token_int8(be, keys, key_units, values, value_units, k8, ku, v8, vu, slot):
    """Decoding: one token's k8, v8 (B,1,G,D), ku, vu (B,1,G) into `slot` of a cache (B,S,G,D), (B,S,G).

    slot: an int; on a GPU also an int32 (1,) there, which a step that is recorded reads at each replay.
    """
    for cache, x in ((keys, k8), (key_units, ku), (values, v8), (value_units, vu)):
        cache[:, slot] = x[:, 0]


@op
def attention_step_int8(be, q16, qv, k8, ku, v8, vu, count, scale=None):
    """Decoding: q16 (B,1,H,D), qv (B,1,H) over the first `count` slots of an int8 cache
    k8, v8 (B,S,G,D), ku, vu (B,S,G) -> o (B,1,H,D) fp32.

    Scores are int32 sums times both units; the softmax and the sum over values are fp32.  count: as slot above.
    """
    B, _, H, D = q16.shape
    G = k8.shape[2]
    scale = D**-0.5 if scale is None else scale
    q = q16.reshape(B, G, H // G, D).astype(np.int32)
    keys = k8[:, :count].swapaxes(1, 2).astype(np.int32)
    s = (q @ keys.swapaxes(-1, -2)).astype(np.float32)
    s *= qv.reshape(B, G, H // G, 1) * np.float32(scale) * ku[:, :count].swapaxes(1, 2)[:, :, None]
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    values = decode_heads(v8[:, :count], vu[:, :count]).swapaxes(1, 2)
    return (p @ values).reshape(B, 1, H, D)
