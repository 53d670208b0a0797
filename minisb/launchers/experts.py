"""Twins of the mixture of experts: router, plan, dispatch, one product per expert, combine.

Where an expert's rows begin is known to the GPU alone: grids are as large as they could have to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minisb.gpu import THREADS, Rows
from minisb.launchers.grid import contiguous, int32, sliced_sum, warp_a_row, wide_type
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


def grouped_forward(be, x, w, offsets, out=None):
    (w,), x = contiguous(be, w), _rows(be, x)
    E, O, I = w.shape
    R = len(x.matrix)
    y = Rows(be.xp.empty((R, O), w.dtype) if out is None else out)
    arguments = x, w, int32(be, offsets), y, E, R, I, O, x.stride, y.stride
    if _fast(be, w, x, y):
        how = _row_tiles(O, R, E, FAST), FAST.threads
        be.launch("grouped_fast_forward", w, *how, *arguments, shared=FAST.shared(False, False))
    else:
        be.launch("grouped_forward", w, _row_tiles(O, R, E), (16, 16), *arguments)
    return y.matrix


def grouped_backward(be, dy, x, w, offsets, dw, dx=None):
    (w,), dy, x, offsets = contiguous(be, w), _rows(be, dy), _rows(be, x), int32(be, offsets)
    E, O, I = w.shape
    R, add = len(x.matrix), dx is not None
    dx = Rows(dx if add else be.xp.empty((R, I), w.dtype))
    to_x = dy, w, offsets, dx, add, E, R, I, O, dy.stride, dx.stride
    to_w = dy, x, offsets, dw, I, O, dy.stride, x.stride
    if _fast(be, w, dy, x, dx):
        how = _row_tiles(I, R, E, FAST), FAST.threads
        be.launch("grouped_fast_backward_x", w, *how, *to_x, shared=FAST.shared(False, True))
        blocks = -(-I // FAST.columns), -(-O // FAST.rows), E
        be.launch("grouped_fast_backward_w", w, blocks, FAST.threads, *to_w, shared=FAST.shared(True, True))
    else:
        be.launch("grouped_backward_x", w, _row_tiles(I, R, E), (16, 16), *to_x)
        be.launch("grouped_backward_w", w, (-(-I // TILE), -(-O // TILE), E), (16, 16), *to_w)
    return dx.matrix


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


def _row_tiles(columns: int, R: int, E: int, fast: Fast | None = None) -> tuple[int, int]:
    """Blocks for all tiles of R rows of E experts (and of nobody, at the end): the last of each may not be full."""
    width, height = (fast.columns, fast.rows) if fast else (TILE, TILE)
    return -(-columns // width), R // height + E + 1


TWINS = {
    "moe": (
        router_forward, router_backward, load, balance_loss, z_loss, dispatch_plan, dispatch_forward,
        dispatch_backward, combine_forward, combine_backward, grouped_forward, grouped_backward,
    )
}  # fmt: skip
