"""Gated linear attention on one GPU in bfloat16, forward: milliseconds and the share of memory's own speed.

    python bench/gpu_gla.py

Rows: a training batch (B 32, T 1024, H 12, D 64, with 12 and with 4 key heads), and one layer of the 7B over a
long text (B 1, T 32768, H 28, G 4, D 128).  The states that backward needs are saved, as in training.  Median of
20 between CUDA events; bytes are inputs, output and saved states once; the copy is what this GPU reaches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cupy
import ml_dtypes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisb.backend import choose  # noqa: E402
from minisb.ops.gla import gla_forward  # noqa: E402

ROWS = ((32, 1024, 12, 12, 64), (32, 1024, 12, 4, 64), (1, 32768, 28, 4, 128))


def milliseconds(call, rounds: int = 20) -> float:
    times = []
    for _ in range(rounds + 3):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return sorted(times[3:])[rounds // 2]


def main():
    be, why = choose("cuda")
    big = cupy.zeros(1 << 28, "float32")
    other = cupy.empty_like(big)
    reach = 2 * big.nbytes / milliseconds(lambda: cupy.copyto(other, big)) / 1e6
    print(f"{why}\ncopy: {reach:.0f} GB/s")
    found = {"device": be.device.describe(), "copy_gb_s": reach}
    for B, T, H, G, D in ROWS:
        draw = [cupy.random.standard_normal((B, T, n, D), dtype="float32") for n in (H, G, G)]
        q, k, v = (x.astype(ml_dtypes.bfloat16) for x in draw)
        log_g = -0.1 * cupy.random.random((B, T, G, D), dtype="float32")
        ms = milliseconds(lambda q=q, k=k, v=v, log_g=log_g: gla_forward(be, q, k, v, log_g))
        size = 2 * q.nbytes + k.nbytes + v.nbytes + log_g.nbytes + B * -(-T // 64) * G * D * D * 4
        rate = size / ms / 1e6
        name = f"B {B} T {T} H {H} G {G} D {D}"
        print(f"{name}: {ms:.3f} ms, {rate:.0f} GB/s, {rate / reach:.0%} of the copy")
        found[name] = {"ms": ms, "gb_s": rate}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
