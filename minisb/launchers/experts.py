"""Twins of the mixture of experts: router, plan, dispatch, one product per expert, combine.

Where an expert's rows begin is known to the GPU alone: grids are as large as they could have to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minisb.gpu import THREADS, Rows
from minisb.launchers.grid import MULTIPROCESSORS, contiguous, int32, sliced_sum, warp_a_row, wide_type
from minisb.ops.moe import Plan

TILE = 64  # rows and columns of a block's result (TILE in cuda/moe_products.cu)
NO_LIMIT = 2**31 - 1
ANY = np.empty(0, "float32")  # for a kernel that has no real in it

# --- the router


def router_forward(be, logits, top_k):
    (logits,) = contiguous(be, logits)
    (N, E), wide = logits.shape, wide_type(logits)
    gates, experts = be.xp.empty((N, top_k), wide), be.xp.empty((N, top_k), "int32")
    p, lse = be.xp.empty((N, E), wide), be.xp.empty(N, wide)
    be.launch("router_forward", logits, *warp_a_row(N), logits, gates, experts, p, lse, N, E, top_k)
    return gates, experts, p, lse, (experts, p, logits.dtype)


def router_backward(be, dgates, dp, dlse, saved):
    experts, p, dtype = saved
    dgates, dp, dlse, p = contiguous(be, dgates, dp, dlse, p)
    (N, E), K, step = p.shape, dgates.shape[1], p.shape[1] if dp.ndim == 2 else 0
    dlogits = be.xp.empty((N, E), dtype)
    inputs = dgates, dp, dlse, int32(be, experts), p
    be.launch("router_backward", dlogits, *warp_a_row(N), *inputs, dlogits, N, E, K, step)
    return dlogits


def load(be, experts, count):
    experts, found = int32(be, experts), be.xp.empty(count, "int32")
    be.launch("expert_load", ANY, count, THREADS, experts, found, experts.size)
    return found


def balance_loss(be, p, counts, weight=1.0):
    (p,) = contiguous(be, p)
    (N, E), sums = p.shape, be.xp.zeros(p.shape[1], p.dtype)
    sliced_sum(be, "column_sums", p, lambda partial: (p, partial, N, E, E), N, E, sums)
    loss, dp = be.xp.empty((), p.dtype), be.xp.empty_like(sums)
    be.launch("balance_loss", p, 1, THREADS, sums, int32(be, counts), loss, dp, _number(be, weight), N, E)
    return loss, dp


def z_loss(be, lse, weight=1.0):
    (lse,) = contiguous(be, lse)
    loss, dlse = be.xp.empty((), lse.dtype), be.xp.empty_like(lse)
    be.launch("z_loss", lse, 1, 4 * THREADS, lse, loss, dlse, _number(be, weight), lse.size)
    return loss, dlse


def _number(be, x):
    """A Python number or an array of no axes, as the latter, in float64."""
    return be.xp.full((), x, "float64") if isinstance(x, (int, float)) else x.astype("float64", copy=False)


# --- rows to experts and back


def dispatch_plan(be, experts, count, tile=1, capacity=None):
    experts = int32(be, experts)
    (N, K), loads = experts.shape, load(be, experts, count)
    R = N * K + count * (tile - 1)
    row, token, offsets = (be.xp.empty(shape, "int32") for shape in ((N, K), R, count + 1))
    sizes = N * K, K, count, R, tile, NO_LIMIT if capacity is None else capacity
    be.launch("dispatch_plan", ANY, count, THREADS, experts, loads, row, token, offsets, *sizes)
    return Plan(row, token, offsets)


def dispatch_forward(be, x, plan):
    (x,) = contiguous(be, x)
    R, C = len(plan.token), x.shape[1]
    rows = be.xp.empty((R, C), x.dtype)
    be.launch("dispatch_forward", x, *warp_a_row(R), x, int32(be, plan.token), rows, R, C)
    return rows


def dispatch_backward(be, drows, plan):
    (drows,) = contiguous(be, drows)
    (N, K), C = plan.row.shape, drows.shape[1]
    dx = be.xp.empty((N, C), drows.dtype)
    be.launch("dispatch_backward", drows, *warp_a_row(N), drows, int32(be, plan.row), dx, N, K, C)
    return dx


def combine_forward(be, rows, gates, plan, shared=None):
    rows, gates, shared = contiguous(be, rows, gates, shared)
    (N, K), C = gates.shape, rows.shape[1]
    y = be.xp.empty((N, C), rows.dtype)
    be.launch("combine_forward", rows, *warp_a_row(N), rows, gates, int32(be, plan.row), shared, y, N, K, C)
    return y, (rows, gates, plan)


def combine_backward(be, dy, saved):
    rows, gates, plan = saved
    dy, rows, gates = contiguous(be, dy, rows, gates)
    (N, K), (R, C) = gates.shape, rows.shape
    drows, dgates = be.xp.empty_like(rows), be.xp.empty_like(gates)
    inputs = dy, rows, gates, int32(be, plan.row), int32(be, plan.token)
    be.launch("combine_backward", rows, *warp_a_row(R), *inputs, drows, dgates, N, K, R, C)
    return drows, dgates


# --- one product per expert


@dataclass(frozen=True)
class Fast:
    """How cuda/moe_fast.cu cuts products up: the names there in small letters; rows is ROWS."""

    columns: int = 128
    depth: int = 32
    stages: int = 4
    warp_columns: int = 32
    rows: int = 128

    @property
    def threads(self) -> int:
        return 32 * (self.rows // 64) * (self.columns // self.warp_columns)

    def shared(self, left_across: bool, right_across: bool) -> int:
        """Bytes of the stages: lines of both sides, each followed by a gap of 8 numbers."""
        sides = (self.rows, left_across), (self.columns, right_across)
        return 2 * self.stages * sum(self.depth * (n + 8) if across else n * (self.depth + 8) for n, across in sides)


FAST = Fast()  # bench/gpu_moe.py times others


@dataclass(frozen=True)
class Hopper:
    """How cuda/moe_hopper.cu cuts a product up: a tile, slices of it in shared memory."""

    rows: int = 128
    columns: int = 256
    stages: int = 4
    threads: int = 384

    def shared(self, E: int) -> int:
        """Memory in the source: from a multiple of 1024 on the stages, barriers, the order of the experts."""
        return 1024 + self.stages * (self.rows + self.columns) * 64 * 2 + 16 * self.stages + 4 * E


HOPPER = Hopper()  # None: a Hopper GPU takes what others do


def grouped_forward(be, x, w, offsets, out=None):
    (w,), x = contiguous(be, w), _rows(be, x)
    E, O, I = w.shape
    R = len(x.matrix)
    y = Rows(be.xp.empty((R, O), w.dtype) if out is None else out)
    arguments = x, w, int32(be, offsets), y, E, R, I, O, x.stride, y.stride
    if _hopper(be, w, x, y):
        _on_hopper(be, "grouped_hopper_forward", _row_tiles(O, R, E, HOPPER), w, arguments)
    elif _fast(be, w, x, y):
        how = _row_tiles(O, R, E, FAST), FAST.threads
        be.launch("grouped_fast_forward", w, *how, *arguments, shared=FAST.shared(False, False))
    else:
        be.launch("grouped_forward", w, _row_tiles(O, R, E), (16, 16), *arguments)
    return y.matrix


def grouped_backward(be, dy, x, w, offsets, dw, dx=None):
    (w,), dy, x, offsets = contiguous(be, w), _rows(be, dy), _rows(be, x), int32(be, offsets)
    R, add = len(x.matrix), dx is not None
    dx = Rows(dx if add else be.xp.empty((R, w.shape[2]), w.dtype))
    _backward_x(be, dy, w, offsets, dx, add)
    _backward_w(be, dy, x, w, offsets, dw)
    return dx.matrix


def _backward_x(be, dy, w, offsets, dx, add):
    (E, O, I), R = w.shape, len(dx.matrix)
    arguments = dy, w, offsets, dx, add, E, R, I, O, dy.stride, dx.stride
    if _hopper(be, w, dy, dx):
        _on_hopper(be, "grouped_hopper_backward_x", _row_tiles(I, R, E, HOPPER), w, arguments)
    elif _fast(be, w, dy, dx):
        how = _row_tiles(I, R, E, FAST), FAST.threads
        be.launch("grouped_fast_backward_x", w, *how, *arguments, shared=FAST.shared(False, True))
    else:
        be.launch("grouped_backward_x", w, _row_tiles(I, R, E), (16, 16), *arguments)


def _backward_w(be, dy, x, w, offsets, dw):
    E, O, I = w.shape
    sizes = I, O, dy.stride, x.stride
    if _hopper(be, w, dy, x) and _address(dw) % 16 == 0:
        arguments = dy, x, offsets, dw, E, *sizes
        _on_hopper(be, "grouped_hopper_backward_w", _matrix_tiles(I, O, E, HOPPER), w, arguments)
    elif _fast(be, w, dy, x):
        how = _matrix_tiles(I, O, E, FAST), FAST.threads
        be.launch("grouped_fast_backward_w", w, *how, dy, x, offsets, dw, *sizes, shared=FAST.shared(True, True))
    else:
        be.launch("grouped_backward_w", w, _matrix_tiles(I, O, E), (16, 16), dy, x, offsets, dw, *sizes)


def _hopper(be, w, *matrices: Rows) -> bool:
    """Whether cuda/moe_hopper.cu is for these."""
    fits = HOPPER and be.device.target == "sm_90a" and HOPPER.shared(len(w)) <= be.device.shared_bytes
    return bool(fits) and _fast(be, w, *matrices)


def _on_hopper(be, kernel: str, tiles, w, arguments):
    """tiles: as many as there could be at most, in a grid of any shape."""
    blocks = min(math.prod(tiles), MULTIPROCESSORS)
    be.launch(kernel, w, blocks, HOPPER.threads, *arguments, shared=HOPPER.shared(len(w)))


def _fast(be, w, *matrices: Rows) -> bool:
    """Whether cuda/moe_fast.cu is for these: halves, rows of whole 16 bytes at addresses of 16, sm_80 and later."""
    if w.dtype.itemsize != 2 or w.shape[1] % 8 or w.shape[2] % 8 or _address(w) % 16:
        return False
    if any(m.stride % 8 or _address(m.matrix) % 16 for m in matrices):
        return False
    return int(be.device.target.strip("sm_a")) >= 80 and FAST.shared(False, False) <= be.device.shared_bytes


def _address(x) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def _rows(be, x):
    """A matrix whose rows may be apart, copied only if one of them has gaps."""
    gaps = x.shape[1] > 1 and x.strides[1] != x.itemsize
    return Rows(be.xp.ascontiguousarray(x) if gaps else x)


def _row_tiles(columns: int, R: int, E: int, how: Fast | Hopper | None = None) -> tuple[int, int]:
    """Tiles of R rows of E experts (and of nobody, at the end), at most: the last of each may not be full."""
    width, height = (how.columns, how.rows) if how else (TILE, TILE)
    return -(-columns // width), R // height + E + 1


def _matrix_tiles(I: int, O: int, E: int, how: Fast | Hopper | None = None) -> tuple[int, int, int]:
    """Tiles of E matrices (O,I)."""
    width, height = (how.columns, how.rows) if how else (TILE, TILE)
    return -(-I // width), -(-O // height), E


TWINS = {
    "moe": (
        router_forward, router_backward, load, balance_loss, z_loss, dispatch_plan, dispatch_forward,
        dispatch_backward, combine_forward, combine_backward, grouped_forward, grouped_backward,
    )
}  # fmt: skip
