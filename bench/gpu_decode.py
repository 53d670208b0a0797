"""Tokens a second of decoding on a GPU: each step launched by Python, or recorded once and replayed.

    python bench/gpu_decode.py                         small and 135m; float, spikes, int8 (and int8 head and embedding)
    python bench/gpu_decode.py --model small --products   one model, and its products of a single row

Weights are random, batch 1, greedy; the prompt is longer than the window, so that caches are full.  Times are medians
of whole steps on the host, from a token to its logits there.  `replay` is what the GPU takes for recordings in a row.
`limit`: the bytes of all weights and of what is remembered, once, at the rate of a large copy.  --products times each
product of a token by cuBLAS and by cuda/matvec.cu with 1, 2 or 4 warps an output, many in one recording, on weights
that no cache holds.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from minisb.backend import choose, on_host  # noqa: E402
from minisb.config import preset  # noqa: E402
from minisb.generate import read_prompt  # noqa: E402
from minisb.model import SpikingBrain, specs  # noqa: E402
from minisb.params import ParamStore  # noqa: E402
from minisb.quantized import INT8, SCALES, empty_tensors, float_routers, input_names, store_of  # noqa: E402
from minisb.recorded_step import RecordedStep, can_record  # noqa: E402

PLAIN, RECORDED, REPLAYS = 30, 200, 50  # steps that are timed
KINDS = ("float", "spikes", "int8", "int8 all")


def float_model(config, be) -> SpikingBrain:
    store = ParamStore(specs(config), be.xp)
    store.initialise(0)
    return SpikingBrain(config, be, store)


def int8_model(config, be, embedding: bool) -> SpikingBrain:
    """Of random integers, scaled like the weights of a new model."""
    rng, tensors = np.random.default_rng(0), empty_tensors(specs(config), 128, embedding, float_routers(config))
    for name, x in tensors.items():
        if name.endswith(INT8):
            x[...] = rng.integers(-127, 128, x.shape, np.int8)
        elif name.endswith(SCALES):
            x[...] = 0.02 / 127
        else:
            x[...] = 1 if "norm" in name else 0.02 * rng.standard_normal(x.shape, np.float32)
    return SpikingBrain(config, be, store_of(tensors, dict.fromkeys(input_names(config), config.spike_k), be.xp))


def weight_bytes(model) -> int:
    """Of what a step reads whole: all but the embedding, if the head is another matrix."""
    store = model.store
    arrays = store.int8 | store.p if hasattr(store, "int8") else store.p
    unread = () if model.config.tied else ("embeddings.weight",)
    return sum(x.nbytes for name, x in arrays.items() if name not in unread)


def timed(step, token: int, count: int):
    """Median seconds of a step, and the logits after `count` of them."""
    seconds = []
    for _ in range(count + 3):
        start = time.perf_counter()
        logits = step(token)
        seconds.append(time.perf_counter() - start)
        token = int(logits.argmax())
    return statistics.median(seconds[3:]), logits


def measure(model, spike: bool) -> dict:
    be, c = model.be, model.config
    prompt = np.random.default_rng(1).integers(0, c.vocab, c.window + 40)
    states = [model.new_state() for _ in range(2)]
    token = int([read_prompt(model, prompt, state, spike) for state in states][0].argmax())
    plain, want = timed(lambda t: on_host(model.step(be.xp.asarray([t], "int32"), states[0], spike)[0]), token, PLAIN)
    found = {"plain_ms": plain * 1e3, "plain_tok_s": 1 / plain}
    if can_record(model):
        recorded = RecordedStep(model, states[1], spike)
        _, got = timed(lambda t: recorded([t])[0], token, PLAIN)
        found["same_bits"] = bool((got.view(np.uint8) == want.view(np.uint8)).all())
        seconds, _ = timed(lambda t: recorded([t])[0], token, RECORDED)
        found |= {"recorded_ms": seconds * 1e3, "recorded_tok_s": 1 / seconds, "replay_ms": replay(recorded)}
    found["bytes"] = weight_bytes(model) + states[1].nbytes
    return found


def replay(recorded) -> float:
    """Milliseconds of the GPU for one replay, of several in a row (the same token again and again)."""
    cuda = recorded.device.cupy.cuda
    start, end = cuda.Event(), cuda.Event()
    start.record()
    for _ in range(REPLAYS):
        recorded.repeat.graph.launch()
    end.record()
    end.synchronize()
    return cuda.get_elapsed_time(start, end) / REPLAYS


# --- products of one row


def products(be, config) -> list[dict]:
    """Microseconds of each product of a token in float32."""
    C, D = config.width, config.head_dim
    qkv = (config.heads + 2 * config.kv_heads) * D
    shapes = {
        "qkv": (qkv, C), "output": (C, config.heads * D), "gate and up": (2 * config.ffn, C), "down": (C, config.ffn),
        "gate": (config.kv_heads * D, config.gate_rank), "head": (config.vocab, C),
    }  # fmt: skip
    return [
        {"product": name, "O": O, "I": I, "bytes": 4 * O * I, **product(be, O, I)} for name, (O, I) in shapes.items()
    ]


def product(be, O: int, I: int) -> dict:
    copies = max(4, min(64, (256 << 20) // (4 * O * I)))  # more than the cache holds, or many
    weights = [be.xp.full((O, I), 0.01, "float32") for _ in range(copies)]
    x, y = be.xp.ones((1, I), "float32"), be.xp.empty((1, O), "float32")

    def ours(w, sharing):
        be.launch("matvec", w, -(-O * sharing // 4), 128, x, w, None, y, O, I, 0, sharing)

    found = {"cublas_us": recorded_us(be, [lambda w=w: be.gemm(x, w, out=y, tb=True) for w in weights])}
    for n in (1, 2, 4):
        found[f"matvec{n}_us"] = recorded_us(be, [lambda w=w, n=n: ours(w, n) for w in weights])
    return found


def recorded_us(be, calls) -> float:
    """Microseconds of one of many calls, one after the other in a recording."""

    def work():
        for call in calls:
            call()

    cuda, repeated = be.device.cupy.cuda, be.device.repeated(work)
    for _ in range(4):
        repeated()
    times = []
    for _ in range(9):
        start, end = cuda.Event(), cuda.Event()
        start.record()
        repeated.graph.launch()
        end.record()
        end.synchronize()
        times.append(cuda.get_elapsed_time(start, end))
    return 1e3 * statistics.median(times) / len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=["small", "135m"], help="presets (default: small 135m)")
    parser.add_argument("--kind", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--products", action="store_true", help="also each product of a token, by cuBLAS and by us")
    args = parser.parse_args()
    from gpu_timing import copy_rate

    be, why = choose("cuda")
    rate = copy_rate()
    print(f"{why}\ncopy {rate:.0f} GB/s, read and written\n")
    print(f"{'model':<8}{'kind':<10}{'MB':>7}{'limit ms':>10}{'plain ms':>10}{'recorded':>10}{'replay':>8}"
          f"{'tok/s':>8}{'plain':>7}{'of limit':>10}  bits")  # fmt: skip
    found, shapes = [], {}
    for name in args.model:
        config = preset(name)
        floats = float_model(config, be) if {"float", "spikes"} & set(args.kind) else None
        for kind in args.kind:
            model = floats if kind in KINDS[:2] else int8_model(config, be, kind == "int8 all")
            row = {"model": name, "kind": kind, **measure(model, kind == "spikes")}
            row["limit_ms"] = row["bytes"] / rate / 1e6
            found.append(row)
            print(
                f"{name:<8}{kind:<10}{row['bytes'] / 1e6:>7.0f}{row['limit_ms']:>10.3f}{row['plain_ms']:>10.3f}"
                f"{row['recorded_ms']:>10.3f}{row['replay_ms']:>8.3f}{row['recorded_tok_s']:>8.0f}"
                f"{row['plain_tok_s']:>7.0f}{row['limit_ms'] / row['recorded_ms']:>10.0%}"
                f"  {'equal' if row['same_bits'] else 'DIFFERENT'}",
                flush=True,
            )
        if args.products:
            shapes[name] = products(be, config)
            for row in shapes[name]:
                times = "  ".join(f"{key[:-3]} {row[key]:.2f}" for key in row if key.endswith("_us"))
                floor = row["bytes"] / rate / 1e3
                print(f"  {row['product']:<12}{row['O']:>6} x {row['I']:<6} limit {floor:.2f} us: {times}")
    print(json.dumps({"device": be.device.describe(), "copy_gb_s": rate, "rows": found, "products": shapes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
