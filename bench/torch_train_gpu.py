"""The peer: minisb's hybrid model trained by PyTorch on a GPU, written to be fast there.

    python bench/torch_train_gpu.py --row 101m                    one row of bench/gpu_train.py, JSON last
    python bench/torch_train_gpu.py --row 101m --ways whole max plain fla-loss     several ways, the best counts
    python bench/torch_train_gpu.py --check                       the same model as minisb's: losses and gradients

It wants PyTorch 2.11 and, for linear attention, flash-linear-attention 0.6.0, of which the package `fla-core` is enough
(with einops and packaging).  Parameters are float32, products bfloat16 by autocast, the optimiser is fused AdamW, the
model compiled.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F
from gpu_train import BATCHES, PEAK, RESULT, ROWS, WARM_UP, Config, describe, gib
from torch import Tensor, nn
from torch_model_gpu import Model, gla_definition, gla_operator, gla_plain, make_mask
from torch_train_cpu import agree

#: Ways to run a step.  compile: what torch.compile gets, None for a layer at a time.  gla: "op" makes fla's forward and
#: backward one operator that the compiler sees whole, "plain" calls chunk_gla, which breaks the graph in two.
#: loss: "plain" (logits whole) or fla's "fused" linear cross-entropy.  stream: dtype of the residual stream.
WHOLE = {"compile": {"fullgraph": True}, "gla": "op", "loss": "plain", "stream": "bfloat16"}
WAYS = {
    "whole": WHOLE,
    "max": {**WHOLE, "compile": {"fullgraph": True, "mode": "max-autotune-no-cudagraphs"}},
    "graphs": {**WHOLE, "compile": {"fullgraph": True, "mode": "reduce-overhead"}},
    "layer": {**WHOLE, "compile": None},
    "plain": {**WHOLE, "compile": None, "gla": "plain"},
    "fla-loss": {**WHOLE, "loss": "fused"},
    "wide-stream": {**WHOLE, "stream": "float32"},
}


# --- a step


class Trainer:
    """Model, optimiser and random batches on the GPU; step() is one full training step."""

    def __init__(self, c: Config, way: dict, device: str = "cuda"):
        self.fused_loss = way["loss"] == "fused"
        with torch.device(device):
            gla = {"op": gla_operator, "plain": gla_plain}[way["gla"]]
            self.model = Model(c, gla(), getattr(torch, way["stream"]), self.fused_loss)
            self.model.initialise()
            batches = torch.randint(c.vocab, (BATCHES, 2, c.batch_size, c.seq_len))
        self.params = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.params if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in self.params if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
        self.batches, self.mask = itertools.cycle(batches), make_mask(c, device)
        if way["compile"] is None:
            for layer in self.model.layers:
                layer.compile()
            self.model.head = torch.compile(self.model.head)
            self.run = self.model
        else:
            self.run = torch.compile(self.model, **way["compile"])

    def __call__(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        tokens, targets = next(self.batches)
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.run(tokens, targets, self.mask)
            if self.fused_loss:
                loss = self._fused(loss, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def _fused(self, x, targets):
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

        return fused_linear_cross_entropy_loss(x.flatten(0, 1), targets.flatten(), self.model.embed.weight.to(x.dtype))


def measure(c: Config, way: dict, steps: int, since, profile: bool) -> dict:
    """One way to run a row's step: times, memory, and what the first step took."""
    torch.cuda.reset_peak_memory_stats()
    began = since()
    trainer = Trainer(c, way)
    loss = float(trainer())
    found = {"params": sum(p.numel() for p in trainer.params), "loss": round(loss, 3)}
    found["cold"] = {"setup_began_s": began, "first_step_s": since()}
    print(f"    first loss {loss:.3f}, seconds since the process began: {found['cold']}", flush=True)
    for _ in range(WARM_UP + 2):
        trainer()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        trainer()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    ms = statistics.median(times)
    rate = 1e3 * c.batch_size * c.seq_len / ms
    free, total = torch.cuda.mem_get_info()
    found |= {
        "step_ms": round(ms, 3),
        "fastest_ms": round(min(times), 3),
        "slowest_ms": round(max(times), 3),
        "tok_per_s": round(rate),
        "share_of_989": round(6 * found["params"] * rate / PEAK, 4),
        "memory": {
            "alive_gib": gib(torch.cuda.max_memory_allocated()),
            "pool_gib": gib(torch.cuda.max_memory_reserved()),
            "device_gib": gib(total - free),
        },
    }
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            trainer()
            torch.cuda.synchronize()
        print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70))
    return found


def compare_ways(row: str, args) -> dict:
    """Every way in turn, a broken one named and left out -> the best, with all of them under "ways"."""
    since = lambda: round(time.time() - args.began, 2)  # noqa: E731
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # layers of one class share a code object
    device = torch.cuda.get_device_properties(0)
    name = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, PyTorch {torch.__version__}"
    print(f"  {name}; {describe(row)}")
    found = {}
    for way in args.ways:
        print(f"  {way}", flush=True)
        try:
            found[way] = f = measure(ROWS[row], WAYS[way], args.steps, since, args.profile)
            print(f"    {f['step_ms']:9.2f} ms ({f['fastest_ms']:.2f} to {f['slowest_ms']:.2f}) {f['tok_per_s']:10,} "
                  f"tokens/s {f['share_of_989']:6.1%} of 989 TFLOP/s, memory {f['memory']}", flush=True)  # fmt: skip
        except Exception:  # the other ways are worth having
            print("    failed: " + "\n    ".join(traceback.format_exc().strip().splitlines()[-12:]), flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if not found:
        sys.exit("no way of the peer ran")
    best = max(found, key=lambda way: found[way]["tok_per_s"])
    rates = {way: f["tok_per_s"] for way, f in found.items()}
    return {"device": name, **found[best], "best": best, "ways": rates}


# --- check: the same model, the same functions

#: A parameter of the peer -> minisb's, one above the other.
JOINED = {
    "attn.in_proj.weight": [f"attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "gk_proj.0")],
    "attn.qkv_bias": [f"attn.{n}.bias" for n in ("q_proj", "k_proj", "v_proj")],
    "attn.gate_up.weight": ["attn.gk_proj.1.weight"],
    "attn.gate_up.bias": ["attn.gk_proj.1.bias"],
    "attn.head_norm.weight": ["attn.g_norm.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}


def from_minisb(arrays: dict, names) -> dict[str, Tensor]:
    """minisb's parameters (or gradients) by name -> the peer's, for its names."""
    import numpy as np

    found = {}
    for name in names:
        layer, sep, rest = name.rpartition(".attn.") if ".attn." in name else name.rpartition(".mlp.")
        own = JOINED.get(f"{sep[1:]}{rest}")
        wanted = [f"{layer}.{part}" for part in own] if own else [name.replace("embed.", "embeddings.")]
        found[name] = torch.from_numpy(np.concatenate([arrays[w] for w in wanted if w in arrays]))
    return found


def small(**changes) -> Config:
    shape = {"vocab": 96, "width": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 80, "window": 20}
    return Config(**{**shape, "seq_len": 70, "batch_size": 2, **changes})


def theirs(c: Config, dtype):
    """minisb's own numbers: parameters, loss and gradients of one batch."""
    import numpy as np

    from minisb.backend import Backend
    from minisb.model import SpikingBrain, specs
    from minisb.params import ParamStore

    model = SpikingBrain(c, Backend(2), ParamStore(specs(c), dtype=dtype))
    model.store.initialise(0)
    rng = np.random.default_rng(1)
    model.store.flat_p += (0.1 * rng.standard_normal(model.store.size)).astype(dtype)
    tokens, targets = rng.integers(0, c.vocab, (2, c.batch_size, c.seq_len))
    loss = model.loss_and_backward(tokens, targets)
    return model.store, torch.from_numpy(tokens), torch.from_numpy(targets), float(loss)


def same_model(name: str, c: Config, limit: float, device: str = "cpu", gla=gla_definition) -> bool:
    """Loss and every gradient against minisb's: on a CPU in float64 by definitions, on a GPU as it is timed."""
    half = device == "cuda"
    store, tokens, targets, want = theirs(c, "float32" if half else "float64")
    model = Model(c, gla, torch.bfloat16 if half else None)
    names = [n for n, _ in model.named_parameters()]
    if not half:
        model.double()
    model.load_state_dict(from_minisb(store.p, names))
    model.to(device)
    run = torch.compile(model, fullgraph=True) if half else model
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        loss = run(tokens.to(device), targets.to(device), make_mask(c, device))
    loss.backward()
    loss = float(loss.detach())
    expected = from_minisb(store.g, names)
    off = {n: float((p.grad.cpu() - expected[n]).norm() / expected[n].norm()) for n, p in model.named_parameters()}
    worst = max(off, key=lambda n: off[n] if off[n] == off[n] else float("inf"))
    ok = abs(loss - want) < limit * want and off[worst] < limit * (10 if half else 1)
    word = "ok  " if ok else "FAIL"
    print(f"{word} {name:30} loss {loss:.9f} and {want:.9f}, worst gradient {off[worst]:.1e} ({worst})")
    return ok


def check() -> bool:
    """float64 on a CPU; with fla (on a GPU, or interpreted) its operator; on a GPU the compiled bf16 model."""
    torch.manual_seed(0)
    ok = same_model("hybrid", small(), 1e-6)
    ok &= same_model("hybrid, no bias, other theta", small(qkv_bias=False, rope_theta=5e5, norm_eps=1e-5), 1e-6)
    ok &= same_model("full attention", small(mixers=("full",)), 1e-6)
    gpu = torch.cuda.is_available()
    if gpu or os.environ.get("TRITON_INTERPRET"):
        device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        B, T, H, G, D = 1, 100, 4, 2, 64 if gpu else 16
        q, k, v, z = (torch.randn(B, T, n, D, device=device) for n in (H, G, G, G))
        inputs = [x.to(dtype) for x in (F.relu(q), F.relu(k), v, F.logsigmoid(z) / 16)]
        limit = 1e-2 if gpu else 1e-5
        widened = lambda *x: gla_definition(*(part.float() for part in x)).to(x[0].dtype)  # noqa: E731
        agreed = functools.partial(agree, inputs=inputs, limit=limit)
        for name, function in (("fla's chunk_gla", gla_plain()), ("fla's chunk_gla as an operator", gla_operator())):
            ok &= agreed(name, _with_cpu_upstream(function), _with_cpu_upstream(widened))
    if gpu:
        wider = small(head_dim=64, width=256, vocab=512, seq_len=256, window=100)
        ok &= same_model("compiled, bf16", wider, 1e-2, "cuda", gla_operator())
        ok &= same_model("compiled, bf16, full", small(mixers=("full",), head_dim=64, width=256), 1e-2, "cuda")
    return ok


def _with_cpu_upstream(function):
    """agree draws the upstream gradient on the CPU, so the result goes there."""
    return lambda *inputs: function(*inputs).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--row", choices=ROWS, default="101m")
    add("--ways", nargs="+", choices=WAYS, default=["whole"], help="ways to run a step; the fastest counts")
    add("--steps", type=int, default=20)
    add("--profile", action="store_true", help="PyTorch's own table of kernels")
    add("--check", action="store_true", help="compare with minisb and with the definitions, and exit")
    add("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if check() else 1)
    print(RESULT + json.dumps(compare_ways(args.row, args)))


if __name__ == "__main__":
    main()
