"""`python -m minisb bench`: every operation at the shapes of `nano`, NumPy against the natives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minisb.backend import Backend, CpuBackend
from minisb.config import Config, preset
from minisb.ops.adamw import adamw, grad_norm
from minisb.ops.attention import attention_backward, attention_forward, attention_step
from minisb.ops.cross_entropy import cross_entropy
from minisb.ops.embedding import embedding_backward, embedding_forward
from minisb.ops.gate import log_gate_backward, log_gate_forward
from minisb.ops.gla import gla_backward, gla_forward, gla_step
from minisb.ops.heads import relu_heads_backward, relu_heads_forward
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.norm import add_rmsnorm_backward, add_rmsnorm_forward, rmsnorm_backward, rmsnorm_forward
from minisb.ops.rope import rope_backward, rope_forward, rope_table
from minisb.ops.spike import spike_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward

HELP = "times our own operations by backend, at the shapes of nano"

#: Seconds spent on one operation in one backend, after a warm-up; the median call is reported.
BUDGET = 0.12
LEAST, MOST = 3, 200  # calls

DECODE = 128  # keys in the cache of one decoding step


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: every core)")


def main(args) -> int:
    config = preset("nano")
    found = measure(config, args.threads)
    print(json.dumps(found) if args.json else text(found))
    return 0


def measure(config: Config, threads: int | None = None) -> dict:
    """Milliseconds of every case in both backends.

    A backend is made just before its turn, because each sets BLAS's pool of threads to its own
    liking and the process has only one.
    """
    table = cases(config)
    times = {}
    for make in (Backend, CpuBackend):
        be = make(threads)
        times[be.name] = [_median_ms(case.make(be, _drawer())) for case in table]
    rows = [
        {"op": case.name, "numpy_ms": slow, "cpu_ms": fast, "ratio": slow / fast, "native": _is_native(be, case.name)}
        for case, slow, fast in zip(table, times["numpy"], times["cpu"], strict=True)
    ]
    shapes = {name: getattr(config, name) for name in _SHAPES}
    return {"preset": config.preset, "threads": be.threads, "natives": be.modules, "shapes": shapes, "ops": rows}


_SHAPES = ("batch_size", "seq_len", "width", "heads", "kv_heads", "head_dim", "ffn", "window", "vocab")


def text(found: dict) -> str:
    s = found["shapes"]
    lines = [
        f"{found['preset']}: B {s['batch_size']}, T {s['seq_len']}, C {s['width']}, H {s['heads']}, G {s['kv_heads']}, "
        f"D {s['head_dim']}, F {s['ffn']}, W {s['window']}, V {s['vocab']}; {found['threads']} threads, float32, "
        "median of a call in ms",
        f"natives: {', '.join(found['natives']) or 'none'}",
        "",
        f"{'operation':<24}{'numpy':>10}{'cpu':>10}{'ratio':>9}",
    ]
    for row in found["ops"]:
        mark = "" if row["native"] else "  (no native: the same code)"
        lines.append(f"{row['op']:<24}{row['numpy_ms']:>10.3f}{row['cpu_ms']:>10.3f}{row['ratio']:>8.1f}x{mark}")
    return "\n".join(lines)


# --- what is timed


@dataclass
class Case:
    """One call to time.  make(be, draw) -> a function without arguments; draw(*shape) gives normal
    float32 numbers, the same for every backend."""

    name: str
    make: Callable


def cases(c: Config) -> list[Case]:
    return [*_product_cases(c), *_mixer_cases(c), *_row_cases(c), *_decode_cases(c), *_parameter_cases(c)]


def _product_cases(c: Config) -> list[Case]:
    x, w = (c.batch_size, c.seq_len, c.width), (2 * c.ffn, c.width)
    y = (*x[:-1], w[0])

    def backward(be, draw):
        arguments = draw(*y), draw(*x), draw(*w), draw(*w)
        return lambda: linear_backward(be, *arguments)

    def forward(be, draw):
        arguments = draw(*x), draw(*w)
        return lambda: linear_forward(be, *arguments)

    return [Case("linear_forward", forward), Case("linear_backward", backward)]


def _mixer_cases(c: Config) -> list[Case]:
    B, T, H, G, D = c.batch_size, c.seq_len, c.heads, c.kv_heads, c.head_dim

    def gla_inputs(draw):
        return abs(draw(B, T, H, D)), abs(draw(B, T, G, D)), draw(B, T, G, D), -abs(draw(B, T, G, D)) / 16

    def qkv(draw):
        return draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, D), c.window

    return [
        *_pair("gla", gla_inputs, gla_forward, gla_backward, lambda draw: (draw(B, T, H, D), None)),
        *_pair("attention", qkv, attention_forward, attention_backward, lambda draw: (draw(B, T, H, D),)),
    ]


def _row_cases(c: Config) -> list[Case]:
    B, T, C, H, G, D = c.batch_size, c.seq_len, c.width, c.heads, c.kv_heads, c.head_dim
    fused = (H + 2 * G) * D
    x, heads = (B, T, C), (H, G, D)
    cos, sin = (np.asarray(t, np.float32) for t in rope_table(0, T, D, c.rope_theta))

    def split(draw):
        return [draw(B, T, n, D) for n in (H, G, G)]

    def relu_back(be, draw):
        *_, saved = relu_heads_forward(be, draw(B, T, fused), *heads)
        arguments = *split(draw), saved, draw(B, T, fused)
        return lambda: relu_heads_backward(be, *arguments)

    def rope_back(be, draw):
        arguments = *split(draw), cos, sin, draw(B, T, fused)
        return lambda: rope_backward(be, *arguments)

    def loss_and_gradient(be, draw):
        rows = be.head_logits // c.vocab  # one slice of the head, as the model does it
        logits, targets = draw(rows, c.vocab), np.arange(rows) % c.vocab
        return lambda: cross_entropy(be, logits, targets, 1 / rows)

    return [
        Case("spike_forward", _call(spike_forward, lambda draw: (draw(*x), c.spike_k))),
        Case("rmsnorm_forward", _call(rmsnorm_forward, lambda draw: (draw(*x), draw(C), c.norm_eps))),
        Case("rmsnorm_backward", _norm_backward(rmsnorm_forward, rmsnorm_backward, 1, x, c.norm_eps)),
        Case("add_rmsnorm_forward", _call(add_rmsnorm_forward, lambda draw: (draw(*x), draw(*x), draw(C), c.norm_eps))),
        Case("add_rmsnorm_backward", _norm_backward(add_rmsnorm_forward, add_rmsnorm_backward, 2, x, c.norm_eps)),
        Case("rope_forward", _call(rope_forward, lambda draw: (draw(B, T, fused), cos, sin, *heads))),
        Case("rope_backward", rope_back),
        Case("relu_heads_forward", _call(relu_heads_forward, lambda draw: (draw(B, T, fused), *heads))),
        Case("relu_heads_backward", relu_back),
        *_pair(
            "log_gate", lambda draw: (draw(B, T, G, D), c.gate_divisor), log_gate_forward, log_gate_backward,
            lambda draw: (draw(B, T, G, D),),
        ),
        *_pair(
            "swiglu", lambda draw: (draw(B, T, 2 * c.ffn),), swiglu_forward, swiglu_backward,
            lambda draw: (draw(B, T, c.ffn),),
        ),
        Case("cross_entropy", loss_and_gradient),
    ]  # fmt: skip


def _decode_cases(c: Config) -> list[Case]:
    H, G, D = c.heads, c.kv_heads, c.head_dim

    def gla_inputs(draw):
        return draw(1, 1, H, D), draw(1, 1, G, D), draw(1, 1, G, D), -abs(draw(1, 1, G, D)), draw(1, G, D, D)

    def window(draw):
        return draw(1, 1, H, D), draw(1, DECODE, G, D), draw(1, DECODE, G, D), DECODE

    return [Case("gla_step", _call(gla_step, gla_inputs)), Case("attention_step", _call(attention_step, window))]


def _parameter_cases(c: Config) -> list[Case]:
    B, T, C, V = c.batch_size, c.seq_len, c.width, c.vocab
    size = 1 << 20

    def embed(be, draw):
        tokens, table = np.arange(B * T).reshape(B, T) % V, draw(V, C)
        return lambda: embedding_forward(be, tokens, table)

    def embed_back(be, draw):
        dx, tokens, dtable = draw(B, T, C), np.arange(B * T).reshape(B, T) % V, draw(V, C)
        return lambda: embedding_backward(be, dx, tokens, dtable)

    def update(be, draw):
        flats = draw(size), draw(size), draw(size), abs(draw(size))
        return lambda: adamw(be, *flats, size // 2, 1e-3, 0.9, 0.95, 1e-8, 0.1, 10, 1.0)

    return [
        Case("embedding_forward", embed),
        Case("embedding_backward", embed_back),
        Case("grad_norm", _call(grad_norm, lambda draw: (draw(size),))),
        Case("adamw", update),
    ]


def _pair(name, inputs, forward, backward, upstream) -> list[Case]:
    """The cases of an operation whose forward returns `saved` last and whose backward ends with it."""

    def make_backward(be, draw):
        saved = forward(be, *inputs(draw))[-1]
        arguments = *upstream(draw), saved
        return lambda: backward(be, *arguments)

    return [Case(f"{name}_forward", _call(forward, inputs)), Case(f"{name}_backward", make_backward)]


def _norm_backward(forward, backward, streams, shape, eps):
    def make(be, draw):
        saved = forward(be, *(draw(*shape) for _ in range(streams)), draw(shape[-1]), eps)[-1]
        arguments = *(draw(*shape) for _ in range(streams)), saved, draw(shape[-1])
        return lambda: backward(be, *arguments)

    return make


def _call(function, inputs):
    def make(be, draw):
        arguments = inputs(draw)
        return lambda: function(be, *arguments)

    return make


# --- how


def _drawer():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


def _median_ms(call, budget: float = BUDGET) -> float:
    call()  # the first call also fetches code and memory
    seconds, end = [], time.perf_counter() + budget
    while len(seconds) < LEAST or (len(seconds) < MOST and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1e3


def _is_native(be, name: str) -> bool:
    """linear has no twin of its own: its product is the native gemm."""
    return name in be.natives or (name.startswith("linear") and "linear" in be.modules)
