"""A mixture of experts beside a dense feed-forward network with the same number of multiplications.

    python bench/moe_cpu.py [--width 512] [--ffn 1536] [--experts 16] [--tokens 2048] [--threads N]

Top-1 of E experts and a shared one, each of width F, against one SwiGLU of width 2 F: forward and backward,
float32, all weight gradients.  Router logits are N(0, 1), so loads differ as in early training.  Both sides in
turn, the fastest of each.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from train_cpu import cpu_name

from minisb.backend import CpuBackend, default_threads
from minisb.ops import moe
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward


def dense(be, x, dy, w_in, w_out, dw_in, dw_out):
    """SwiGLU forward and backward: x, dy (N,C), w_in (2F,C), w_out (C,F) -> y, dx."""
    gate_up = linear_forward(be, x, w_in)
    h, saved = swiglu_forward(be, gate_up)
    y = linear_forward(be, h, w_out)
    dh = linear_backward(be, dy, h, w_out, dw_out)
    return y, linear_backward(be, swiglu_backward(be, dh, saved), x, w_in, dw_in)


def routed(be, x, dy, router, gate, up, down, drouter, dgate, dup, ddown):
    """The experts, forward and backward: router (E,C), gate, up (E,F,C), down (E,C,F) -> y, dx."""
    E, F, _ = gate.shape
    logits = linear_forward(be, x, router)
    gates, experts, p, lse, s_router = moe.router_forward(be, logits, 1)
    plan = moe.dispatch_plan(be, experts, E)
    rows = moe.dispatch_forward(be, x, plan)
    gate_up = be.xp.empty((len(rows), 2 * F), x.dtype)
    moe.grouped_forward(be, rows, gate, plan.offsets, gate_up[:, :F])
    moe.grouped_forward(be, rows, up, plan.offsets, gate_up[:, F:])
    h, s_swiglu = swiglu_forward(be, gate_up)
    y, s_combine = moe.combine_forward(be, moe.grouped_forward(be, h, down, plan.offsets), gates, plan)

    drows, dgates = moe.combine_backward(be, dy, s_combine)
    dh = moe.grouped_backward(be, drows, h, down, plan.offsets, ddown)
    dgate_up = swiglu_backward(be, dh, s_swiglu)
    drows = moe.grouped_backward(be, dgate_up[:, :F], rows, gate, plan.offsets, dgate)
    moe.grouped_backward(be, dgate_up[:, F:], rows, up, plan.offsets, dup, drows)
    _, dp = moe.balance_loss(be, p, moe.load(be, experts, E))
    _, dlse = moe.z_loss(be, lse)
    dlogits = moe.router_backward(be, dgates, 0.01 * dp, 1e-3 * dlse, s_router)
    dx = moe.dispatch_backward(be, drows, plan)
    return y, linear_backward(be, dlogits, x, router, drouter, dx=dx), plan


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("width", 512), ("ffn", 1536), ("experts", 16), ("tokens", 2048), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    be, rng = CpuBackend(args.threads), np.random.default_rng(0)
    C, F, E, N = args.width, args.ffn, args.experts, args.tokens

    def normal(*shape, fan_in=1):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(fan_in**-0.5)

    x, dy = normal(N, C), normal(N, C)
    experts = [normal(E, C, fan_in=C), normal(E, F, C, fan_in=C), normal(E, F, C, fan_in=C), normal(E, C, F, fan_in=F)]
    shared, twice = ([normal(2 * f, C, fan_in=C), normal(C, f, fan_in=f)] for f in (F, 2 * F))
    grads = {id(w): np.zeros_like(w) for w in (*experts, *shared, *twice)}

    def call(function, weights):
        return function(be, x, dy, *weights, *(grads[id(w)] for w in weights))

    times = {"dense": [], "shared": [], "routed": []}
    for _ in range(args.repeats):
        for name, function, weights in (
            ("dense", dense, twice), ("shared", dense, shared), ("routed", routed, experts),
        ):  # fmt: skip
            started = time.perf_counter()
            call(function, weights)
            times[name].append(time.perf_counter() - started)
    best = {name: 1000 * min(values) for name, values in times.items()}
    moe_ms, flops = best["shared"] + best["routed"], 3 * 2 * 3 * N * C * 2 * F
    loads = np.diff(call(routed, experts)[2].offsets)
    print(f"{cpu_name()}, {args.threads} threads, float32; C {C}, F {F}, {E} experts top-1 + 1 shared, {N} tokens")
    print(f"tokens an expert: {loads.min()} to {loads.max()}")
    print(f"dense, width 2F   {best['dense']:8.1f} ms  {flops / best['dense'] / 1e6:6.1f} GFLOP/s")
    print(f"shared expert     {best['shared']:8.1f} ms  {flops / 2 / best['shared'] / 1e6:6.1f} GFLOP/s")
    print(f"routed experts    {best['routed']:8.1f} ms  {flops / 2 / best['routed'] / 1e6:6.1f} GFLOP/s")
    print(f"mixture / dense   {moe_ms / best['dense']:8.2f}")
    print(json.dumps({**best, "moe_ms": moe_ms, "ratio": moe_ms / best["dense"], "cpu": cpu_name(), **vars(args)}))


if __name__ == "__main__":
    main()
