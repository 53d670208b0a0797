"""Every operation on a GPU at the shapes of a training step: time, and how far it is from the machine's limits.

    python bench/gpu_ops.py                            the table, bfloat16 activations and float32 masters
    python bench/gpu_ops.py --row gla                  rows whose name contains "gla"
    python bench/gpu_ops.py --dtype float32            everything in float32: the plain kernels
    python bench/gpu_ops.py --profile gla_forward      its kernels: registers, shared memory, occupancy, ncu's line

B 32, T 1024, C 768, H 12, G 4, D 64, a gate of rank 16, W 256, F 2048, V 32768.  Median of 20 with a cold cache.  Bytes
and operations are the least that the operation must move and do (a window's scores counted for visible pairs only); the
share is the larger of bytes over a copy's rate and operations over a large product's, both measured in the same run.
PyTorch's rows stand in gpu_gla.py, gpu_attention.py and gpu_train.py.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisb.backend import choose  # noqa: E402
from minisb.kernels import element  # noqa: E402
from minisb.ops.adamw import adamw, grad_norm  # noqa: E402
from minisb.ops.attention import attention_backward, attention_forward, attention_step  # noqa: E402
from minisb.ops.cross_entropy import counted, cross_entropy, total_loss  # noqa: E402
from minisb.ops.embedding import embedding_backward, embedding_forward  # noqa: E402
from minisb.ops.gate import (  # noqa: E402
    log_gate_backward,
    log_gate_forward,
    low_rank_gate_backward,
    low_rank_gate_forward,
)
from minisb.ops.gla import gla_backward, gla_forward, gla_step  # noqa: E402
from minisb.ops.heads import relu_heads_backward, relu_heads_forward  # noqa: E402
from minisb.ops.linear import linear_backward, linear_forward  # noqa: E402
from minisb.ops.norm import add_rmsnorm_backward, add_rmsnorm_forward  # noqa: E402
from minisb.ops.rope import rope_backward, rope_forward, rope_table  # noqa: E402
from minisb.ops.spike import spike_forward  # noqa: E402
from minisb.ops.swiglu import swiglu_backward, swiglu_forward  # noqa: E402

SIZES = SimpleNamespace(B=32, T=1024, C=768, H=12, G=4, D=64, R=16, W=256, F=2048, V=32768, params=100_000_000)


@dataclass
class Row:
    """bytes: of arrays that the operation reads and writes, each as often as it must; flops: in products."""

    name: str
    call: object
    bytes: int
    flops: int = 0


class Rows:
    """The rows, group by group: what one group holds is freed before the next begins."""

    def __init__(self, be, dtype: str, sizes=SIZES):
        self.be, self.xp, self.dtype, self.s = be, be.xp, element(dtype), sizes
        self.N = sizes.B * sizes.T

    def __iter__(self):
        for group in (self.norms, self.projections, self.feed_forward, self.splits, self.linear_attention,
                      self.attention, self.ends, self.optimiser):  # fmt: skip
            yield from group()

    def draw(self, *shape, dtype=None):
        values = self.xp.random.standard_normal(shape)
        return values.astype(self.dtype if dtype is None else dtype)

    def masters(self, *shape):
        """A gradient or a state: zeros in float32."""
        return self.xp.zeros(shape, "float32")

    def norms(self):
        be, s = self.be, self.s
        x, delta, w, dw = self.draw(self.N, s.C), self.draw(self.N, s.C), self.draw(s.C), self.masters(s.C)
        saved = add_rmsnorm_forward(be, x, delta, w, 1e-6)[2]
        yield Row("copy", lambda: self.xp.copyto(delta, x), 2 * x.nbytes)
        yield Row("add_rmsnorm_forward", lambda: add_rmsnorm_forward(be, x, delta, w, 1e-6), 4 * x.nbytes)
        yield Row("add_rmsnorm_backward", lambda: add_rmsnorm_backward(be, x, delta, saved, dw), 4 * x.nbytes)
        yield Row("spike_forward", lambda: spike_forward(be, x, 3.0), 2 * x.nbytes)

    def projections(self):
        be, s = self.be, self.s
        x = self.draw(self.N, s.C)
        for name, O in (("qkv", (s.H + 2 * s.G) * s.D), ("gate_up", 2 * s.F)):
            w, b, dy = self.draw(O, s.C), self.draw(O), self.draw(self.N, O)
            dw, db = self.masters(O, s.C), self.masters(O)
            size, flops = x.nbytes + w.nbytes + dy.nbytes, 2 * self.N * s.C * O
            yield Row(f"linear_forward {name}", lambda w=w, b=b: linear_forward(be, x, w, b), size, flops)
            yield Row(
                f"linear_backward {name}",
                lambda dy=dy, w=w, dw=dw, db=db: linear_backward(be, dy, x, w, dw, db),
                2 * size + 2 * dw.nbytes,
                2 * flops,
            )

    def feed_forward(self):
        be = self.be
        gate_up, dh = self.draw(self.N, 2 * self.s.F), self.draw(self.N, self.s.F)
        yield Row("swiglu_forward", lambda: swiglu_forward(be, gate_up), 3 * dh.nbytes)
        yield Row("swiglu_backward", lambda: swiglu_backward(be, dh, gate_up), 5 * dh.nbytes)

    def splits(self):
        be, s = self.be, self.s
        qkv, z = self.draw(s.B, s.T, (s.H + 2 * s.G) * s.D), self.draw(s.B, s.T, s.G, s.D)
        sizes = s.H, s.G, s.D
        q, k, v, heads = relu_heads_forward(be, qkv, *sizes)
        yield Row("relu_heads_forward", lambda: relu_heads_forward(be, qkv, *sizes), 2 * qkv.nbytes)
        moved = 3 * qkv.nbytes - v.nbytes
        yield Row("relu_heads_backward", lambda: relu_heads_backward(be, q, k, v, heads, qkv), moved)
        cos, sin = (self.xp.asarray(a, "float32") for a in rope_table(0, s.T, s.D, 1e6))
        yield Row("rope_forward", lambda: rope_forward(be, qkv, cos, sin, *sizes), 2 * qkv.nbytes)
        yield Row("rope_backward", lambda: rope_backward(be, q, k, v, cos, sin, qkv), 2 * qkv.nbytes)
        log_g, gate = log_gate_forward(be, z, 16.0)
        yield Row("log_gate_forward", lambda: log_gate_forward(be, z, 16.0), z.nbytes + log_g.nbytes)
        yield Row("log_gate_backward", lambda: log_gate_backward(be, log_g, gate), 2 * z.nbytes + log_g.nbytes)
        yield from self.low_rank_gate()

    def low_rank_gate(self):
        """Its input and that one's gradient are the last columns of a fused projection."""
        be, s, R = self.be, self.s, self.s.R
        J, fused = s.G * s.D, self.draw(s.B, s.T, (s.H + 2 * s.G) * s.D + s.R)
        x, w, b, dw, db = fused[..., -R:], self.draw(J, R), self.draw(J), self.masters(J, R), self.masters(J)
        log_g, saved = low_rank_gate_forward(be, x, w, b, 16.0)
        dx, flops = self.xp.empty_like(fused)[..., -R:], 2 * self.N * R * J
        moved = x.nbytes + log_g.nbytes
        yield Row("low_rank_gate_forward", lambda: low_rank_gate_forward(be, x, w, b, 16.0), moved, flops)
        yield Row(
            "low_rank_gate_backward",
            lambda: low_rank_gate_backward(be, log_g, saved, dx, dw, db),
            moved + dx.nbytes,
            2 * flops,
        )

    def linear_attention(self):
        be, s = self.be, self.s
        q, k, v, do = (abs(self.draw(s.B, s.T, n, s.D)) for n in (s.H, s.G, s.G, s.H))
        log_g = -0.05 * abs(self.draw(s.B, s.T, s.G, s.D, dtype="float32"))
        state = self.masters(s.B, s.G, s.D, s.D)
        saved = gla_forward(be, q, k, v, log_g)[2]
        keys = 2 * k.nbytes + log_g.nbytes
        yield Row("gla_forward", lambda: gla_forward(be, q, k, v, log_g), 2 * q.nbytes + keys)
        yield Row("gla_backward", lambda: gla_backward(be, do, None, saved), 3 * q.nbytes + 2 * keys)
        step = [a[:, :1].copy() for a in (q, k, v, log_g)]
        yield Row("gla_step", lambda: gla_step(be, *step, state), 2 * state.nbytes)

    def attention(self):
        be, s = self.be, self.s
        W = min(s.W, s.T)
        pairs = s.B * s.H * (s.T * W - W * (W - 1) // 2)  # visible (query, key) pairs
        q, k, v, do = (self.draw(s.B, s.T, n, s.D) for n in (s.H, s.G, s.G, s.H))
        saved = attention_forward(be, q, k, v, W)[1]
        size = q.nbytes + k.nbytes
        yield Row("attention_forward", lambda: attention_forward(be, q, k, v, W), 2 * size, 4 * s.D * pairs)
        yield Row("attention_backward", lambda: attention_backward(be, do, saved), 4 * size, 10 * s.D * pairs)
        query, *cache = q[:, :1].copy(), k[:, :W].copy(), v[:, :W].copy()
        yield Row("attention_step", lambda: attention_step(be, query, *cache, W), 2 * cache[0].nbytes)

    def ends(self):
        be, s, some = self.be, self.s, self.N // 4
        tokens = self.xp.asarray(self.xp.random.randint(0, s.V, (s.B, s.T)), "int32")
        table, dtable, dx = self.draw(s.V, s.C), self.masters(s.V, s.C), self.draw(s.B, s.T, s.C)
        yield Row("embedding_forward", lambda: embedding_forward(be, tokens, table), 2 * dx.nbytes)
        moved = dx.nbytes + 2 * dtable.nbytes
        yield Row("embedding_backward", lambda: embedding_backward(be, dx, tokens, dtable), moved)
        logits, targets, losses = self.draw(some, s.V), tokens.reshape(-1)[:some], self.masters(some)
        yield Row("cross_entropy + gradient", lambda: cross_entropy(be, logits, targets, 1.0), 2 * logits.nbytes)
        yield Row("counted", lambda: counted(be, tokens.reshape(-1)), tokens.nbytes)
        yield Row("total_loss", lambda: total_loss(be, losses), losses.nbytes)

    def optimiser(self):
        be, size = self.be, self.s.params
        p, g, m, v = (self.masters(size) + 0.1 for _ in range(4))
        rounded = None if p.dtype == self.dtype else p.astype(self.dtype)
        written = 0 if rounded is None else rounded.nbytes
        yield Row("grad_norm", lambda: grad_norm(be, g), g.nbytes)
        how = size // 3 * 2, 1e-3, 0.9, 0.95, 1e-8, 0.1, 10, 1.0, rounded
        yield Row("adamw", lambda: adamw(be, p, g, m, v, *how), 7 * p.nbytes + written)


# --- one row, looked at closely


def launches(be, call) -> list[tuple]:
    """(kernel, dtype, blocks, threads, bytes of dynamic shared memory) of each launch that call() makes."""
    found, launch = [], be.device.launch

    def noted(name, dtype, blocks, threads, *args, shared=0):
        found.append((name, dtype, blocks, threads, shared))
        launch(name, dtype, blocks, threads, *args, shared=shared)

    be.device.launch = noted
    try:
        call()
    finally:
        del be.device.launch  # the class's own again
    return found


def closer(be, row: Row):
    """Prints what each kernel of a row takes of a multiprocessor, and how to look closer still."""
    from cupy.cuda import driver

    warps = be.device.device.attributes["MaxThreadsPerMultiProcessor"] // 32
    row.call()  # compiled, and what is made once is made
    for name, dtype, blocks, threads, dynamic in launches(be, row.call):
        kernel = be.device._ready[name, dtype][0]
        size = threads if isinstance(threads, int) else threads[0] * threads[1]
        blocks_at_once = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, size, dynamic)
        occupancy = blocks_at_once * -(-size // 32) / warps
        print(
            f"    {name} <{dtype.name}>: {kernel.num_regs} registers, {kernel.shared_size_bytes} + {dynamic} bytes of "
            f"shared memory, {kernel.local_size_bytes} of stack; {blocks} blocks of {threads} threads, "
            f"{blocks_at_once} at once on a multiprocessor: {occupancy:.0%} of its warps"
        )
        print(
            f"      ncu --clock-control none --set full --kernel-name {name} --launch-skip 3 --launch-count 1 "
            f"python bench/gpu_ops.py --row '{row.name}'"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--profile", metavar="NAME", help="rows of that name, and each kernel that they launch")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    from gpu_timing import copy_rate, milliseconds, product_rate

    be, why = choose("cuda")
    copied, multiplied = copy_rate(), product_rate(be, args.dtype)
    print(f"{why}\n{vars(SIZES)}, {args.dtype}")
    print(f"copy {copied:.0f} GB/s, product of 8192 x 8192 x 8192 {multiplied:.0f} TFLOP/s\n")
    print(f"{'operation':<26}{'ms':>8}{'MB':>8}{'GFLOP':>8}{'GB/s':>8}{'TFLOP/s':>9}{'share':>7}")
    found = []
    for row in Rows(be, args.dtype):
        if (args.profile or args.row) not in row.name:
            continue
        ms = milliseconds(row.call)
        rates = row.bytes / ms / 1e6, row.flops / ms / 1e9
        share = max(rates[0] / copied, rates[1] / multiplied)
        work = (f"{row.flops / 1e9:.1f}", f"{rates[1]:.0f}") if row.flops else ("", "")
        print(f"{row.name:<26}{ms:>8.3f}{row.bytes / 1e6:>8.1f}{work[0]:>8}{rates[0]:>8.0f}{work[1]:>9}{share:>7.0%}")
        found.append({"op": row.name, "ms": ms, "gb_s": rates[0], "tflop_s": rates[1], "share": share})
        if args.profile:
            closer(be, row)
    limits = {"copy_gb_s": copied, "product_tflop_s": multiplied}
    print(json.dumps({"device": be.device.describe(), "dtype": args.dtype, **limits, "rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
