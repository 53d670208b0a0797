"""Each operation on this CPU: time, GB/s and GFLOP/s, against the NumPy reference and the machine's peaks.

    python bench/ops_cpu.py [--preset nano] [--threads N] [--json]

Bytes are the fewest an operation can move (each input read once, each output written once) and
FLOPs the fewest it can do, so that the two shares say how far it is from the machine: a share of
the bandwidth near 1 cannot be improved, and neither can a share of the arithmetic.  Small operations stay
in the caches, where more than the bandwidth of memory is to be had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from train_cpu import cpu_name

from minisb.backend import Backend, CpuBackend, default_threads
from minisb.bench import DECODE, measure
from minisb.config import PRESETS, preset

F32 = 4  # bytes


def work(c) -> dict[str, tuple[float, float]]:
    """operation -> (fewest bytes, fewest FLOPs) of the call that minisb.bench times."""
    N, C, F, V = c.batch_size * c.seq_len, c.width, c.ffn, c.vocab
    H, G, D, W = c.heads, c.kv_heads, c.head_dim, c.window
    q, kv, fused = N * H * D, N * G * D, N * (H + 2 * G) * D
    pairs = N * H * min(W, c.seq_len)  # (query, key), about: the first W tokens see fewer
    walk = N * G * D * D  # state entries touched, all tokens
    rows, size, R = Backend.head_logits // V, 1 << 20, H // G
    values = {  # (values moved, FLOPs)
        "linear_forward": (N * C + 2 * F * C + N * 2 * F, 2 * N * C * 2 * F),
        "linear_backward": (2 * N * C + 3 * 2 * F * C + N * 2 * F, 4 * N * C * 2 * F),
        "gla_forward": (2 * q + 3 * kv, walk * (3 + 2 * R)),
        "gla_backward": (3 * q + 6 * kv, walk * (3 + 2 * R + 2 * R + 7)),
        "attention_forward": (2 * q + 2 * kv, 4 * D * pairs),
        "attention_backward": (4 * q + 4 * kv, 10 * D * pairs),
        "spike_forward": (2 * N * C, 5 * N * C),
        "rmsnorm_forward": (2 * N * C, 4 * N * C),
        "rmsnorm_backward": (3 * N * C, 9 * N * C),
        "add_rmsnorm_forward": (4 * N * C, 5 * N * C),
        "add_rmsnorm_backward": (4 * N * C, 10 * N * C),
        "rope_forward": (2 * fused, 3 * (q + kv)),
        "rope_backward": (2 * fused, 3 * (q + kv)),
        "relu_heads_forward": (2 * fused, q + kv),
        "relu_heads_backward": (3 * fused, q + kv),
        "log_gate_forward": (2 * kv, 20 * kv),
        "log_gate_backward": (3 * kv, 14 * kv),
        "swiglu_forward": (3 * N * F, 16 * N * F),
        "swiglu_backward": (5 * N * F, 22 * N * F),
        "cross_entropy": (2 * rows * V, 16 * rows * V),
        "gla_step": (2 * G * D * D, G * D * D * (3 + 2 * R)),
        "attention_step": (2 * DECODE * G * D, 4 * DECODE * H * D),
        "embedding_forward": (2 * N * C, 0),
        "embedding_backward": (3 * N * C, N * C),
        "grad_norm": (size, 2 * size),
        "adamw": (7 * size, 14 * size),
    }
    return {name: (moved * F32, flops) for name, (moved, flops) in values.items()}


def best(call, seconds: float = 0.5) -> float:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peaks(threads: int) -> tuple[float, float]:
    """Measured here: GB/s of adding two large arrays in place by all threads, GFLOP/s of a large product."""
    be = CpuBackend(threads)
    size = 1 << 24
    flats = [np.ones(size, np.float32) for _ in range(4)]
    adamw = be.natives.get("adamw")
    moved = 7 * size * F32
    copy = best(lambda: adamw(be, *flats, 0, 0.0, 0.9, 0.95, 1e-8, 0.0, 1, 1.0)) if adamw else None
    if copy is None:
        moved, copy = 2 * size * F32, best(lambda: np.copyto(flats[0], flats[1]))
    a = np.ones((2048, 2048), np.float32)
    return moved / copy / 1e9, 2 * 2048**3 / best(lambda: be.gemm(a, a), 2.0) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = preset(args.preset)
    bandwidth, rate = peaks(args.threads)
    found, least = measure(config, args.threads), work(config)
    for row in found["ops"]:
        moved, flops = least[row["op"]]
        row["gb_s"], row["gflop_s"] = moved / row["cpu_ms"] / 1e6, flops / row["cpu_ms"] / 1e6
    found |= {"cpu": cpu_name(), "cores": os.cpu_count(), "peak_gb_s": bandwidth, "peak_gflop_s": rate}
    if not args.json:
        print(f"{found['cpu']}, {found['cores']} cores, {args.threads} threads, float32, preset {args.preset}")
        print(f"measured peaks: memory {bandwidth:.1f} GB/s, matrix product {rate:.0f} GFLOP/s\n")
        heads = ("numpy ms", 9), ("cpu ms", 9), ("ratio", 8), ("GB/s", 8), ("share", 7), ("GFLOP/s", 9), ("share", 7)
        print(f"{'operation':<22}" + "".join(f"{name:>{width}}" for name, width in heads))
        for r in found["ops"]:
            print(f"{r['op']:<22}{r['numpy_ms']:>9.3f}{r['cpu_ms']:>9.3f}{r['ratio']:>7.1f}x{r['gb_s']:>8.1f}"
                  f"{r['gb_s'] / bandwidth:>7.2f}{r['gflop_s']:>9.1f}{r['gflop_s'] / rate:>7.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
