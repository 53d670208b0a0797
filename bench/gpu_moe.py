"""One product per expert on one GPU in bfloat16: milliseconds and TFLOP/s, and the rest of the layer.

    python bench/gpu_moe.py [--without]

16,384 tokens, 16 experts, top-1, C 1024, F 2816: forward (O,I) = (2816,1024) and its backward, dx and dw.  First
the kernels for every GPU in two choices of tile, then Hopper's own, with the share of what cuBLAS reaches on a product
of as many operations without experts; results unlike the first kernel's are marked WRONG.  Then the same with equal
loads and with few tokens, and everything around the products, with the share of what a copy moves a second.  Loads are
uneven: expert e has about e + 1 shares of the tokens.  Median of 20 between CUDA events, with a cold cache.

--without: Hopper's kernels with a part left out; what remains shows where time goes.
"""

from __future__ import annotations

import argparse
import json
import re
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
from minisb.gpu import Gpu, Rows  # noqa: E402
from minisb.launchers import experts as launchers  # noqa: E402
from minisb.ops import moe  # noqa: E402
from minisb.ops.sinks import sinks_backward, sinks_forward  # noqa: E402
from minisb.ops.w8aspike import w8aspike_grouped, w8aspike_linear  # noqa: E402

N, E, C, F = 16384, 16, 1024, 2816
PRODUCTS = "forward", "backward_x", "backward_w"
TILES = launchers.Fast(), launchers.Fast(depth=64, stages=2)
#: Part of cuda/moe_hopper.cu -> where it is, and what instead.
PARTS = {
    "copies": (r"\n            Products::(Left|Right)::bring[^;]+;", ""),
    "products": (r"\n                products_of<[^;]+;", ";"),
    "results": (r"\n        store_sums\(walk.tile, row, sum\);", "\n        hold(sum);"),
}
HOPPER = launchers.HOPPER
HALF = ml_dtypes.bfloat16


def draw(*shape, dtype=HALF):
    return cupy.random.standard_normal(shape, dtype="float32").astype(dtype)


def chosen(tokens=N, equal=False):
    """Experts (tokens,1), expert e with about e + 1 shares, or all as many."""
    shares = np.arange(1, E + 1) / np.arange(1, E + 1).sum()
    experts = np.arange(tokens) % E if equal else np.random.default_rng(0).choice(E, tokens, p=shares)
    return cupy.asarray(experts[:, None].astype(np.int32))


def fresh() -> CudaBackend:
    """A backend that compiles anew what it launches, and nothing else."""
    device = Gpu()
    device._families.add("moe")
    return CudaBackend(device)


def backend_for(tile: launchers.Fast) -> CudaBackend:
    """A backend whose fast products are compiled for `tile`."""
    columns, depth, stages, warp_columns, _ = astuple(tile)
    own = {"COLUMNS": columns, "DEPTH": depth, "STAGES": stages, "WARP_COLUMNS": warp_columns}
    plain = (option for option in kernels.OPTIONS if not option.startswith("-DMOE_"))
    kernels.OPTIONS = (*plain, *(f"-DMOE_{name}={value}" for name, value in own.items()))
    launchers.FAST = tile
    return fresh()


class Problem:
    """Operands of the three products, and calls that compute them."""

    def __init__(self, be, tokens=N, equal=False):
        self.offsets = moe.dispatch_plan(be, chosen(tokens, equal), E).offsets
        self.x, self.w, self.dy = draw(tokens, C), draw(E, F, C), draw(tokens, F)
        self.y, self.dx, self.dw = cupy.empty((tokens, F), HALF), cupy.empty((tokens, C), HALF), self.no_sums()
        self.flops = 2 * tokens * C * F

    def no_sums(self):
        return cupy.zeros((E, F, C), "float32")

    def forward(self, be):
        moe.grouped_forward(be, self.x, self.w, self.offsets, self.y)
        return self.y

    def backward_x(self, be):
        launchers._backward_x(be, Rows(self.dy), self.w, self.offsets, Rows(self.dx), False)
        return self.dx

    def backward_w(self, be):
        launchers._backward_w(be, Rows(self.dy), Rows(self.x), self.w, self.offsets, self.dw)
        return self.dw

    def results(self, be):
        self.dw = self.no_sums()
        return {name: getattr(self, name)(be).astype("float32") for name in PRODUCTS}

    def measured(self, be, label, limit, expected=None):
        """Milliseconds of each product, printed; WRONG behind one that is not as expected."""
        wrong, got = set(), self.results(be) if expected else {}
        for name, one in got.items():
            if not float(cupy.linalg.norm(one - expected[name])) < 5e-3 * float(cupy.linalg.norm(expected[name])):
                wrong.add(name)
        found = {name: milliseconds(lambda name=name: getattr(self, name)(be)) for name in PRODUCTS}
        text = ""
        for name, ms in found.items():
            rate = self.flops / ms / 1e9
            text += f"  {name} {ms:.3f} ms {rate:4.0f} ({rate / limit:.0%}){' WRONG' if name in wrong else ''}"
        print(f"{label:<46}{text}", flush=True)
        return {**found, "wrong": sorted(wrong)}


def without(problem, limit):
    """Hopper's kernels with a part left out."""
    whole, found = kernels.assembled, {}
    for part, (what, instead) in PARTS.items():
        text = re.sub(what, instead, whole("moe_hopper"))
        assert text != whole("moe_hopper"), part
        kernels.assembled = lambda _, text=text: text
        found[part] = problem.measured(fresh(), f"wgmma without {part}", limit)
    kernels.assembled = whole
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", action="store_true", help="Hopper's kernels with a part left out too")
    args = parser.parse_args()
    be = CudaBackend(Gpu())
    print(be.device.describe())
    reach, problem = copy_rate(), Problem(be)
    dense = milliseconds(lambda: be.gemm(problem.x, problem.w[0], out=problem.y, tb=True))
    limit = problem.flops / dense / 1e9
    print(f"copy {reach:.0f} GB/s; cuBLAS, one matrix for all: {dense:.3f} ms, {limit:.0f} TFLOP/s")
    found = {"device": be.device.describe(), "copy_gb_s": reach, "cublas_tflop_s": limit, "tiles": {}}
    launchers.HOPPER = None
    expected = problem.results(be)
    for tile in TILES:
        if max(tile.shared(False, False), tile.shared(True, True)) > be.device.shared_bytes:
            continue
        label = f"128 x {tile.columns}, depth {tile.depth}, {tile.stages} stages, mma.sync"
        found["tiles"][label] = problem.measured(backend_for(tile), label, limit, expected)
    launchers.FAST = TILES[0]
    launchers.HOPPER = HOPPER
    if be.device.target == "sm_90a":
        found["wgmma"] = problem.measured(be, "128 x 256, wgmma", limit, expected)
        if args.without:
            found["without"] = without(problem, limit)
    found["loads"] = loads(be, limit)
    found["rest"] = {}
    plan = moe.dispatch_plan(be, chosen(), E)
    for name, (call, size) in around(be, problem.x, plan).items():
        ms = milliseconds(call)
        rate = size / ms / 1e6
        print(f"{name:<32}{ms:>9.4f} ms{rate:>8.0f} GB/s ({rate / reach:.0%} of the copy)")
        found["rest"][name] = {"ms": ms, "gb_s": rate}
    print(json.dumps(found))


def loads(be, limit):
    """Other loads: all experts alike, and few tokens, by all kernels."""
    found = {}
    for what, problem in {
        "equal loads": Problem(be, equal=True), "2,048 tokens": Problem(be, 2048), "128 tokens": Problem(be, 128),
    }.items():  # fmt: skip
        for hopper in (None, HOPPER) if be.device.target == "sm_90a" else (None,):
            launchers.HOPPER = hopper
            label = f"{what}, {'wgmma' if hopper else 'mma.sync'}"
            found[label] = problem.measured(be, label, limit)
    launchers.HOPPER = HOPPER
    return found


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
