"""The peer: minisb's hybrid model trained by PyTorch on a CPU, written to be fast there.

One configuration per process, fp32 throughout; the model is torch_model_cpu.py's:

    python bench/torch_train_cpu.py --shape tiny --mode compile --chunk 64 --json
    python bench/torch_train_cpu.py --check          # chunked GLA against the plain recurrence
"""

import argparse
import ctypes
import functools
import itertools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_model_cpu import (
    GATE_DIVISOR,
    SHAPES,
    Model,
    Shape,
    block_bias,
    chunk_exponents,
    gla_chunked,
    gla_recurrent,
    window_attention,
)

# --- timing -------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Make glibc recycle large blocks instead of returning them to the kernel at every free.

    Otherwise each step faults its activations in again: about 5 % of an eager step of `base`.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc: the allocator stays as it is
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


class Trainer:
    """Model, optimizer and a pool of random batches; step() is one full training step."""

    def __init__(self, s: Shape, mode: str, chunk: int, pool: int = 64):
        model = Model(s, chunk)
        self.params = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-3, fused=True)
        self.loss = torch.compile(model, fullgraph=True) if mode == "compile" else model
        self.batches = itertools.cycle(torch.randint(s.V, (pool, 2, s.B, s.T)))

    def step(self) -> float:
        loss = self.loss(*next(self.batches))
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def measure(shape: str, mode: str, chunk: int, steps: int, say) -> dict:
    s = SHAPES[shape]
    trainer = Trainer(s, mode, chunk)
    start = time.perf_counter()
    trainer.step()
    say(f"first step, with compilation if any: {time.perf_counter() - start:.1f} s")
    for _ in range(3):
        trainer.step()
    groups = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(steps):
            loss = trainer.step()
        groups.append((time.perf_counter() - start) / steps)
        say(f"{groups[-1] * 1e3:9.1f} ms/step {s.B * s.T / groups[-1]:9.0f} tok/s")
    seconds = statistics.median(groups)
    return {"shape": shape, "mode": mode, "chunk": chunk} | {
        "tok_per_s": round(s.B * s.T / seconds, 1),
        "step_ms": round(seconds * 1e3, 2),
        "params": sum(p.numel() for p in trainer.params),
        "loss": round(loss, 4),
    }


def serve(shape: str, mode: str, chunk: int, steps: int) -> None:
    """Warm up, say so, and from then on time a group of steps for each line read."""
    s = SHAPES[shape]
    trainer = Trainer(s, mode, chunk)
    for _ in range(4):
        trainer.step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        print(steps * s.B * s.T / (time.perf_counter() - start), flush=True)


# --- check --------------------------------------------------------------------------------


def agree(name: str, function, definition, inputs: list[Tensor], limit: float) -> bool:
    """Compare outputs and all input gradients of two functions by relative RMS."""
    results = []
    for f in (function, definition):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = f(*leaves)
        upstream = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
        results.append([o.detach(), *torch.autograd.grad(o, leaves, upstream)])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    ok = all(e < limit for e in errors)  # False for NaN
    print(f"{'ok  ' if ok else 'FAIL'} {name:30}", " ".join(f"{e:.1e}" for e in errors))
    return ok


def check() -> bool:
    """Every rewritten piece against its definition, forward and gradients, fp64 and fp32."""
    B, T, H, G, D, W = 2, 128, 4, 2, 16, 32
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < W)
    ok = True

    def whole_window(*heads: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in heads)
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        q, k, v, raw = (torch.randn(B, T, heads, D, dtype=dtype) for heads in (H, G, G, G))
        tag = str(dtype).removeprefix("torch.")
        for gates, logit in (("ordinary", raw), ("strong", 5 * raw - 10)):
            inputs = [F.relu(q) * D**-0.5, F.relu(k), v, F.logsigmoid(logit) / GATE_DIVISOR]
            for chunk in (16, 32, 64):
                exponents = chunk_exponents(chunk).to(dtype)
                chunked = functools.partial(gla_chunked, exponents=exponents)
                ok &= agree(f"gla {chunk} {gates} {tag}", chunked, gla_recurrent, inputs, limit)
        bias = block_bias(T, W, W // 2).to(dtype)
        blocked = functools.partial(window_attention, bias=bias)
        ok &= agree(f"window {tag}", blocked, whole_window, [q, k, v], limit)
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--mode", choices=["eager", "compile"], default="compile")
    parser.add_argument("--chunk", type=int, choices=[16, 32, 64], default=64, help="GLA chunk length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="steps in each of the 5 groups (tiny 8, base 2)")
    parser.add_argument("--json", action="store_true", help="print only the result line")
    parser.add_argument("--serve", action="store_true", help="time a group for each line read (bench/train_cpu.py)")
    parser.add_argument("--check", action="store_true", help="compare with the definitions and exit")
    a = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    if a.check:
        sys.exit(0 if check() else 1)
    steps = a.steps or {"tiny": 8, "base": 2}[a.shape]
    if a.serve:
        serve(a.shape, a.mode, a.chunk, steps)
        return
    say = (lambda line: None) if a.json else print
    print(json.dumps(measure(a.shape, a.mode, a.chunk, steps, say)))


if __name__ == "__main__":
    main()
