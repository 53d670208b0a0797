"""A training step on one GPU, side by side with PyTorch: the same model, batch and optimiser, in mixed precision.

    python bench/gpu_train.py --row 101m --peer          ours, then the peer (bench/torch_train_gpu.py), and the ratio
    python bench/gpu_train.py --row 101m --profile       where the time goes, kernel by kernel
    python bench/gpu_train.py --row 101m 25m --cold      from the start of the process to the end of the first step
    MINISB_TUNE=1 python bench/gpu_train.py --row 25m    products by measured algorithms (minisb/tuned.py)

The peer wants PyTorch and flash-linear-attention: see its head.  Each side is a process of its own, so that memories do
not add.  A step is gradients to zero, forward and backward, the norm, AdamW; tokens are random and lie on the GPU.
Times are medians between CUDA events.  The share counts 6 FLOPs a parameter and token, the embedding once, as the
head.  Where a goal stands, the peer's figure was taken on that device, and a peer under 0.9 of it is not to be
quoted.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisb.config import Config, preset  # noqa: E402
from minisb.errors import MinisbError  # noqa: E402

HERE = Path(__file__).parent
PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200, as NVIDIA states them
WARM_UP = 3  # steps before timing, beside the first
BATCHES = 4  # random batches that steps take in turn
RESULT = "RESULT "

_101M = Config(preset="101m", vocab=32768, width=768, layers=12, heads=12, kv_heads=4, head_dim=64, ffn=2048,
               window=256, seq_len=1024, batch_size=32)  # fmt: skip
ROWS = {
    "101m": _101M,
    "101m-long": replace(_101M, window=1024, seq_len=8192, batch_size=4),
    "25m": replace(_101M, width=384, layers=8, heads=6, kv_heads=2, ffn=1024),
    "101m-full": replace(_101M, mixers=("full",)),
    "1b": preset("1b"),
}
#: What the peer reached once (tokens/s, device), and by how much it is to be beaten.
BARS = {
    "101m": (382e3, "H100", 1.3),
    "101m-long": (350e3, "H100", 1.3),
    "25m": (790e3, "H100", 1.5),
    "101m-full": (445e3, "H100", 1.1),
    "1b": (54.0e3, "H200", 1.15),
}


def describe(row: str) -> str:
    c = ROWS[row]
    mixers = "full attention" if c.mixers == ("full",) else f"{' and '.join(c.mixers)} in turn, W {c.window}"
    return (
        f"{row}: {c.layers} layers of {mixers}, C {c.width} H {c.heads} G {c.kv_heads} F {c.ffn} V {c.vocab}, "
        f"B {c.batch_size} T {c.seq_len}"
    )


def figures(c: Config, params: int, step_ms: list[float]) -> dict:
    """Of one way to run a step, from its times."""
    ms = statistics.median(step_ms)
    rate = 1e3 * c.batch_size * c.seq_len / ms
    return {
        "step_ms": round(ms, 3),
        "fastest_ms": round(min(step_ms), 3),
        "slowest_ms": round(max(step_ms), 3),
        "tok_per_s": round(rate),
        "share_of_989": round(6 * params * rate / PEAK, 4),
    }


def spread(name: str, f: dict) -> str:
    return (
        f"  {name:<28}{f['step_ms']:9.2f} ms ({f['fastest_ms']:.2f} to {f['slowest_ms']:.2f}) "
        f"{f['tok_per_s']:10,} tokens/s {f['share_of_989']:6.1%} of 989 TFLOP/s"
    )


# --- our side, in a process of its own


class Step:
    """A training step of minisb on a GPU.  No number is looked at, so Python runs ahead."""

    def __init__(self, config: Config, be, dtype: str):
        import numpy as np

        from minisb.kernels import element
        from minisb.model import SpikingBrain, specs
        from minisb.optim import LossScale
        from minisb.params import ParamStore, count
        from minisb.train import TrainSettings

        self.be, self.params, self.done = be, count(specs(config)), 0
        store = ParamStore(specs(config), be.xp, optimizer=True, activations=element(dtype))
        store.initialise(0)
        self.model, self.settings = SpikingBrain(config, be, store), TrainSettings()
        self.loss_scale = LossScale(be.xp, dtype == "float16")
        drawn = np.random.default_rng(0).integers(0, config.vocab, (BATCHES, config.batch_size, config.seq_len + 1))
        drawn = be.xp.asarray(drawn.astype(np.int32))
        self.batches = [(b[:, :-1].copy(), b[:, 1:].copy()) for b in drawn]
        self.compute = self.gradients

    def gradients(self, x, y, spiking: bool):
        from minisb.ops.adamw import grad_norm

        self.model.store.zero_grad()
        loss = self.model.loss_and_backward(x, y, spiking, self.loss_scale.value)
        return loss, grad_norm(self.be, self.model.store.flat_g) / self.loss_scale.value

    def record(self):
        """From now on a step's gradients are recorded once and replayed -> what holds the recording."""
        self.compute = self.be.recorded(self.gradients)
        return self.compute

    def __call__(self, spiking: bool = False):
        from minisb.optim import update

        loss, norm = self.compute(*self.batches[self.done % BATCHES], spiking=spiking)
        self.done += 1
        update(self.be, self.model.store, self.done, 1e-3, norm, self.settings, self.loss_scale.value)
        self.loss_scale.follow(norm)
        return loss


def step_times(cuda, step, steps: int) -> list[float]:
    """ms of each of `steps` steps after a warm-up, between events, without a wait in between."""
    for _ in range(WARM_UP):
        step()
    events = [cuda.Event() for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [cuda.get_elapsed_time(*pair) for pair in zip(events, events[1:], strict=False)]


def limits(be) -> dict:
    """What this GPU reaches: a large copy, read and written, and a product of 8192 cubed in the activations' type."""
    from gpu_profile import Profile

    from minisb.kernels import element

    xp, n, found = be.xp, 8192, {}
    a, b = (xp.random.standard_normal((n, n), dtype="float32").astype(element(be.activations)) for _ in range(2))
    out, big = xp.empty_like(a), xp.zeros(1 << 27, "float32")
    other = xp.empty_like(big)
    for name, call, work in (
        ("copy_gb_s", lambda: xp.copyto(other, big), 2 * big.nbytes / 1e6),
        ("product_tflop_s", lambda: be.gemm(a, b, out=out, tb=True), 2 * n**3 / 1e9),
    ):
        probe = Profile(be)
        for _ in range(13):
            probe._record(name, 0, 0, call)
        xp.cuda.Device().synchronize()
        times = [xp.cuda.get_elapsed_time(r.start, r.end) for r in probe.records[3:]]
        found[name] = round(work / statistics.median(times), 1)
    return found


def gib(size: int) -> float:
    return round(size / 2**30, 2)


class Memory:
    """GiB at their highest: arrays alive (seen at launches of one step), CuPy's pools, and the GPU as a whole."""

    def __init__(self, be):
        self.be, self.alive = be, 0

    def watch(self, step):
        pool, launch = self.be.xp.get_default_memory_pool(), self.be.launch

        def watched(*args, **options):
            self.alive = max(self.alive, pool.used_bytes())
            launch(*args, **options)

        self.be.launch = watched
        step()
        del self.be.launch

    def figures(self, *pools) -> dict:
        memory = self.be.device.memory()
        pool = memory["pool"] + sum(p.total_bytes() for p in pools)
        return {
            "alive_gib": gib(self.alive),
            "pool_gib": gib(pool),
            "device_gib": gib(memory["total"] - memory["free"]),
        }


def ours(row: str, args) -> dict:
    """Everything about our side of a row; what it finds is printed as it comes."""
    since = lambda: round(time.time() - args.began, 2)  # noqa: E731
    from minisb.backend import choose

    config = ROWS[row]
    be, why = choose("cuda")
    dtype = args.dtype or be.activations
    cold = {"imports_and_device_s": since()}
    with be.stream():
        step = Step(config, be, dtype)
        cold["weights_s"] = since()
        loss = float(step())
        cold["first_step_s"] = since()
        print(f"  {why}\n  {step.params:,} parameters, {dtype}; first loss {loss:.3f}")
        print(f"  seconds since the process began: {cold}", flush=True)
        found = {"device": be.device.describe(), "dtype": dtype, "params": step.params, "cold": cold, "loss": loss}
        if not args.steps:
            return found
        found |= _timed(config, be, step, args)
        gc.collect()  # the recording goes, with the memory that it holds
        be.xp.get_default_memory_pool().free_all_blocks()
        found["limits"] = limits(be)
        flops = 6e-12 * step.params * found[found["best"]]["tok_per_s"]
        found["share_of_measured"] = round(flops / found["limits"]["product_tflop_s"], 4)
        print(f"  limits: {found['limits']}; {found['share_of_measured']:.1%} of the large product's rate")
        if args.profile:
            _profile(be, step, args, found)
    return found


def _timed(config: Config, be, step: Step, args) -> dict:
    cuda, memory, found = be.xp.cuda, Memory(be), {}

    def time_it(name, spiking):
        found[name] = figures(config, step.params, step_times(cuda, lambda: step(spiking), args.steps))
        print(spread(name, found[name]), flush=True)

    step()
    cuda.Device().synchronize()
    start = time.perf_counter()
    step()
    issued = time.perf_counter() - start
    if args.graph != "on":
        time_it("step by step", False)
        memory.watch(step)
        found["memory"] = memory.figures()
        if args.spikes:
            time_it("step by step, spikes", True)
    found["issue_ms"] = round(1e3 * issued, 2)
    print(f"  Python needs {found['issue_ms']} ms to issue a step")
    if args.graph != "off":
        try:
            be.xp.get_default_memory_pool().free_all_blocks()
            recording = step.record()
            time_it("recorded", False)
            found["memory_recorded"] = memory.figures(recording.pool)
            if args.spikes:
                time_it("recorded, spikes", True)
        except Exception as error:  # the other figures are worth having
            found["graph_error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"  not recorded: {found['graph_error']}")
    step.compute = step.gradients
    for name in ("memory", "memory_recorded"):
        if name in found:
            print(f"  {name.replace('_', ', ')}: " + ", ".join(f"{k} {v}" for k, v in found[name].items()))
    found["best"] = min((k for k in ("step by step", "recorded") if k in found), key=lambda k: found[k]["step_ms"])
    return found


def _profile(be, step: Step, args, found: dict):
    """Profiles are of steps launched one by one: a recording is one launch."""
    from gpu_profile import Profile

    rows = {}
    for name, spiking in (("float", False), ("spikes", True)):
        if args.profile not in (name, "both"):
            continue
        for _ in range(2):  # the GPU is busy with the second while the profiled one is issued
            step(spiking)
        with Profile(be, step.model) as profile:
            step(spiking)
        be.xp.cuda.Device().synchronize()
        print(f"\n== {name}\n{profile.table(found['limits']['copy_gb_s'], found['limits']['product_tflop_s'])}\n")
        rows[name] = profile.rows()
    if args.json:
        Path(args.json).write_text(json.dumps(rows) + "\n")


# --- both sides


def run_side(command: list[str], environment: dict) -> dict:
    """Run one side, show what it prints, and return its result, or {"error": its last lines}."""
    began, tail = time.time(), []
    command = [sys.executable, *command, "--began", str(began)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as side:
        for line in side.stdout:
            if line.startswith(RESULT):
                return json.loads(line[len(RESULT) :])
            tail = [*tail[-12:], line.rstrip()]
            print(line, end="", flush=True)
    return {"error": tail[-3:]}


def empty_caches(folder: str) -> dict:
    """The environment with every cache of compiled code in an empty folder."""
    names = ("MINISB_CACHE", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {**os.environ, **{name: f"{folder}/{name.lower()}" for name in names}}


def measure(row: str, args) -> dict:
    """Both sides of a row, one after the other."""
    common = ["--row", row, "--steps", str(args.steps)]
    mine = [str(HERE / "gpu_train.py"), "--side", *common, "--graph", args.graph]
    mine += ["--dtype", args.dtype] if args.dtype else []
    mine += ["--no-spikes"] * (not args.spikes) + (["--profile", args.profile] if args.profile else [])
    mine += ["--json", args.json] if args.json else []
    result = {"row": row}
    with tempfile.TemporaryDirectory() if args.cold else contextlib.nullcontext() as folder:
        environment = {**(empty_caches(folder) if args.cold else os.environ), "PYTHONUNBUFFERED": "1"}
        if args.cold:  # the measured process then finds the caches warm
            print("ours, empty caches", flush=True)
            result["empty_cache"] = run_side([*mine, "--steps", "0"], environment).get("cold")
        print("ours", flush=True)
        result["ours"] = run_side(mine, environment)
        if args.peer:
            print("PyTorch", flush=True)
            peer = [str(HERE / "torch_train_gpu.py"), *common, "--ways", *args.ways]
            result["peer"] = run_side([*peer, *["--profile"] * bool(args.profile)], environment)
    return result | compare(row, result)


def compare(row: str, result: dict) -> dict:
    """Ratios, where both figures are there."""
    bar, device, goal = BARS[row]
    mine, peer = result["ours"], result.get("peer", {})
    found = {"goal": goal, "bar": bar, "bar_device": device}
    best = mine.get(mine.get("best"), {})
    if best:
        found["ours_over_bar"] = round(best["tok_per_s"] / bar, 3)
    if best and "tok_per_s" in peer:
        found["ratio"] = round(best["tok_per_s"] / peer["tok_per_s"], 3)
    if "tok_per_s" in peer and device in peer["device"]:
        found["peer_over_bar"] = round(peer["tok_per_s"] / bar, 3)
        found["peer_is_fair"] = found["peer_over_bar"] >= 0.9
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--row", nargs="+", choices=ROWS, default=["101m"])
    add("--peer", action="store_true", help="also time PyTorch")
    add("--ways", nargs="+", default=["whole"], help="ways of the peer, the best counts (see torch_train_gpu.py)")
    add("--steps", type=int, default=20, help="timed steps; 0: only the first step")
    add("--graph", choices=("on", "off", "both"), default="both", help="record the step and replay it")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of activations (default: the GPU's own)")
    add("--no-spikes", dest="spikes", action="store_false", help="leave out the extra figure with spikes")
    add("--cold", action="store_true", help="also from empty caches of compiled code")
    add("--profile", nargs="?", const="float", choices=("float", "spikes", "both"), help="the table by kernel")
    add("--json", metavar="FILE", help="write the profile's rows there")
    add("--side", action="store_true", help=argparse.SUPPRESS)
    add("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = parser().parse_args()
    if args.side:
        try:
            print(RESULT + json.dumps(ours(args.row[0], args)))
        except MinisbError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    results = []
    for row in args.row:
        print(f"\n{describe(row)}", flush=True)
        results.append(measure(row, args))
        print({k: v for k, v in results[-1].items() if k not in ("ours", "peer", "row")}, flush=True)
    print(json.dumps(results if len(results) > 1 else results[0]))
    return 0 if not any("error" in r["ours"] or "error" in r.get("peer", {}) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
