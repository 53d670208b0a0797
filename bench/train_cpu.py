"""Training on a CPU, side by side with PyTorch: the same model, batch and optimiser, fp32.

    python -m venv .bench && . .bench/bin/activate && pip install -e ".[bench]"
    python bench/train_cpu.py                 # both shapes, 2 threads
    python bench/train_cpu.py --shape tiny    # one shape

Each side is a process of its own, warmed up, that times one group of steps whenever it is asked.  The
sides are asked in turn, so that a machine that slows down meanwhile slows down all of them; a side's
figure is the median of its groups.  PyTorch is taken at its best over GLA chunks of 16, 32 and 64,
eager and compiled.  The last line is JSON with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "window": 64,
             "vocab": 512, "seq_len": 256, "batch_size": 8},
    "base": {"width": 256, "layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 704, "window": 128,
             "vocab": 2048, "seq_len": 512, "batch_size": 8},
}
STEPS = {"tiny": 8, "base": 2}  # steps in a timed group
CHUNKS = (16, 32, 64)


def our_step(shape: str, threads: int):
    """A function that makes one training step of minisb, in this process -> loss."""
    import numpy as np

    from minisb.backend import choose
    from minisb.config import Config
    from minisb.model import SpikingBrain, specs
    from minisb.ops.adamw import grad_norm
    from minisb.optim import update
    from minisb.params import ParamStore
    from minisb.train import TrainSettings

    config = Config(**SHAPES[shape])
    be, _ = choose("cpu", "all", threads)
    model = SpikingBrain(config, be, ParamStore(specs(config), optimizer=True))
    model.store.initialise(0)
    settings = TrainSettings()
    rng = np.random.default_rng(0)
    pool = rng.integers(0, config.vocab, (8, config.batch_size, config.seq_len + 1))
    done = 0

    def step() -> float:
        nonlocal done
        batch = pool[done % len(pool)]
        done += 1
        model.store.zero_grad()
        loss = model.loss_and_backward(batch[:, :-1], batch[:, 1:])
        update(be, model.store, done, 1e-3, grad_norm(be, model.store.flat_g), settings)
        return loss

    return step


def serve(step, steps: int, tokens: int):
    """Warm up, say so, and from then on time a group of steps for each line read."""
    for _ in range(4):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        print(steps * tokens / (time.perf_counter() - start), flush=True)


class Side:
    """One side: a process that waits until it is asked for a group."""

    def __init__(self, *arguments):
        self.rates = []
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.process.stdout.readline() != "ready\n":
            sys.exit(f"this side did not start: {arguments}")

    def time_a_group(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rates.append(float(self.process.stdout.readline()))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def compare(shape: str, threads: int, groups: int) -> dict:
    """All sides at one shape -> tokens per second and ratios."""
    common = ["--shape", shape, "--threads", threads, "--serve"]
    commands = {"minisb": [HERE / "train_cpu.py", *common]} | {
        f"{mode} {chunk}": [HERE / "torch_train_cpu.py", *common, "--mode", mode, "--chunk", chunk]
        for mode in ("eager", "compile")
        for chunk in CHUNKS
    }
    at_once = max(1, os.cpu_count() // threads)
    print(f"  {shape}: starting {len(commands)} sides, {at_once} at a time; PyTorch compiles for minutes", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        sides = dict(zip(commands, pool.map(lambda command: Side(*command), commands.values()), strict=True))
    for _ in range(groups):
        for side in sides.values():
            side.time_a_group()
    for name, side in sides.items():
        side.process.stdin.close()
        side.process.wait()
        print(f"  {shape} {name:10} {side.rate:9,.0f} tokens/s   groups: "
              + " ".join(f"{rate:,.0f}" for rate in sorted(side.rates)))
    mine = sides["minisb"].rate
    best = {mode: max(sides[f"{mode} {chunk}"].rate for chunk in CHUNKS) for mode in ("eager", "compile")}
    return {"minisb": round(mine), **{mode: round(rate) for mode, rate in best.items()},
            **{f"ratio_{mode}": round(mine / rate, 2) for mode, rate in best.items()}}


def cpu_name() -> str:
    from minisb.doctor import processor  # here: each side must be able to start without the other's imports

    return processor()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", type=int, default=9, help="timed groups of each side")
    parser.add_argument("--serve", action="store_true", help="be our side of the comparison (used by this script)")
    args = parser.parse_args()
    if args.serve:
        shape = SHAPES[args.shape]
        serve(our_step(args.shape, args.threads), STEPS[args.shape], shape["batch_size"] * shape["seq_len"])
        return
    shapes = list(SHAPES) if args.shape == "all" else [args.shape]
    result = {shape: compare(shape, args.threads, args.groups) for shape in shapes}
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, {args.threads} threads, fp32")
    print(f"{'shape':6} {'minisb':>10} {'eager':>10} {'compile':>10}  tokens/s, and minisb over the peer")
    for shape, r in result.items():
        print(f"{shape:6} {r['minisb']:10,} {r['eager']:10,} {r['compile']:10,}  "
              f"{r['ratio_eager']:.2f}x eager, {r['ratio_compile']:.2f}x compiled")
    print(json.dumps({"cpu": cpu_name(), "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
