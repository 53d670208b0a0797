"""Gated linear attention on one GPU in bfloat16: milliseconds forward and backward, by variants, beside memory's speed.

    python bench/gpu_gla.py [--row heads grouped 7b] [--parts] [--peer]

Rows: a training batch (B 32, T 1024, H 12, D 64) with 12 and with 4 key heads, and one layer of the 7B over a
long text (B 1, T 32768, H 28, G 4, D 128).  The states that backward needs are saved, as in training.  Median of
20 with a cold cache; bytes are inputs, outputs and saved states once; the copy is what this GPU reaches.

--parts: each kernel by itself.  --peer: flash-linear-attention's chunk_gla (needs PyTorch and that package), which
takes as many key heads as query heads: k, v and the gates are repeated before its time begins.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cupy
import ml_dtypes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import copy_rate, milliseconds, torch_milliseconds  # noqa: E402

from minisb.backend import choose  # noqa: E402
from minisb.launchers import linear_attention  # noqa: E402
from minisb.ops.gla import gla_backward, gla_forward  # noqa: E402

ROWS = {"heads": (32, 1024, 12, 12, 64), "grouped": (32, 1024, 12, 4, 64), "7b": (1, 32768, 28, 4, 128)}
FORWARD = {"walks": 1, "chunks": 1 << 30}  # how many states are many


def parts(be, call, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each kernel that call() launches."""
    times, launch = {}, be.launch

    def timed(name, *args, **kwargs):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        launch(name, *args, **kwargs)
        end.record()
        end.synchronize()
        times.setdefault(name, []).append(cupy.cuda.get_elapsed_time(start, end))

    be.launch = timed
    try:
        for _ in range(rounds):
            call()
    finally:
        del be.launch  # the class's own again
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def bytes_of(B, T, H, G, D) -> tuple[int, int]:
    """Forward and backward: q, o or q, do, dq; k, v or k, v, dk, dv; gates and their gradient; states."""
    q, k, states = 2 * B * T * H * D, 2 * B * T * G * D, 4 * B * -(-T // 64) * G * D * D
    return 2 * q + 2 * k + 2 * k + states, 3 * q + 4 * k + 4 * k + states


def ours(be, shape, reach, show_parts) -> dict:
    B, T, H, G, D = shape
    draw = [cupy.random.standard_normal((B, T, n, D), dtype="float32") for n in (H, G, G, H)]
    q, k, v, do = (x.astype(ml_dtypes.bfloat16) for x in draw)
    del draw
    log_g = -0.1 * cupy.random.random((B, T, G, D), dtype="float32")
    forward_bytes, backward_bytes = bytes_of(*shape)
    found = {}

    def row(name, call, size):
        ms = milliseconds(call)
        print(f"  {name:<22}{ms:8.3f} ms {size / ms / 1e6:6.0f} GB/s {size / ms / 1e6 / reach:5.0%} of the copy")
        found[name] = ms
        if show_parts:
            for kernel, each in parts(be, call).items():
                print(f"      {kernel:<28}{each:8.3f} ms")
                found[f"{name}: {kernel}"] = each

    print(f"B {B} T {T} H {H} G {G} D {D}")
    usual = linear_attention.MANY
    for name, many in FORWARD.items():
        linear_attention.MANY = many
        row(f"forward, {name}", lambda: gla_forward(be, q, k, v, log_g), forward_bytes)
    linear_attention.MANY = usual
    saved = gla_forward(be, q, k, v, log_g)[2]
    row("backward", lambda: gla_backward(be, do, None, saved), backward_bytes)
    row("forward", lambda: gla_forward(be, q, k, v, log_g), forward_bytes)
    row("both", lambda: gla_backward(be, do, None, gla_forward(be, q, k, v, log_g)[2]), forward_bytes + backward_bytes)
    return found


def peer(shape, ours) -> dict:
    import torch
    from fla.ops.gla import chunk_gla

    B, T, H, _, D = shape
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    log_g = (-0.1 * torch.rand(B, T, H, D, device="cuda")).requires_grad_()
    do = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    inputs = q, k, v, log_g

    found = {
        "peer forward": torch_milliseconds(lambda: chunk_gla(*inputs)[0]),
        "peer both": torch_milliseconds(lambda: torch.autograd.grad(chunk_gla(*inputs)[0], inputs, do)),
    }
    for name in ("forward", "both"):
        ratio = found[f"{name}, ratio"] = found[f"peer {name}"] / ours[name]
        print(f"  flash-linear-attention, {name}: {found[f'peer {name}']:.3f} ms, ours is {ratio:.2f} times as fast")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--parts", action="store_true", help="each kernel by itself")
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention too")
    args = parser.parse_args()
    be, why = choose("cuda")
    reach = copy_rate()
    print(f"{why}\ncopy: {reach:.0f} GB/s")
    found = {"device": be.device.describe(), "copy_gb_s": reach}
    for name in args.row:
        found[name] = ours(be, ROWS[name], reach, args.parts)
        cupy.get_default_memory_pool().free_all_blocks()
        if args.peer:
            found[name] |= peer(ROWS[name], found[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
