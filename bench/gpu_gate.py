"""The low-rank gate and the sums for a bias's gradient on one GPU in bfloat16: as used, by other grids, by products.

    python bench/gpu_gate.py

The gate: 32,768 tokens, rank 16, its input 16 columns of a fused projection; "by products" is the way without the fused
kernels.  Blocks: of backward, for each of a multiprocessor's 512 threads (forward: times 8).  The sums: rows of a fused
projection's gradient, alone and right behind the kernel that writes it (both together, less that kernel alone).
Median of 20 with a cold cache; the share is of a copy's rate.  A variant whose results are not those of float64 is
marked WRONG.  The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cupy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import at_once_kernel, copy_rate, milliseconds  # noqa: E402

from minisb import kernels  # noqa: E402
from minisb.backend import choose  # noqa: E402
from minisb.launchers import dense, grid  # noqa: E402
from minisb.ops.gate import low_rank_gate_backward, low_rank_gate_forward  # noqa: E402
from minisb.ops.rope import rope_backward, rope_table  # noqa: E402

BFLOAT16 = kernels.element("bfloat16")
B, T = 32, 1024
N = B * T


def draw(*shape, dtype=BFLOAT16):
    return cupy.random.standard_normal(shape, dtype="float32").astype(dtype)


def near(got, want, limit: float) -> bool:
    """By root mean square, in float64."""
    got, want = got.astype("float64"), want.astype("float64")
    return bool(((got - want) ** 2).sum() < limit**2 * (want**2).sum())


def gates(be, line, J: int, R: int = 16):
    fused = draw(B, T, 5 * J + R)
    x, w, b, dlog_g = fused[..., 5 * J :], draw(J, R), draw(J), draw(B, T, J, dtype="float32")
    dx, dw, db = cupy.empty_like(fused)[..., 5 * J :], cupy.zeros((J, R), "float32"), cupy.zeros(J, "float32")
    z = x.reshape(N, R).astype("float64") @ w.astype("float64").T + b.astype("float64")
    exact = -cupy.logaddexp(0, -z).reshape(B, T, J) / 16
    dz = dlog_g.reshape(N, J) / (1 + cupy.exp(z)) / 16
    slopes = dz @ w.astype("float64"), dz.T @ x.reshape(N, R).astype("float64"), dz.sum(0)
    read = x.nbytes + dlog_g.nbytes

    def forward():
        return low_rank_gate_forward(be, x, w, b, 16.0)

    def both(name):
        log_g, saved = forward()
        line(f"{name}, forward", forward, read, near(log_g, exact, 1e-2 if saved[-1] is not None else 1e-5))
        backward = lambda: low_rank_gate_backward(be, dlog_g, saved, dx, dw, db)  # noqa: E731
        dw[...], db[...] = 0, 0
        backward()
        right = all(near(a, e, 1e-2) for a, e in zip((dx.reshape(N, R), dw, db), slopes, strict=True))
        line(f"{name}, backward", backward, read + dx.nbytes, right)

    found, warps, processors = dense.LOW_RANK, dense.GATE_WARPS, dense.MULTIPROCESSORS
    both(f"gate J {J}, as used")
    for others in (4, 8, 16):
        for many in (1, 2, 4):
            dense.GATE_WARPS, dense.MULTIPROCESSORS = others, processors * many // 2
            both(f"  J {J}, {others} warps, {many / 2} x the blocks")
    dense.GATE_WARPS, dense.MULTIPROCESSORS, dense.LOW_RANK = warps, processors, {}
    both(f"  J {J}, by products")
    dense.LOW_RANK = found


def column_sums(be, line, J: int, stride: int):
    dy = draw(N, stride)
    rows, db = dense.Rows(dy[:, :J]), cupy.zeros(J, "float32")
    exact, moved = dy[:, :J].astype("float64").sum(0), N * J * dy.itemsize

    def call():
        arguments = lambda partial: (rows, partial, N, J, rows.stride)  # noqa: E731
        grid.sliced_sum(be, "column_sums", dy, arguments, N, J, db)

    def check(name):
        db[...] = 0
        call()
        line(name, call, moved, near(db, exact, 1e-5))

    check(f"column sums {N} x {J} of {stride}, as used")
    key, slices = ("column_sums", BFLOAT16), grid.SLICES
    usual = be.device._ready[key]
    for at_once in (4, 8, 16):
        be.device._ready[key] = at_once_kernel(be.device, "reduce", "column_sums", 8, at_once), usual[1]
        for grid.SLICES in (128, 256, 512):
            check(f"  {J} of {stride}, {at_once} rows at once, at most {grid.SLICES} slices")
    be.device._ready[key], grid.SLICES = usual, slices


def behind_rope(be, line, H: int = 6, G: int = 2, D: int = 64):
    J = (H + 2 * G) * D
    dq, dk, dv = (draw(B, T, n, D) for n in (H, G, G))
    cos, sin = (cupy.asarray(a, "float32") for a in rope_table(0, T, D, 1e6))
    dqkv, db = cupy.empty((B, T, J), BFLOAT16), cupy.zeros(J, "float32")
    rows = dense.Rows(dqkv.reshape(N, J))
    rope = lambda: rope_backward(be, dq, dk, dv, cos, sin, dqkv)  # noqa: E731

    def together():
        rope()
        grid.sliced_sum(be, "column_sums", dqkv, lambda partial: (rows, partial, N, J, J), N, J, db)

    alone = line(f"rope_backward {N} x {J}", rope, 2 * dqkv.nbytes)
    more = line("  and the sums of what it wrote", together, 3 * dqkv.nbytes)
    if alone and more:
        print(f"  the sums behind it: {1000 * (more - alone):.1f} us")


def main() -> int:
    be, why = choose("cuda")
    copied, found = copy_rate(), {}
    print(f"{why}\ncopy {copied:.0f} GB/s\n{'':<64}{'ms':>8}{'GB/s':>8}{'share':>7}")

    def line(name, call, moved: int, right: bool = True):
        try:
            ms = milliseconds(call)
        except Exception as error:  # more threads or registers than there are
            print(f"{name}: {type(error).__name__} {str(error)[:80]}")
            return None
        rate, name = moved / ms / 1e6, name if right else f"{name}  WRONG"
        print(f"{name:<64}{ms:>8.4f}{rate:>8.0f}{rate / copied:>7.0%}", flush=True)
        found[name.strip()] = round(ms, 5)
        return ms

    for J in (128, 256, 512):
        gates(be, line, J)
    for J, stride in ((640, 640), (640, 656), (1280, 1280), (128, 128)):
        column_sums(be, line, J, stride)
    behind_rope(be, line)
    print(json.dumps({"device": be.device.describe(), "copy_gb_s": copied, "ms": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
