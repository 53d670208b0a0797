"""Softmax attention on tensor cores on one GPU in bfloat16, forward and backward, and variants of each kernel.

    python bench/gpu_attention.py --shape train wider full long [--variants] [--hopper] [--peer]

train: B 32, T 1024, H 12, G 4, D 64, window 256.  wider: the same heads, B 4, T 8192, window 1024.  full: as train,
all of the text.  long: B 1, T 32768, H 28, G 4, D 128, window 4096 (the 7B).
Median of 20 with a cold cache.  TFLOP/s count what the visible pairs need: 4 D a pair forward, 10 D backward (the
kernels do 14 D); the share is of a bfloat16 product of 8192 x 8192 x 8192 on this GPU.  A variant is another
instantiation of a kernel, compiled from an edited source, under other tilings; one whose results differ from the
default's is marked WRONG.  --hopper: the kernels for Hopper's warpgroups and their variants.  --peer: PyTorch's
compiled flex_attention in the same process.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import milliseconds, product_rate, torch_milliseconds  # noqa: E402

from minisb import kernels  # noqa: E402
from minisb.backend import choose  # noqa: E402
from minisb.launchers import attention as twins  # noqa: E402
from minisb.launchers.attention import Tiling  # noqa: E402

SHAPES = {
    "train": (32, 1024, 12, 4, 64, 256),
    "wider": (4, 8192, 12, 4, 64, 1024),
    "full": (32, 1024, 12, 4, 64, 1024),
    "long": (1, 32768, 28, 4, 128, 4096),
}
PREFIX = "attention_fast"  # of the kernels' names
FILES = {
    "forward": "attention_fast",
    "backward_q": "attention_backward_fast",
    "backward_kv": "attention_backward_fast",
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Kernel -> its template arguments as (M, CHUNK, other arguments, threads that bound the registers) and tilings as
#: (warps, heads).
VARIANTS = {
    ("forward", 64): [
        ((2, 32, "true", 384), [(6, 3), (4, 1), (6, 1), (12, 3), (12, 1)]),
        ((2, 32, "true", 256), [(4, 1), (6, 3), (8, 1)]),
        ((2, 64, "true", 256), [(4, 1), (6, 3), (8, 1)]),
        ((1, 64, "true", 384), [(4, 1), (12, 3)]),
        ((1, 64, "true", 512), [(4, 1), (8, 1), (12, 3)]),
        ((1, 32, "true", 512), [(4, 1), (8, 1), (12, 3)]),
    ],
    ("forward", 128): [
        ((2, 64, "false", 256), [(8, 1), (4, 1)]),
        ((2, 32, "false", 256), [(8, 1), (4, 1)]),
        ((1, 64, "true", 384), [(4, 1), (12, 1)]),
        ((1, 32, "true", 384), [(4, 1), (12, 1)]),
        ((1, 64, "true", 256), [(8, 1)]),
    ],
    ("backward_q", 64): [
        ((1, 32, "", 512), [(8, 2), (4, 1), (8, 1), (12, 3)]),
        ((1, 32, "", 384), [(4, 1), (12, 3)]),
        ((1, 64, "", 384), [(4, 1), (12, 3)]),
        ((2, 16, "", 256), [(4, 1), (6, 3), (8, 1)]),
        ((2, 32, "", 256), [(4, 1), (6, 3), (8, 1)]),
    ],
    ("backward_q", 128): [
        ((1, 32, "", 256), [(8, 1), (4, 1)]),
        ((1, 16, "", 384), [(4, 1), (12, 1)]),
        ((1, 64, "", 256), [(8, 1), (4, 1)]),
    ],
    ("backward_kv", 64): [
        ((1, 32, "", 384), [(6, 1), (4, 1), (12, 1)]),
        ((1, 16, "", 512), [(4, 1), (8, 1), (16, 1)]),
        ((1, 16, "", 384), [(4, 1), (6, 1), (12, 1)]),
        ((2, 16, "", 256), [(4, 1), (8, 1)]),
    ],
    ("backward_kv", 128): [((1, 16, "", 256), [(8, 1), (4, 1)]), ((1, 32, "", 256), [(8, 1), (4, 1)])],
}

#: Kernel for Hopper -> its file, and its template arguments behind D with the rows of a stage and how many stages.
HOPPER_FILES = {
    "forward": "attention_hopper",
    "backward_q": "attention_hopper_backward_q",
    "backward_kv": "attention_hopper_backward_kv",
}
HOPPER_VARIANTS = {
    ("forward", 64): [((n, stages, turns), (n, stages)) for turns in ("true", "false")
                      for n, stages in ((128, 2), (128, 4), (64, 4))],
    ("forward", 128): [((n, stages, turns), (n, stages)) for turns in ("true", "false")
                       for n, stages in ((128, 2), (128, 3), (64, 4))],
    ("backward_q", 64): [((n,), (64, n)) for n in (2, 4, 6)],
    ("backward_q", 128): [((n,), (64, n)) for n in (2, 4, 6)],
    ("backward_kv", 64): [((n,), (64, n)) for n in (2, 3, 4)],
    ("backward_kv", 128): [((n,), (64, n)) for n in (2, 3, 4)],
}  # fmt: skip


def source(kernel, arguments) -> str:
    """The file with this kernel instantiated otherwise."""
    (name, D), (M, chunk, others, bound) = kernel, arguments
    template = ", ".join(str(x) for x in (D, M, chunk, others) if x != "")
    text, edits = re.subn(rf"{name}<{D},[^>]*>", f"{name}<{template}>", kernels.assembled(FILES[name]))
    text, bounds = re.subn(rf"__launch_bounds__\(\d+\) {PREFIX}_{name}_{D}\(",
                           f"__launch_bounds__({bound}) {PREFIX}_{name}_{D}(", text)  # fmt: skip
    assert edits == bounds == 1
    return text


def compiled(be, kernel, arguments):
    """-> the function, registers, bytes spilled."""
    gpu, name = be.device, f"{PREFIX}_{kernel[0]}_{kernel[1]}"
    options = (*kernels.OPTIONS, "--ptxas-options=-v", f"--gpu-architecture={gpu.target}", "-DREAL_bfloat16")
    code, log = gpu.compiler.compile(source(kernel, arguments), f"{FILES[kernel[0]]}.cu", options)
    path = Path(tempfile.mkdtemp()) / "variant.cubin"
    path.write_bytes(code)
    use = {use.kernel: use for use in kernels.uses(log)}.get(name)
    return path, (use.registers, use.spilled) if use else (0, 0)


class Problem:
    """One shape's arrays and the three kernels as calls."""

    def __init__(self, be, B, T, H, G, D, window):
        self.be, self.shape, self.window, self.scale = be, (B, T, H, G, D, window), window, D**-0.5
        draw = [cupy.random.standard_normal((B, T, n, D), dtype="float32") for n in (H, G, G, H)]
        self.q, self.k, self.v, self.do = (x.astype(BFLOAT16) for x in draw)
        self.o, self.lse = cupy.empty_like(self.q), cupy.empty((B, T, H), "float32")
        self.dq, self.dk, self.dv = (cupy.empty_like(x) for x in (self.q, self.k, self.v))
        pairs = B * H * (T * window - window * (window - 1) // 2)
        self.needed = {"forward": 4 * D * pairs, "backward_q": 4 * D * pairs, "backward_kv": 6 * D * pairs}

    def forward(self):
        twins._forward_fast(self.be, self.q, self.k, self.v, self.o, self.lse, self.window, self.scale)

    def backward_q(self):
        inputs = self.do, self.q, self.k, self.v, self.o, self.lse
        self.kept = twins._backward_q_fast(self.be, *inputs, self.dq, self.window, self.scale)

    def backward_kv(self):
        inputs = self.do, self.q, self.k, self.v, *self.kept
        twins._backward_kv_fast(self.be, *inputs, self.dk, self.dv, self.window, self.scale)

    def results(self, name):
        return {"forward": (self.o,), "backward_q": (self.dq,), "backward_kv": (self.dk, self.dv)}[name]


def wide(x):
    return x.view("uint16").astype("uint32").__lshift__(16).view("float32")


def agree(found, expected) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(float(cupy.linalg.norm(wide(x) - wide(y)) / cupy.linalg.norm(wide(y))) < 1e-2 for x, y in pairs)


def variants(problem, name, peak, found):
    be, D = problem.be, problem.shape[4]
    kernel, key = (name, D), (f"{PREFIX}_{name}_{D}", BFLOAT16)
    expected = [x.copy() for x in problem.results(name)]
    usual = twins.TILINGS[kernel], be.device._ready[key]
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda v: compiled(be, kernel, v[0]), VARIANTS[kernel]))
    for (arguments, tilings), (path, (registers, spilled)) in zip(VARIANTS[kernel], built, strict=True):
        module = cupy.RawModule(path=str(path))
        for warps, heads in tilings:
            M, chunk, others, bound = arguments
            label = f"{name}_{D} M {M} chunk {chunk} {others} bound {bound}, warps {warps} heads {heads}"
            twins.TILINGS[kernel] = Tiling(16 * M, warps, heads)
            be.device._ready[key] = module.get_function(key[0]), usual[1][1]
            for x in problem.results(name):
                x.view("uint16").fill(0x7FC0)  # NaN
            try:
                ms = milliseconds(getattr(problem, name))
            except Exception as error:  # too many threads or too much shared memory for this variant
                print(f"  {label}: {type(error).__name__} {str(error)[:80]}")
                continue
            right = "" if agree(problem.results(name), expected) else "  WRONG"
            rate = problem.needed[name] / ms / 1e9
            print(f"  {label}: {ms:.3f} ms, {rate:.0f} TFLOP/s, {registers} registers, {spilled} spilled{right}")
            found[label] = {"ms": ms, "right": not right}
    twins.TILINGS[kernel], be.device._ready[key] = usual
    getattr(problem, name)()


def hopper(problem, peak, found):
    """Each kernel for Hopper as it is and in its variants, against the result of mma's."""
    be, D = problem.be, problem.shape[4]
    default, twins.HOPPER = twins.HOPPER, {}
    folder = Path(tempfile.mkdtemp())
    options = (*kernels.OPTIONS, f"--gpu-architecture={be.device.target}", "-DREAL_bfloat16")

    def build(task):
        name, arguments, _ = task
        template = ", ".join(map(str, (D, *arguments)))
        text, edits = re.subn(rf" {name}<{D},[^>]*>", f" {name}<{template}>", kernels.assembled(HOPPER_FILES[name]))
        assert edits == 1
        path = folder / f"{name}-{'-'.join(map(str, arguments))}.cubin"
        path.write_bytes(be.device.compiler.compile(text, f"{name}.cu", options)[0])
        return path

    tasks = [(name, *variant) for (name, d), several in HOPPER_VARIANTS.items() if d == D for variant in several]
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(build, tasks))
    best = {}
    for (name, arguments, stages), path in zip(tasks, built, strict=True):
        key = f"attention_hopper_{name}_{D}", BFLOAT16
        getattr(problem, name)()
        expected = [x.copy() for x in problem.results(name)]
        if key not in be.device._ready:
            be.device._prepare(*key)
        usual = be.device._ready[key], twins.HOPPER_STAGES[name, D]
        be.device._ready[key] = cupy.RawModule(path=str(path)).get_function(key[0]), usual[0][1]
        twins.HOPPER_STAGES[name, D], twins.HOPPER = stages, {(name, D): 1}
        for x in problem.results(name):
            x.view("uint16").fill(0x7FC0)  # NaN
        label = f"hopper {name} {' '.join(map(str, arguments))}"
        assert twins._hopper(be, name, D, problem.shape[5]), label
        ms = milliseconds(getattr(problem, name))
        right = "" if agree(problem.results(name), expected) else "  WRONG"
        rate = problem.needed[name] / ms / 1e9
        print(f"{label}: {ms:.3f} ms, {rate:.0f} TFLOP/s, {rate / peak:.0%} of the product{right}", flush=True)
        found[label] = {"ms": ms, "tflops": rate, "right": not right}
        if not right:
            best[name] = min(ms, best.get(name, ms))
        be.device._ready[key], twins.HOPPER_STAGES[name, D] = usual
        twins.HOPPER = {}
    twins.HOPPER = default
    total = sum(best.values())
    print(f"hopper, the best of each: {total:.3f} ms, " + " ".join(f"{name} {ms:.3f}" for name, ms in best.items()))
    found["hopper"] = best


def ours(problem, peak, found):
    total = 0
    for name in problem.needed:
        ms = milliseconds(getattr(problem, name))
        total += ms
        rate = problem.needed[name] / ms / 1e9
        print(f"{name:<12}{ms:8.3f} ms {rate:6.0f} TFLOP/s {rate / peak:5.0%} of the product")
        found[name] = {"ms": ms, "tflops": rate, "share": rate / peak}
    rate = sum(problem.needed.values()) / total / 1e9
    print(f"{'all':<12}{total:8.3f} ms {rate:6.0f} TFLOP/s {rate / peak:5.0%} of the product")
    found["all"] = {"ms": total, "tflops": rate, "share": rate / peak}


def peer(problem, found):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T, H, G, D, window = problem.shape
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention)

    for label, heads in (("repeated heads", H), ("grouped heads", G)):
        q, do = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(B, heads, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for x in (q, k, v):
            x.requires_grad_(True)

        def forward(q=q, k=k, v=v, heads=heads):
            return attend(q, k, v, block_mask=mask, enable_gqa=heads != H)

        def both(do=do, forward=forward):
            forward().backward(do)

        with torch.no_grad():
            alone = torch_milliseconds(forward)
        whole = torch_milliseconds(both)
        ratios = alone / found["forward"]["ms"], whole / found["all"]["ms"]
        print(f"flex_attention, {label}: forward {alone:.3f} ms, forward and backward {whole:.3f} ms; "
              f"ours is {ratios[0]:.2f} and {ratios[1]:.2f} times as fast")  # fmt: skip
        found[f"flex {label}"] = {"forward_ms": alone, "both_ms": whole, "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--variants", action="store_true", help="time other instantiations and tilings of each kernel")
    parser.add_argument("--hopper", action="store_true", help="time the kernels for Hopper and variants of them")
    parser.add_argument("--peer", action="store_true", help="time PyTorch's flex_attention too")
    args = parser.parse_args()
    be, why = choose("cuda")
    peak = product_rate(be)
    print(f"{why}\nproduct of 8192 x 8192 x 8192: {peak:.0f} TFLOP/s")
    results = {"device": be.device.describe(), "product_tflops": peak}
    for shape in args.shape:
        found = results[shape] = {}
        problem = Problem(be, *SHAPES[shape])
        print(f"{shape}: " + " ".join(f"{n} {x}" for n, x in zip("BTHGDW", problem.shape, strict=True)))
        ours(problem, peak, found)
        if args.hopper:
            hopper(problem, peak, found)
        if args.variants:
            for name in problem.needed:
                variants(problem, name, peak, found)
        if args.peer:
            peer(problem, found)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
