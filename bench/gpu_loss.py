"""What begins and ends a training step on one GPU in bfloat16: loss, embedding, gate, sums, AdamW.

    python bench/gpu_loss.py

The loss: 8,192 rows of V logits and their gradient, by threads of a block, KB of a row that it keeps in shared memory
(0: the second look is at the cache) and packs that a thread asks for at once; the first line of each V is what
launchers/dense.py chooses.  A variant whose gradient differs from that is marked WRONG.  The embedding's gradient:
random tokens, a text whose most frequent token is 5 % of it, a text of one token.  Median of 20 with a cold cache; the
share is of a copy's rate.  The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import at_once_kernel, copy_rate, milliseconds  # noqa: E402

from minisb import kernels  # noqa: E402
from minisb.backend import choose  # noqa: E402
from minisb.launchers import dense  # noqa: E402
from minisb.launchers.grid import add_slices  # noqa: E402
from minisb.ops.adamw import adamw, grad_norm  # noqa: E402
from minisb.ops.cross_entropy import counted, cross_entropy, total_loss  # noqa: E402
from minisb.ops.embedding import embedding_backward, embedding_forward  # noqa: E402
from minisb.ops.gate import log_gate_backward, log_gate_forward  # noqa: E402

BFLOAT16 = kernels.element("bfloat16")
N, TEXT, VOCAB = 8192, 32768, 32768  # rows of the loss, tokens of a step, tokens there are
VARIANTS = [  # threads, KB kept, packs at once
    (512, 64, 4), (256, 64, 4), (1024, 64, 4), (512, 64, 2), (512, 64, 8), (256, 64, 8), (1024, 64, 2), (512, 72, 4),
    (512, 32, 4), (1024, 0, 4), (512, 0, 4), (512, 110, 4), (768, 110, 4), (768, 110, 2), (768, 220, 4), (1024, 220, 4),
    (768, 220, 2), (1024, 220, 2),
]  # fmt: skip


def losses(be, line, V: int):
    cupy.random.seed(0)
    first = cupy.random.standard_normal((N, V), dtype="float32").astype(BFLOAT16)
    targets, d = cupy.random.randint(0, V, N, dtype="int32"), cupy.full((), 1 / N, "float32")
    logits, bytes_moved = first.copy(), 2 * first.nbytes
    call = lambda: cross_entropy(be, logits, targets, d)  # noqa: E731
    call()
    key = ("cross_entropy", BFLOAT16)
    usual, chosen = be.device._ready[key], dense.loss_block
    line(f"cross_entropy V {V}, as chosen: {chosen(be, logits)}", call, bytes_moved)
    logits[...] = first
    call()
    expected = logits.view("uint16").copy()
    for threads, kept, at_once in VARIANTS:
        if kept > 64 and (kept - 32) << 9 > V:
            continue  # the row is shorter
        size = threads, min(kept << 9, V)
        dense.loss_block = lambda *_, size=size: size
        be.device._ready[key] = at_once_kernel(be.device, "cross_entropy", "cross_entropy", 4, at_once), usual[1]
        logits[...] = first
        call()
        right = (
            float((logits.view("uint16") != expected).mean()) < 1e-3
        )  # sums in another order: a last bit here and there
        name = f"  V {V}, {threads} threads, {kept} KB kept, {at_once} at once{'' if right else '  WRONG'}"
        line(name, call, bytes_moved)
    be.device._ready[key], dense.loss_block = usual, chosen


def texts() -> dict:
    """Random tokens, and tokens by rank: the first is 5 % of the text, the n-th 5 / n %, the rest random."""
    rng = np.random.default_rng(0)
    share = 0.05 / np.arange(1, VOCAB + 1)
    share[10_000:] += (1 - share.sum()) / (VOCAB - 10_000)
    ranked = rng.permutation(VOCAB)[rng.choice(VOCAB, TEXT, p=share / share.sum())]
    tokens = {"random": rng.integers(0, VOCAB, TEXT), "one token 5 %": ranked, "one token only": np.zeros(TEXT)}
    return {name: cupy.asarray(t, "int32") for name, t in tokens.items()}


def embeddings(be, line, C: int):
    dx = cupy.random.standard_normal((TEXT, C), dtype="float32").astype(BFLOAT16)
    table, dtable = cupy.zeros((VOCAB, C), BFLOAT16), cupy.zeros((VOCAB, C), "float32")
    for name, tokens in texts().items():
        rows = len(cupy.unique(tokens))
        line(f"embedding_forward C {C}, {name}", lambda t=tokens: embedding_forward(be, t, table), 2 * dx.nbytes)
        moved = dx.nbytes + 2 * rows * C * 4
        line(f"embedding_backward C {C}, {name}", lambda t=tokens: embedding_backward(be, dx, t, dtable), moved)


def others(be, line):
    x, targets = cupy.zeros(N, "float32"), cupy.zeros(TEXT, "int32")
    line("total_loss", lambda: total_loss(be, x), x.nbytes)
    line("counted", lambda: counted(be, targets), targets.nbytes)
    for slices, C in ((528, 384), (256, 512), (528, 768), (256, 2048)):
        partial, total = cupy.zeros((slices, C), "float32"), cupy.zeros(C, "float32")
        like = cupy.empty(0, BFLOAT16)
        line(f"add_slices {slices} x {C}", lambda p=partial, t=total, b=like: add_slices(be, b, p, t), partial.nbytes)
    z = cupy.random.standard_normal((TEXT, 128), dtype="float32").astype(BFLOAT16)
    log_g, saved = log_gate_forward(be, z, 16.0)
    line("log_gate_forward", lambda: log_gate_forward(be, z, 16.0), z.nbytes + log_g.nbytes)
    line("log_gate_backward", lambda: log_gate_backward(be, log_g, saved), 2 * z.nbytes + log_g.nbytes)
    for size in (25_000_000, 100_000_000):
        p, g, m, v = (cupy.full(size, 0.1, "float32") for _ in range(4))
        rounded, scale = p.astype(BFLOAT16), cupy.ones(())
        how = size // 2, 1e-3, 0.9, 0.95, 1e-8, 0.1, 10, scale, rounded
        line(f"grad_norm {size}", lambda g=g: grad_norm(be, g), g.nbytes)
        moved = 7 * p.nbytes + rounded.nbytes  # p, m and v are read and written
        line(f"adamw {size}", lambda p=p, g=g, m=m, v=v, how=how: adamw(be, p, g, m, v, *how), moved)


def main() -> int:
    be, why = choose("cuda")
    copied, found = copy_rate(), {}
    print(f"{why}\ncopy {copied:.0f} GB/s\n{'':<60}{'ms':>8}{'GB/s':>8}{'share':>7}")

    def line(name, call, moved: int):
        try:
            ms = milliseconds(call)
        except Exception as error:  # more threads or shared memory than there are
            print(f"{name}: {type(error).__name__} {str(error)[:80]}")
            return
        rate = moved / ms / 1e6
        print(f"{name:<60}{ms:>8.4f}{rate:>8.0f}{rate / copied:>7.0%}", flush=True)
        found[name.strip()] = round(ms, 5)

    for V in (32768, 8192, 50304, 131072):
        losses(be, line, V)
    for C in (384, 768):
        embeddings(be, line, C)
    others(be, line)
    print(json.dumps({"device": be.device.describe(), "copy_gb_s": copied, "ms": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
