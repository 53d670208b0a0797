"""Every operation on a GPU at the shapes of a training step: time, bytes a second, operations a second.

    python bench/gpu_ops.py                  the table
    python bench/gpu_ops.py --row gla        rows whose name contains "gla"
    python bench/gpu_ops.py --profile gla_forward      one row a few times, inside a named range, for ncu or nsys

B 32, T 1024, C 768, H 12, G 4, D 64, W 256, F 2048, V 8192.  Each time is the median of many calls between CUDA
events, after a warm-up.  Bytes and operations are the least that the operation must move and do (a window's
scores counted for visible pairs only), so GB/s says how far a kernel is from memory's own speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisb.backend import choose  # noqa: E402
from minisb.ops.adamw import adamw, grad_norm  # noqa: E402
from minisb.ops.attention import attention_backward, attention_forward, attention_step  # noqa: E402
from minisb.ops.cross_entropy import cross_entropy  # noqa: E402
from minisb.ops.embedding import embedding_backward, embedding_forward  # noqa: E402
from minisb.ops.gate import log_gate_backward, log_gate_forward  # noqa: E402
from minisb.ops.gla import gla_backward, gla_forward, gla_step  # noqa: E402
from minisb.ops.heads import relu_heads_backward, relu_heads_forward  # noqa: E402
from minisb.ops.linear import linear_backward, linear_forward  # noqa: E402
from minisb.ops.norm import add_rmsnorm_backward, add_rmsnorm_forward  # noqa: E402
from minisb.ops.rope import rope_backward, rope_forward, rope_table  # noqa: E402
from minisb.ops.spike import spike_forward  # noqa: E402
from minisb.ops.swiglu import swiglu_backward, swiglu_forward  # noqa: E402

B, T, C, H, G, D, W, F, V = 32, 1024, 768, 12, 4, 64, 256, 2048, 8192
N = B * T
SIZE = 4  # bytes of an element
PAIRS = B * H * (T * W - W * (W - 1) // 2)  # visible (query, key) pairs


@dataclass
class Row:
    name: str
    call: object
    bytes: int
    flops: int = 0


def row(name, call, elements, flops=0):
    return Row(name, call, SIZE * elements, flops)


def norms(be, xp, draw):
    x, delta, w, dw = draw(N, C), draw(N, C), draw(C), xp.zeros(C, "float32")
    _, _, saved = add_rmsnorm_forward(be, x, delta, w, 1e-6)
    yield row("copy", lambda: xp.copyto(delta, x), 2 * N * C)
    yield row("add_rmsnorm_forward", lambda: add_rmsnorm_forward(be, x, delta, w, 1e-6), 4 * N * C)
    yield row("add_rmsnorm_backward", lambda: add_rmsnorm_backward(be, x, delta, saved, dw), 4 * N * C)
    yield row("spike_forward", lambda: spike_forward(be, x, 3.0), 2 * N * C)


def projections(be, xp, draw):
    x = draw(N, C)
    for name, outputs in (("qkv", (H + 2 * G) * D), ("gate_up", 2 * F)):
        w, b, dy = draw(outputs, C), draw(outputs), draw(N, outputs)
        dw, db = xp.zeros_like(w), xp.zeros_like(b)
        sizes = N * C + outputs * C + N * outputs, 2 * N * C * outputs
        yield row(f"linear_forward {name}", lambda w=w, b=b: linear_forward(be, x, w, b), *sizes)
        yield row(f"linear_backward {name}", lambda dy=dy, w=w, dw=dw, db=db: linear_backward(be, dy, x, w, dw, db),
                  2 * sizes[0], 2 * sizes[1])  # fmt: skip


def feed_forward(be, xp, draw):
    gate_up, dh = draw(N, 2 * F), draw(N, F)
    yield row("swiglu_forward", lambda: swiglu_forward(be, gate_up), 3 * N * F)
    yield row("swiglu_backward", lambda: swiglu_backward(be, dh, gate_up), 5 * N * F)


def splits(be, xp, draw):
    qkv, z = draw(B, T, (H + 2 * G) * D), draw(B, T, G, D)
    q, k, v, heads = relu_heads_forward(be, qkv, H, G, D)
    yield row("relu_heads_forward", lambda: relu_heads_forward(be, qkv, H, G, D), 2 * qkv.size)
    yield row("relu_heads_backward", lambda: relu_heads_backward(be, q, k, v, heads, qkv), 3 * qkv.size - v.size)
    cos, sin = (xp.asarray(a, "float32") for a in rope_table(0, T, D, 1e6))
    yield row("rope_forward", lambda: rope_forward(be, qkv, cos, sin, H, G, D), 2 * qkv.size)
    yield row("rope_backward", lambda: rope_backward(be, q, k, v, cos, sin, qkv), 2 * qkv.size)
    _, gate = log_gate_forward(be, z, 16.0)
    yield row("log_gate_forward", lambda: log_gate_forward(be, z, 16.0), 2 * z.size)
    yield row("log_gate_backward", lambda: log_gate_backward(be, z, gate), 3 * z.size)


def linear_attention(be, xp, draw):
    q, k, v, do = (xp.abs(draw(B, T, n, D)) for n in (H, G, G, H))
    log_g, state = -0.05 * xp.abs(draw(B, T, G, D)), xp.zeros((B, G, D, D), "float32")
    entries = N * G * D * D  # of all states
    yield row("gla_forward", lambda: gla_forward(be, q, k, v, log_g), 2 * q.size + 3 * k.size,
              (3 + 2 * H // G) * entries)  # fmt: skip
    _, _, saved = gla_forward(be, q, k, v, log_g)
    yield row("gla_backward", lambda: gla_backward(be, do, None, saved), 3 * q.size + 6 * k.size,
              (10 + 4 * H // G) * entries)  # fmt: skip
    step = [a[:, :1].copy() for a in (q, k, v, log_g)]
    yield row("gla_step", lambda: gla_step(be, *step, state), 2 * state.size)


def attention(be, xp, draw):
    q, k, v, do = (draw(B, T, n, D) for n in (H, G, G, H))
    _, saved = attention_forward(be, q, k, v, W)
    yield row("attention_forward", lambda: attention_forward(be, q, k, v, W), 2 * q.size + 2 * k.size, 4 * D * PAIRS)
    yield row("attention_backward", lambda: attention_backward(be, do, saved), 4 * q.size + 4 * k.size, 10 * D * PAIRS)
    query, *cache = q[:, :1].copy(), k[:, :W].copy(), v[:, :W].copy()
    yield row("attention_step", lambda: attention_step(be, query, *cache, W), 2 * cache[0].size)


def ends(be, xp, draw):
    tokens, table, dtable = xp.random.randint(0, V, (B, T), dtype="int32"), draw(V, C), xp.zeros((V, C), "float32")
    dx, some = draw(B, T, C), N // 4
    yield row("embedding_forward", lambda: embedding_forward(be, tokens, table), 2 * N * C)
    yield row("embedding_backward", lambda: embedding_backward(be, dx, tokens, dtable), N * C + 2 * V * C)
    logits, targets = draw(some, V), tokens.reshape(-1)[:some]
    yield row("cross_entropy + gradient", lambda: cross_entropy(be, logits, targets, 1.0), 2 * some * V)


def optimiser(be, xp, draw):
    flat = [xp.abs(draw(30_000_000)) for _ in range(4)]
    yield row("grad_norm", lambda: grad_norm(be, flat[1]), flat[0].size)
    yield row("adamw", lambda: adamw(be, *flat, 20_000_000, 1e-3, 0.9, 0.95, 1e-8, 0.1, 10, 1.0), 7 * flat[0].size)


def rows(be):
    """Group by group: what one group holds is freed before the next begins."""
    for group in (norms, projections, feed_forward, splits, linear_attention, attention, ends, optimiser):
        yield from group(be, be.xp, lambda *shape: be.xp.random.standard_normal(shape, dtype="float32"))


def median_ms(xp, call, seconds: float = 0.25) -> float:
    start, end = xp.cuda.Event(), xp.cuda.Event()
    times = []
    for _ in range(3):
        call()
    while len(times) < 5 or (sum(times) < 1e3 * seconds and len(times) < 200):
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(xp.cuda.get_elapsed_time(start, end))
    return float(np.median(times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--profile", metavar="NAME", help="run rows of that name a few times and time nothing")
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    args = parser.parse_args()
    be, why = choose("cuda")
    print(f"{why}\nB {B} T {T} C {C} H {H} G {G} D {D} W {W} F {F} V {V}, float32, median\n")
    print(f"{'operation':<28}{'ms':>10}{'GB/s':>10}{'TFLOP/s':>10}")
    found = []
    for row in rows(be):
        if args.profile:
            if args.profile in row.name:
                with be.device.range(row.name):
                    for _ in range(3):
                        row.call()
                    be.xp.cuda.Device().synchronize()
            continue
        if args.row not in row.name:
            continue
        ms = median_ms(be.xp, row.call)
        found.append({"op": row.name, "ms": ms, "gb_s": row.bytes / ms / 1e6, "tflop_s": row.flops / ms / 1e9})
        work = f"{found[-1]['tflop_s']:>10.1f}" if row.flops else ""
        print(f"{row.name:<28}{ms:>10.3f}{found[-1]['gb_s']:>10.0f}{work}", flush=True)
    memory = be.device.memory()
    print(f"\nmemory: {memory['pool'] / 2**30:.1f} GiB taken, {memory['total'] / 2**30:.0f} GiB in all")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": why, "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
