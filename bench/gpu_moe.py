"""One product per expert on one GPU in bfloat16: TFLOP/s of the fast kernels by tile size, and the rest of the layer.

    python bench/gpu_moe.py

16,384 tokens, 16 experts, top-1, C 1024, F 2816: forward (O,I) = (2816,1024) and its backward, dx and dw.  First
each choice of tile (columns, depth, stages, columns of a warp), compiled anew, beside cuBLAS on a product of as many
operations without experts; then everything around the products, with the share of what a copy moves a second.
Loads are uneven: expert e has about e + 1 shares of the tokens.  Median of 20 between CUDA events.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import copy_rate, milliseconds  # noqa: E402

from minisb import kernels  # noqa: E402
from minisb.backend import CudaBackend  # noqa: E402
from minisb.gpu import Gpu  # noqa: E402
from minisb.launchers import experts as launchers  # noqa: E402
from minisb.ops import moe  # noqa: E402
from minisb.ops.sinks import sinks_backward, sinks_forward  # noqa: E402
from minisb.ops.w8aspike import w8aspike_grouped, w8aspike_linear  # noqa: E402

N, E, C, F = 16384, 16, 1024, 2816
TILES = (
    launchers.Fast(), launchers.Fast(depth=64, stages=3), launchers.Fast(depth=64, stages=2), launchers.Fast(stages=3),
    launchers.Fast(warp_columns=64), launchers.Fast(columns=256, warp_columns=64, depth=64, stages=3),
    launchers.Fast(columns=256, warp_columns=64, depth=32, stages=4),
)  # fmt: skip
HALF = ml_dtypes.bfloat16


def draw(*shape, dtype=HALF):
    return cupy.random.standard_normal(shape, dtype="float32").astype(dtype)


def chosen():
    """Experts (N,1), expert e with about e + 1 shares."""
    shares = np.arange(1, E + 1) / np.arange(1, E + 1).sum()
    return cupy.asarray(np.random.default_rng(0).choice(E, (N, 1), p=shares).astype(np.int32))


def backend_for(tile: launchers.Fast) -> CudaBackend:
    """A backend whose fast products are compiled for `tile`."""
    columns, depth, stages, warp_columns, _ = astuple(tile)
    own = {"COLUMNS": columns, "DEPTH": depth, "STAGES": stages, "WARP_COLUMNS": warp_columns}
    plain = (option for option in kernels.OPTIONS if not option.startswith("-DMOE_"))
    kernels.OPTIONS = (*plain, *(f"-DMOE_{name}={value}" for name, value in own.items()))
    launchers.FAST = tile
    device = Gpu()
    device._cubins["nothing", "bfloat16"] = None  # not the first: so only what is launched is compiled anew
    return CudaBackend(device)


def products(be, plan, x, w, dy, y, dw):
    """Forward, and dx and dw: milliseconds."""
    offsets = plan.offsets
    forward = milliseconds(lambda: moe.grouped_forward(be, x, w, offsets, y))
    both = milliseconds(lambda: moe.grouped_backward(be, dy, x, w, offsets, dw))
    return {"forward_ms": forward, "backward_ms": both}


def main():
    be = CudaBackend(Gpu())
    print(be.device.describe())
    reach = copy_rate()
    x, w, dy, dw = draw(N, C), draw(E, F, C), draw(N, F), cupy.zeros((E, F, C), "float32")
    y, flops = cupy.empty((N, F), HALF), 2 * N * C * F
    dense = milliseconds(lambda: be.gemm(x, w[0], out=y, tb=True))
    limit = flops / dense / 1e9
    print(f"copy {reach:.0f} GB/s; cuBLAS, one matrix for all: {dense:.3f} ms, {limit:.0f} TFLOP/s")
    found = {"device": be.device.describe(), "copy_gb_s": reach, "cublas_tflop_s": limit, "tiles": []}
    plan = moe.dispatch_plan(be, chosen(), E)
    for tile in TILES:
        if max(tile.shared(False, False), tile.shared(True, True)) > be.device.shared_bytes:
            continue
        times = products(backend_for(tile), plan, x, w, dy, y, dw)
        rates = flops / times["forward_ms"] / 1e9, 2 * flops / times["backward_ms"] / 1e9
        print(f"{tile.columns:>4} columns, depth {tile.depth}, {tile.stages} stages, warps of {tile.warp_columns}: "
              f"forward {times['forward_ms']:.3f} ms, {rates[0]:.0f} TFLOP/s ({rates[0] / limit:.0%} of cuBLAS); "
              f"backward {times['backward_ms']:.3f} ms, {rates[1]:.0f} ({rates[1] / limit:.0%})")  # fmt: skip
        found["tiles"].append({"tile": astuple(tile), **times, "tflop_s": rates})
    launchers.FAST = TILES[0]
    found["rest"] = {}
    for name, (call, size) in around(be, x, plan).items():
        ms = milliseconds(call)
        rate = size / ms / 1e6
        print(f"{name:<32}{ms:>9.4f} ms{rate:>8.0f} GB/s ({rate / reach:.0%} of the copy)")
        found["rest"][name] = {"ms": ms, "gb_s": rate}
    print(json.dumps(found))


def around(be, x, plan):
    """Name -> call, bytes."""
    logits, experts = draw(N, E), chosen()
    gates, _, p, _, saved = moe.router_forward(be, logits, 1)
    zeros, some, row = cupy.zeros(E, "float32"), cupy.zeros(N, "float32"), x.nbytes
    S, H, G, D = 128, 28, 4, 128
    q, o, k, v = draw(1, 8192, H, D), draw(1, 8192, H, D), draw(S, G, D), draw(S, G, D)
    lse = cupy.zeros((1, 8192, H), "float32")
    int8 = cupy.random.randint(-127, 128, (E, 3072, 1024)).astype("int8")
    scales = cupy.ascontiguousarray(cupy.ones((E, 8, 3072), "float32")).swapaxes(1, 2)
    one, many = draw(1, 1024, dtype="float32"), draw(2048, 1024, dtype="float32")
    offsets = cupy.asarray([0] * 3 + [1] * 14, "int32")
    return {
        "router_forward": (lambda: moe.router_forward(be, logits, 1), logits.nbytes + p.nbytes),
        "router_backward": (lambda: moe.router_backward(be, gates, zeros, some, saved), logits.nbytes + p.nbytes),
        "dispatch_plan": (lambda: moe.dispatch_plan(be, experts, E), 3 * experts.nbytes),
        "dispatch_forward": (lambda: moe.dispatch_forward(be, x, plan), 2 * row),
        "dispatch_backward": (lambda: moe.dispatch_backward(be, x, plan), 2 * row),
        "combine_forward": (lambda: moe.combine_forward(be, x, gates, plan, x), 3 * row),
        "combine_backward": (lambda: moe.combine_backward(be, x, (x, gates, plan)), 3 * row),
        "sinks_forward 128, 7B's heads": (lambda: sinks_forward(be, q, k, v, o, lse), 3 * q.nbytes),
        "sinks_backward": (lambda: sinks_backward(be, q, q, k, v, o, lse, dq=o), 5 * q.nbytes),
        "w8aspike, 1 token": (lambda: w8aspike_linear(be, one, int8[0], scales[0], 3.0), int8[0].nbytes),
        "w8aspike, 2048 tokens": (lambda: w8aspike_linear(be, many, int8[0], scales[0], 3.0), 2048 * 4 * (1024 + 3072)),
        "w8aspike by expert, 1 token": (
            lambda: w8aspike_grouped(be, one, int8, scales, 3.0, offsets), int8[0].nbytes
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main()
