"""Twins of softmax attention: the plain kernels, and the ones on tensor cores where they fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minisb.launchers.grid import (
    LARGEST_HEAD,
    MULTIPROCESSORS,
    contiguous,
    each,
    tensor_cores,
    warp_a_row,
    wide_type,
)
from minisb.ops import attention

STEP_THREADS = 32 * 16  # of a block of a decoding step (WARPS in cuda/attention.cu and cuda/w8aspike_attention.cu)
STAGE = 64  # rows of the other side that a block brings at once (STAGE in cuda/attention_fast.cuh)


@dataclass(frozen=True)
class Tiling:
    """How a fast kernel shares out its rows: `rows` a warp (16 M in the source), and at most `warps` a block, which
    take at most `heads` heads of a group."""

    rows: int
    warps: int
    heads: int = 1

    def queries(self, R: int) -> tuple[int, int]:
        """Heads of a block and warps a head, of which those for STAGE queries are the fewest."""
        tiles = STAGE // self.rows
        heads = max(n for n in range(1, R + 1) if R % n == 0 and n <= max(1, min(self.heads, self.warps // tiles)))
        while 2 * tiles * heads <= self.warps:
            tiles *= 2
        return heads, tiles


#: By kernel and head size, the smallest window for which a Hopper GPU takes cuda/attention_hopper*.cu: what
#: bench/gpu_attention.py --hopper measured.  Short windows leave a block of 128 rows with too little to do.
HOPPER = {
    ("forward", 64): 512,
    ("forward", 128): 1,
    ("backward_q", 64): 1,
    ("backward_q", 128): 1,
    ("backward_kv", 64): 1,
    ("backward_kv", 128): 1,
}

#: By kernel and head size; bench/gpu_attention.py times others.
TILINGS = {
    ("forward", 64): Tiling(32, 6, 3),
    ("forward", 128): Tiling(32, 8, 2),
    ("backward_q", 64): Tiling(16, 8, 2),
    ("backward_q", 128): Tiling(16, 8, 2),
    ("backward_kv", 64): Tiling(16, 6),
    ("backward_kv", 128): Tiling(16, 8),
}


def attention_forward(be, q, k, v, window, scale=None):
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_forward.reference(be, q, k, v, window, scale)
    q, k, v = contiguous(be, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse = be.xp.empty_like(q), be.xp.empty(q.shape[:-1], wide_type(q))
    if _fast(be, q, scale):
        _forward_fast(be, q, k, v, o, lse, window, scale)
    else:
        blocks = q.shape[0] * q.shape[2], _tiles(q, q.shape[1])
        be.launch("attention_forward", q, blocks, (16, 16), q, k, v, o, lse, *_sizes(q, k, window), scale)
    return o, (q, k, v, o, lse, window, scale)


def attention_backward(be, do, saved):
    q, k, v, o, lse, window, scale = saved
    if q.shape[3] > LARGEST_HEAD:
        return attention.attention_backward.reference(be, do, saved)
    do, q, k, v, o, lse = contiguous(be, do, q, k, v, o, lse)
    dq, dk, dv = (be.xp.empty_like(x) for x in (q, k, v))
    if _fast(be, q, scale):
        _backward_fast(be, do, q, k, v, o, lse, dq, dk, dv, window, scale)
        return dq, dk, dv
    delta = be.xp.empty_like(lse)
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
    be.launch("attention_step", q, B * H, STEP_THREADS, q, k, v, o, *host_or_device(count), S, H, G, D, scale)
    return o


def store_token(be, keys, values, k, v, slot):
    k, v = contiguous(be, k, v)
    (B, S), row = keys.shape[:2], k.size // len(k)
    each(be, "store_token", k, k.size, k, v, keys, values, *host_or_device(slot), B, S, row)


def host_or_device(number):
    """A number as a kernel of a decoding step takes it: itself, or where it lies on the device, an int32 (1,)."""
    return (0, number) if getattr(number, "shape", ()) else (number, None)


def _sizes(q, k, window):
    """T, S, H, G, D and the window; one longer than the text is the text."""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], min(window, k.shape[1])


def _tiles(q, count: int) -> int:
    """TILE in cuda/attention.cu."""
    return -(-count // (32 if q.dtype.itemsize == 8 else 64))


# --- on tensor cores

FORWARD = {64: "attention_fast_forward_64", 128: "attention_fast_forward_128"}
BACKWARD_Q = {64: "attention_fast_backward_q_64", 128: "attention_fast_backward_q_128"}
BACKWARD_KV = {64: "attention_fast_backward_kv_64", 128: "attention_fast_backward_kv_128"}


def _fast(be, q, scale) -> bool:
    """Whether the kernels on tensor cores are for these heads and this GPU.  It follows the largest product of a row,
    so the scale must be positive."""
    return scale > 0 and tensor_cores(be, q, _stages(q.shape[3]) + _rows(q.shape[3], STAGE))


def _stages(D: int) -> int:
    """Bytes of the two stages and their statistics in cuda/attention_backward_fast.cu."""
    return 2 * (2 * _rows(D, STAGE) + 2 * 4 * STAGE)


def _rows(D: int, count: int) -> int:
    """Bytes of padded rows in shared memory."""
    return count * 2 * (D + 8)


def _forward_fast(be, q, k, v, o, lse, window, scale):
    if _hopper(be, "forward", q.shape[3], min(window, k.shape[1])):
        return _forward_hopper(be, q, k, v, o, lse, window, scale)
    T, S, H, G, D, window = _sizes(q, k, window)
    tiling, shared = TILINGS["forward", D], _stages(D)
    heads, tiles = tiling.queries(H // G)
    if D == 128:  # the queries lie in shared memory too; where that is small, fewer at once
        while _stages(D) + _rows(D, heads * tiles * tiling.rows) > be.device.shared_bytes:
            heads, tiles = (1, tiles) if heads > 1 else (1, tiles // 2)
        shared += _rows(D, heads * tiles * tiling.rows)
    grid = -(-T // (tiles * tiling.rows)), q.shape[0] * H // heads
    sizes = T, S, H, G, window, scale * math.log2(math.e), tiles
    be.launch(FORWARD[D], q, grid, 32 * heads * tiles, q, k, v, o, lse, *sizes, shared=shared)


def _backward_fast(be, do, q, k, v, o, lse, dq, dk, dv, window, scale):
    lse2, delta = _backward_q_fast(be, do, q, k, v, o, lse, dq, window, scale)
    _backward_kv_fast(be, do, q, k, v, lse2, delta, dk, dv, window, scale)


def _backward_q_fast(be, do, q, k, v, o, lse, dq, window, scale):
    """Writes dq -> what the other kernel wants of each query: lse2, delta (B,H,P), P is T rounded up to a STAGE."""
    T, S, H, G, D, window = _sizes(q, k, window)
    lse2, delta = (be.xp.empty((q.shape[0], H, -(-T // STAGE) * STAGE), "float32") for _ in range(2))
    if _hopper(be, "backward_q", D, window):
        _backward_q_hopper(be, do, q, k, v, o, lse, dq, lse2, delta, window, scale)
        return lse2, delta
    tiling = TILINGS["backward_q", D]
    heads, tiles = tiling.queries(H // G)
    grid, sizes = (-(-T // (tiles * tiling.rows)), q.shape[0] * H // heads), (T, S, H, G, window, scale, tiles)
    arrays = do, q, k, v, o, lse, dq, lse2, delta
    be.launch(BACKWARD_Q[D], q, grid, 32 * heads * tiles, *arrays, *sizes, shared=_stages(D))
    return lse2, delta


def _backward_kv_fast(be, do, q, k, v, lse2, delta, dk, dv, window, scale):
    if _hopper(be, "backward_kv", q.shape[3], min(window, k.shape[1])):
        return _backward_kv_hopper(be, do, q, k, v, lse2, delta, dk, dv, window, scale)
    T, S, H, G, D, window = _sizes(q, k, window)
    tiling = TILINGS["backward_kv", D]
    grid, sizes = (-(-S // (tiling.warps * tiling.rows)), q.shape[0] * G), (T, S, H, G, window, scale)
    arrays = do, q, k, v, lse2, delta, dk, dv
    be.launch(BACKWARD_KV[D], q, grid, 32 * tiling.warps, *arrays, *sizes, shared=_stages(D))


# --- on Hopper's warpgroups

HOPPER_FORWARD = {64: "attention_hopper_forward_64", 128: "attention_hopper_forward_128"}
HOPPER_BACKWARD_Q = {64: "attention_hopper_backward_q_64", 128: "attention_hopper_backward_q_128"}
HOPPER_BACKWARD_KV = {64: "attention_hopper_backward_kv_64", 128: "attention_hopper_backward_kv_128"}
HOPPER_THREADS = 384
HOPPER_ROWS = 128  # queries of a block, of all heads of a group, or its keys
#: By kernel and head size: rows of the other side at once, and how many times that (STAGES in the source).
HOPPER_STAGES = {
    ("forward", 64): (128, 2),
    ("forward", 128): (128, 2),
    ("backward_q", 64): (64, 4),
    ("backward_q", 128): (64, 6),
    ("backward_kv", 64): (STAGE, 4),
    ("backward_kv", 128): (STAGE, 4),
}


def _hopper(be, name: str, D: int, window: int) -> bool:
    shortest = HOPPER.get((name, D), math.inf)
    return shortest <= window and be.device.target == "sm_90a" and _hopper_bytes(name, D) <= be.device.shared_bytes


def _hopper_bytes(name: str, D: int) -> int:
    """Memory in the sources: from a multiple of 1024 on what the block has of its own and the stages, then barriers."""
    rows, stages = HOPPER_STAGES[name, D]
    own = {"forward": HOPPER_ROWS, "backward_q": 0, "backward_kv": 2 * HOPPER_ROWS}[name]
    barriers = {"forward": 2 + 4 * stages, "backward_q": 3 * stages, "backward_kv": 1 + 3 * stages}[name]
    statistics = 8 * rows * stages if name == "backward_kv" else 0
    return 1024 + 2 * D * (own + stages * 2 * rows) + statistics + 8 * barriers


def _tiles_and_blocks(q, k) -> tuple[int, int]:
    """Tiles of HOPPER_ROWS queries of all heads of a group, and the blocks that take them one after the other."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    tiles = B * G * -(-T * (H // G) // HOPPER_ROWS)
    return tiles, min(tiles, MULTIPROCESSORS)


def _forward_hopper(be, q, k, v, o, lse, window, scale):
    T, S, H, G, D, window = _sizes(q, k, window)
    (tiles, blocks), shared = _tiles_and_blocks(q, k), _hopper_bytes("forward", D)
    arrays, sizes = (q, k, v, o, lse), (T, S, H, G, window, scale * math.log2(math.e), tiles)
    be.launch(HOPPER_FORWARD[D], q, blocks, HOPPER_THREADS, *arrays, *sizes, shared=shared)


def _backward_q_hopper(be, do, q, k, v, o, lse, dq, lse2, delta, window, scale):
    T, S, H, G, D, window = _sizes(q, k, window)
    (tiles, blocks), shared = _tiles_and_blocks(q, k), _hopper_bytes("backward_q", D)
    arrays, sizes = (do, q, k, v, o, lse, dq, lse2, delta), (T, S, H, G, window, scale, tiles)
    be.launch(HOPPER_BACKWARD_Q[D], q, blocks, HOPPER_THREADS, *arrays, *sizes, shared=shared)


def _backward_kv_hopper(be, do, q, k, v, lse2, delta, dk, dv, window, scale):
    T, S, H, G, D, window = _sizes(q, k, window)
    grid, shared = (-(-S // HOPPER_ROWS), k.shape[0] * G), _hopper_bytes("backward_kv", D)
    arrays, sizes = (do, q, k, v, lse2, delta, dk, dv), (T, S, H, G, window, scale)
    be.launch(HOPPER_BACKWARD_KV[D], q, grid, HOPPER_THREADS, *arrays, *sizes, shared=shared)


TWINS = {"attention": (attention_forward, attention_backward, attention_step, store_token)}
