"""The matrix products of a training step on one GPU: cuBLAS's plain call, and what cuBLASLt can do better.

    python bench/gpu_products.py [--row 101m 25m] [--rounds 20]

For every form of product in a step (rows x columns x sum, transposed or not -> written), milliseconds of a call:
    gemm      cublasGemmEx: what training uses where there is no bias
    lt        cuBLASLt, the first algorithm that it names
    best      the fastest of the 16 that it names, which MINISB_TUNE=1 would choose; #: its place
    bias      for projections with a bias: apart, product and add_bias; with, one product by cuBLASLt, what training
              uses; and the best of 16 of those.  "none": it has no algorithm.
Medians with a cold cache; share: of the rate of a product of 8192 cubed.  Below: sums over a step, what the bias in the
product gives, and what MINISB_TUNE=1 does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cupy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import milliseconds  # noqa: E402
from gpu_train import ROWS  # noqa: E402

from minisb import cublaslt  # noqa: E402
from minisb.backend import choose  # noqa: E402
from minisb.cublas import library  # noqa: E402
from minisb.kernels import element  # noqa: E402
from minisb.ops.linear import linear_forward  # noqa: E402

LARGE, LARGEST = 8192, 1 << 28  # rows and columns of the product that sets the measure; elements of any array here
CANDIDATES, QUICK = 16, 5  # algorithms tried, rounds for each before the fastest is timed properly


@dataclass
class Form:
    """calls of rows x columns x sum in a step.  bias: over so many columns; gap: elements between the rows of what is
    read."""

    calls: int
    m: int
    n: int
    k: int
    ta: bool = False
    tb: bool = False
    bias: int = 0
    gap: int = 0

    @property
    def name(self) -> str:
        letters, written = f"{'NT'[self.ta]}{'NT'[self.tb]}", " -> float32 +=" if self.ta else ""
        return f"{self.m} x {self.n} x {self.k} {letters}{written}"


def forms(c, head_rows: int) -> list[Form]:
    """Every product of a step."""
    N, q, kv = c.batch_size * c.seq_len, c.heads * c.head_dim, c.kv_heads * c.head_dim
    gated = sum(c.mixers[i % len(c.mixers)] == "gla" for i in range(c.layers))
    found = []
    for calls, O, I, biased, gap in (
        (gated, q + 2 * kv + c.gate_rank, c.width, q + 2 * kv, 0),
        (c.layers - gated, q + 2 * kv, c.width, q + 2 * kv, 0),
        (gated, kv, c.gate_rank, kv, q + 2 * kv),  # reads columns of the wider projection
        (c.layers, c.width, q, 0, 0),
        (c.layers, 2 * c.ffn, c.width, 0, 0),
        (c.layers, c.width, c.ffn, 0, 0),
    ):
        if calls:
            found.append(Form(calls, N, O, I, tb=True, bias=biased, gap=gap))
            found.append(Form(calls, N, I, O))
            found.append(Form(calls, O, I, N, ta=True, gap=gap))
    rows, calls = min(head_rows, N), -(-N // head_rows)
    found.append(Form(calls, rows, c.vocab, c.width, tb=True))
    found.append(Form(calls, rows, c.width, c.vocab))
    found.append(Form(calls, c.vocab, c.width, rows, ta=True))
    return found


class Bench:
    def __init__(self, be, rounds: int):
        self.be, self.rounds, self.dtype = be, rounds, element(be.activations)
        noise = cupy.random.standard_normal(LARGEST >> 2, dtype="float32").astype(self.dtype)
        self.noise = cupy.tile(noise, 4)
        self.other = self.noise[::-1].copy()
        self.written, self.summed = cupy.empty(LARGEST, self.dtype), cupy.zeros(LARGEST, "float32")
        cublas = self.plain = be.device.fused.cublas
        self.lt = cublaslt.CublasLt(cublas, library("cublasLt"))
        self.planning = []  # ms of each first call
        a, b, out = self.arrays(Form(1, LARGE, LARGE, LARGE, tb=True))
        self.rate = 2e-9 * LARGE**3 / self.time(lambda: cublas.gemm(a, b, out, tb=True))

    def time(self, call, rounds: int = 0) -> float:
        return milliseconds(call, rounds or self.rounds)

    def arrays(self, form: Form):
        """The operands and where the product goes, weights' gradients in float32."""

        def matrix(place, rows, columns, gap=0):
            return place[: rows * (columns + gap)].reshape(rows, columns + gap)[:, gap:]

        a = matrix(self.noise, *((form.k, form.m) if form.ta else (form.m, form.k)), gap=0 if form.ta else form.gap)
        b = matrix(self.other, *((form.n, form.k) if form.tb else (form.k, form.n)), gap=form.gap if form.ta else 0)
        return a, b, matrix(self.summed if form.ta else self.written, form.m, form.n)

    def tried(self, *arrays, **how) -> dict:
        """A product of cuBLASLt's by the first algorithm, and by the fastest of several."""
        plans = self.lt.plans
        plans.clear()

        def call():
            return self.lt.gemm_with(*arrays, **how)

        began = time.perf_counter()
        if not call():
            return {"first": None, "best": None, "place": None, "of": 0}
        self.planning.append(1e3 * (time.perf_counter() - began))
        (plan,) = plans.values()
        first = self.time(call)
        answers = plan.ask(plan.bias, CANDIDATES)
        times = []
        for answer in answers:
            plan.algorithm = answer.algorithm
            times.append(self.time(call, QUICK) if call() else float("inf"))
            plans[plan.form] = plan  # a refusal took it away
        place = min(range(len(times)), key=times.__getitem__)
        plan.algorithm = answers[place].algorithm
        return {"first": first, "best": min(first, self.time(call)), "place": place, "of": len(answers)}

    def products(self, form: Form) -> dict:
        a, b, out = self.arrays(form)
        how = {"ta": form.ta, "tb": form.tb, "accumulate": form.ta}
        gemm = self.time(lambda: self.plain.gemm(a, b, out, **how))
        each = self.tried(a, b, out, **how)
        return {"gemm": gemm, "lt": each["first"], "best": each["best"], "place": each["place"]}

    def with_bias(self, form: Form) -> dict:
        """A projection and its bias: launched apart, and in one product."""
        a, b, out = self.arrays(form)
        bias, be = self.noise[: form.bias], self.be
        usual, be.gemm_with = be.gemm_with, lambda *_, **__: False
        apart = self.time(lambda: linear_forward(be, a, b, bias, out))
        be.gemm_with = usual
        each = self.tried(a, b, out, tb=True, bias=bias)
        return {"apart": apart, "with": each["first"], "with_best": each["best"], "with_place": each["place"]}


def ms(value) -> str:
    return f"{value:9.3f}" if value is not None else "     none"


def row(bench: Bench, config) -> dict:
    head = f"{'calls':>5}{'gemm':>9}{'lt':>9}{'best':>9}   #   share of 8192^3: gemm, best"
    found, total = [], defaultdict(float)
    print(head)
    for form in forms(config, bench.be.head_logits // config.vocab):
        flops = 2e-9 * form.m * form.n * form.k
        times = bench.products(form)
        usual = times["gemm"]
        for name in ("gemm", "lt", "best"):
            total[name] += form.calls * (times[name] or usual)
        total["floor"] += form.calls * flops / bench.rate
        line = "".join(ms(times[name]) for name in ("gemm", "lt", "best"))
        shares = [f"{flops / t / bench.rate:6.1%}" for t in (usual, times["best"] or usual)]
        print(f"{form.calls:5}{line}{str(times['place']):>4}  {'  '.join(shares)}   {form.name}", flush=True)
        if form.bias:
            times |= bench.with_bias(form)
            for name in ("apart", "with", "with_best"):
                total[f"bias {name}"] += form.calls * (times[name] or times["apart"])
            line = ", ".join(f"{name} {ms(times[name]).strip()}" for name in ("apart", "with", "with_best"))
            print(f"       bias of {form.bias}: {line} (# {times['with_place']})", flush=True)
        found.append({**vars(form), "name": form.name, **times})
    total = {name: round(value, 3) for name, value in total.items()}
    print("  a step, ms: " + ", ".join(f"{name} {value}" for name, value in total.items()))
    for what, less, more in (("bias within", "bias with", "bias apart"), ("MINISB_TUNE", "best", "gemm")):
        print(f"  {what:<14} gives {total.get(more, 0) - total.get(less, 0):7.3f} ms of a step")
    return {"forms": found, "step": total}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", nargs="+", default=["101m", "25m"], choices=[name for name in ROWS if name != "1b"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    be, why = choose("cuda")
    if be.device.fused is None:
        sys.exit("error: cuBLASLt was not found beside cuBLAS")
    began = time.time()
    with be.stream():
        bench = Bench(be, args.rounds)
        version = be.device.fused.library.cublasLtGetVersion()
        print(f"{why}\ncuBLASLt {version}; a product of 8192 cubed: {bench.rate:.0f} TFLOP/s")
        found = {"device": be.device.describe(), "version": version, "product_tflop_s": bench.rate}
        for name in args.row:
            print(f"\n{name}")
            found[name] = row(bench, ROWS[name])
    found["planning_ms"] = round(sum(bench.planning), 2)
    print(f"\n{len(bench.planning)} plans, made and first launched in {found['planning_ms']:.1f} ms; "
          f"all in {time.time() - began:.0f} s")  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
