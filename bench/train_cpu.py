"""Training on a CPU, side by side with PyTorch: the same model, batch and optimiser, fp32.

    python -m venv .bench && . .bench/bin/activate && pip install -e ".[bench]"
    python bench/train_cpu.py                 # both shapes, 2 threads
    python bench/train_cpu.py --shape tiny    # one shape

Each side runs in a process of its own, warmed up, and reports the median of 5 timed groups of
steps.  PyTorch is taken at its best over GLA chunks of 16, 32 and 64, eager and compiled.  Ours runs
before and after the peer, so that a machine that slows down meanwhile is seen.  The last line is
JSON with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "window": 64,
             "vocab": 512, "seq_len": 256, "batch_size": 8},
    "base": {"width": 256, "layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 704, "window": 128,
             "vocab": 2048, "seq_len": 512, "batch_size": 8},
}
CHUNKS = (16, 32, 64)
GROUPS = 5


def ours(shape: str, threads: int, steps: int) -> dict:
    """Tokens per second of minisb in this process."""
    import numpy as np

    from minisb.backend import choose
    from minisb.config import Config
    from minisb.model import SpikingBrain, specs
    from minisb.ops.adamw import grad_norm
    from minisb.optim import update
    from minisb.params import ParamStore
    from minisb.train import TrainSettings

    config = Config(**SHAPES[shape])
    be, why = choose("cpu", "all", threads)
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

    rates, tokens = [], config.batch_size * config.seq_len
    for _ in range(3):
        step()
    for _ in range(GROUPS):
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        rates.append(steps * tokens / (time.perf_counter() - start))
    return {"tok_per_s": statistics.median(rates), "loss": loss, "why": why, "rates": [round(r) for r in rates]}


def run(*arguments) -> dict:
    """One side in a fresh process -> the JSON of its last line."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(shape: str, threads: int, steps: int) -> dict:
    """All sides at one shape -> tokens per second and ratios."""
    me = [HERE / "train_cpu.py", "--side", "ours", "--shape", shape, "--threads", threads, "--steps", steps]
    peer = HERE / "torch_train_cpu.py"
    rates = [run(*me)["tok_per_s"]]
    best = {}
    for mode in ("eager", "compile"):
        for chunk in CHUNKS:
            got = run(peer, "--shape", shape, "--mode", mode, "--chunk", chunk, "--threads", threads, "--json")
            print(f"  {shape} PyTorch {mode} chunk {chunk}: {got['tok_per_s']:,.0f} tokens/s", flush=True)
            best[mode] = max(best.get(mode, 0), got["tok_per_s"])
        rates.append(run(*me)["tok_per_s"])
        print(f"  {shape} minisb: {rates[-1]:,.0f} tokens/s", flush=True)
    mine = statistics.median(rates)
    return {"minisb": round(mine), "minisb_runs": [round(r) for r in rates],
            **{mode: round(rate) for mode, rate in best.items()},
            **{f"ratio_{mode}": round(mine / rate, 2) for mode, rate in best.items()}}


def cpu_name() -> str:
    from minisb.doctor import processor  # here: each side must be able to start without the other's imports

    return processor()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="steps in each of the 5 timed groups of our side")
    parser.add_argument("--side", choices=["ours"], help="run our side alone, in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args.shape, args.threads, args.steps)))
        return
    shapes = list(SHAPES) if args.shape == "all" else [args.shape]
    result = {shape: compare(shape, args.threads, args.steps) for shape in shapes}
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, {args.threads} threads, fp32")
    print(f"{'shape':6} {'minisb':>10} {'eager':>10} {'compile':>10}  tokens/s, and minisb over the peer")
    for shape, r in result.items():
        print(f"{shape:6} {r['minisb']:10,} {r['eager']:10,} {r['compile']:10,}  "
              f"{r['ratio_eager']:.2f}x eager, {r['ratio_compile']:.2f}x compiled")
    print(json.dumps({"cpu": cpu_name(), "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
