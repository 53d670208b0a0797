"""W8ASpike on this CPU: one token through int8 weights, against fp32 by NumPy and the speed of reading.

    python bench/w8aspike_cpu.py [--threads 2] [--tokens 30] [--only gemv,spike,decode]

(a) a product of 2048 x 8192 weights with one token.  int8 takes 17 MB, and is here compared with two threads that
    only read those bytes: where the processor's last cache holds 17 MB, both read that cache, not main memory.
(b) the spike pass (threshold, counts and counts times threshold, one read and one write) against the same reading.
(c) decoding with the shape of `135m`, random weights: fp32 by minisb's own natives, then quantised, with the embedding
    and head in fp32 and in int8.

Peers take turns inside a round, and a figure is the median over rounds, so that a busy machine slows all alike.  The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

from minisb.backend import CpuBackend
from minisb.config import preset
from minisb.cpu import w8aspike
from minisb.doctor import processor
from minisb.model import SpikingBrain
from minisb.ops.w8aspike import GROUP, quantize_weight
from minisb.quantize import _row_group, float_matrices
from minisb.quantized import INT8, SCALES, aligned, empty_tensors, input_names, store_of

WIDTH, HIDDEN = 2048, 8192
ROUNDS = 40
NUMPY_GEMV = """
import json, sys, time
import numpy as np
rng = np.random.default_rng(0)
w, x = rng.standard_normal(({O}, {I}), np.float32), rng.standard_normal({I}, np.float32)
times = []
for _ in range({n}):
    start = time.perf_counter()
    w @ x
    times.append(time.perf_counter() - start)
print(np.median(times))
"""


def in_turn(calls: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Name -> median seconds; every round calls each once, after one call that warms it up."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # the caches hold what this call reads, not what the one before did
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def numpy_gemv(threads: int) -> float:
    """fp32 by NumPy in a process of its own, where its threads have no OpenMP beside them."""
    code = NUMPY_GEMV.format(O=HIDDEN, I=WIDTH, n=3 * ROUNDS)
    env = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    return float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)


def gemv(be) -> dict:
    """(a)"""
    rng = np.random.default_rng(0)
    w8, scales = quantize_weight(rng.standard_normal((HIDDEN, WIDTH), np.float32))
    w8, scales, x = aligned([w8]), np.asfortranarray(scales), rng.standard_normal((1, WIDTH), np.float32)
    words, linear = w8.reshape(-1).view(np.uint64), be.natives["w8aspike_linear"]
    before = numpy_gemv(be.threads)
    found = in_turn({"int8": lambda: linear(be, x, w8, scales, 3.0), "read": lambda: w8aspike.read_all(be, words)})
    fp32 = (before + numpy_gemv(be.threads)) / 2
    size = w8.nbytes + scales.nbytes
    rate, limit = size / found["int8"] / 1e9, w8.nbytes / found["read"] / 1e9
    return {
        "int8_ms": 1e3 * found["int8"], "numpy_fp32_ms": 1e3 * fp32, "over_numpy": fp32 / found["int8"],
        "gb_s": rate, "read_gb_s": limit, "share_of_read": rate / limit,
    }  # fmt: skip


def spike(be) -> dict:
    """(b)"""
    x = np.random.default_rng(0).standard_normal((512, HIDDEN), np.float32)  # 17 MB, as the weights of (a)
    words, run = x.reshape(-1).view(np.uint64), be.natives["spike_forward"]
    found = in_turn({"spike": lambda: run(be, x, 3.0), "read": lambda: w8aspike.read_all(be, words)})
    rate, limit = 2 * x.nbytes / found["spike"] / 1e9, x.nbytes / found["read"] / 1e9
    return {"spike_ms": 1e3 * found["spike"], "gb_s": rate, "read_gb_s": limit, "share_of_read": rate / limit}


def decode(be, tokens: int) -> dict:
    """(c)"""
    config = preset("135m")
    model = SpikingBrain(config, be)
    model.store.initialise(0)
    models = {"fp32": model}
    for name, embedding in (("int8", False), ("int8_embedding", True)):
        tensors = empty_tensors(model.specs, GROUP, embedding)
        for matrix, w in float_matrices(model, embedding).items():
            tensors[matrix + INT8], tensors[matrix + SCALES] = quantize_weight(w, _row_group(matrix, GROUP))
        for other in (n for n in tensors if not n.endswith((INT8, SCALES))):
            tensors[other] = model.store.p[other].copy()
        k = dict.fromkeys(input_names(config), config.spike_k)
        models[name] = SpikingBrain(config, be, store_of(tensors, k))
    states = {name: m.new_state() for name, m in models.items()}
    prompt = np.random.default_rng(0).integers(0, config.vocab, (1, 64))
    for name, m in models.items():
        m.prefill(prompt, states[name])
    token = np.array([1])
    found = in_turn({n: lambda m=m, n=n: m.step(token, states[n]) for n, m in models.items()}, tokens)
    sizes = {"fp32": sum(x.nbytes for x in model.store.p.values())}
    sizes |= {n: m.store.nbytes for n, m in models.items() if n != "fp32"}
    return {
        n: {
            "ms": 1e3 * found[n], "tok_per_s": 1 / found[n], "over_fp32": found["fp32"] / found[n],
            "bytes": sizes[n], "share_of_bytes": sizes[n] / sizes["fp32"],
            "gb_s": sizes[n] / found[n] / 1e9,
        }
        for n in models
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--only", default="gemv,spike,decode")
    args = parser.parse_args()
    be, only = CpuBackend(args.threads), args.only.split(",")
    result = {"cpu": processor()[0], "threads": args.threads}
    if "gemv" in only:
        r = result["gemv"] = gemv(be)
        print(
            f"(a) {WIDTH} x {HIDDEN}, one token: int8 {r['int8_ms']:.3f} ms, NumPy fp32 {r['numpy_fp32_ms']:.3f} ms: "
            f"{r['over_numpy']:.2f}x; {r['gb_s']:.1f} of {r['read_gb_s']:.1f} GB/s read: {r['share_of_read']:.0%}"
        )
    if "spike" in only:
        r = result["spike"] = spike(be)
        print(
            f"(b) spike pass: {r['gb_s']:.1f} GB/s read and written, {r['read_gb_s']:.1f} GB/s read: "
            f"{r['share_of_read']:.0%}"
        )
    if "decode" in only:
        result["decode"] = decode(be, args.tokens)
        for name, r in result["decode"].items():
            print(
                f"(c) {name:<15}{r['ms']:7.2f} ms a token, {r['tok_per_s']:6.1f} tokens/s: {r['over_fp32']:.2f}x; "
                f"{r['bytes'] / 1e6:6.1f} MB, {r['share_of_bytes']:.1%} of fp32; {r['gb_s']:.1f} GB/s"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
