"""What a configuration costs, by arithmetic alone: parameters, bytes, FLOPs.  Allocates nothing.

Letters as in config.py: C width, H query heads, G key/value heads, D head size, F feed-forward
width, V vocabulary, W window, L layers, E experts, K of them a token, S sinks; T tokens of context.
A multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from minisb.config import Config
from minisb.model import specs
from minisb.ops.w8aspike import GROUP
from minisb.params import Spec, count
from minisb.quantized import GATE_PAIR, float_routers, matrix_shapes, scale_groups

#: Contexts of the decoding tables.
CONTEXTS = {"4k": 4096, "128k": 131072, "1M": 1048576}
FP32, BF16 = 4, 2


def report(c: Config) -> dict:
    """Everything below as one dictionary of plain numbers and strings, ready for JSON."""
    return {
        "preset": c.preset,
        "config": c.to_dict(),
        "parameters": parameters(c),
        "other_projections": other_projections(c),
        "layer_kinds": layer_kinds(c),
        "weight_bytes": weight_bytes(c),
        "optimizer_bytes": optimizer_bytes(c),
        "decode_state_bytes": {
            "fp32_cache": {name: decode_state_bytes(c, t, FP32) for name, t in CONTEXTS.items()},
            "bf16_cache": {name: decode_state_bytes(c, t, BF16) for name, t in CONTEXTS.items()},
        },
        "flops_per_token": {
            "training": {"context": c.seq_len, **training_flops(c)},
            "decoding": {name: decoding_flops(c, t) for name, t in CONTEXTS.items()},
        },
    }


# --- parameters


def parameters(c: Config) -> dict:
    """Counts: total, active (what one token goes through: K of E routed experts), by part (embedding, mixers by
    kind, ffn, norms, head, ...), and each layer's sum.

    A tied head is the embedding and counts once, there.
    """
    parts, layers = Counter(), Counter()
    for spec in specs(c):
        parts[_part(c, spec)] += spec.size
        if spec.name.startswith("layers."):
            layers[int(spec.name.split(".")[1])] += spec.size
    total = sum(parts.values())
    active = total - parts["experts"] // c.experts * (c.experts - c.top_k)
    by_part = {part: n for part, n in parts.items() if n}
    return {"total": total, "active": active, "by_part": by_part, "by_layer": [layers[i] for i in range(c.layers)]}


def other_projections(c: Config) -> dict | None:
    """The counts of a parallel hybrid if its branches shared (or did not share) their projections; else None.

    The report's name and "15 %" fit shared ones, its "additional attention parameters" separate ones.
    """
    if not any("+" in c.mixer(i) for i in range(c.layers)):
        return None
    found = parameters(replace(c, shared_projections=not c.shared_projections))
    which = "separate" if c.shared_projections else "shared"
    return {"which": which, "total": found["total"], "active": found["active"]}


def layer_kinds(c: Config) -> dict:
    """Kind of mixer, and "+moe" with experts -> its layers, the tensors of one such layer (names, shapes), its
    parameters."""
    kinds = {}
    everything = specs(c)
    for i in range(c.layers):
        kind = c.mixer(i) + "+moe" * (c.ffn_kind(i) == "moe")
        if kind in kinds:
            kinds[kind]["layers"].append(i)
            continue
        prefix = f"layers.{i}."
        own = [spec for spec in everything if spec.name.startswith(prefix)]
        tensors = [{"name": s.name.removeprefix(prefix), "shape": list(s.shape), "parameters": s.size} for s in own]
        kinds[kind] = {"layers": [i], "parameters": count(own), "tensors": tensors}
    return kinds


def _part(c: Config, spec: Spec) -> str:
    """The part of the model that a parameter belongs to."""
    if spec.name.startswith("embeddings"):
        return "embedding"
    if spec.name.startswith("sinks"):
        return "sinks"
    if spec.name.startswith("lm_head"):
        return "head"
    if spec.name.split(".")[-2] in ("attn_norm", "mlp_norm", "norm"):  # g_norm belongs to its mixer
        return "norms"
    for part in ("experts", "shared", "router"):
        if f".mlp.{part}." in spec.name:
            return part
    return "ffn" if ".mlp." in spec.name else c.mixer(int(spec.name.split(".")[1]))


# --- bytes


def weight_bytes(c: Config) -> dict:
    """Bytes of the weights: fp32 (4 a parameter), bf16 (2), and as `python -m minisb quantize` writes them.

    int8: matrices inside the layers take 1 byte a weight and one fp32 scale per output row and 128 inputs (the last
    group of a row may be shorter); the gate's low-rank pair is multiplied out into one.  Embedding, head, norms and
    biases stay in fp32.  int8_embedding (--quantize-embedding): so are embedding and head, with one scale a row.
    """
    n = count(specs(c))
    int8 = {"int8": _quantized_bytes(c, False), "int8_embedding": _quantized_bytes(c, True)}
    return {"fp32": n * FP32, "bf16": n * BF16, **int8}


def _quantized_bytes(c: Config, embedding: bool) -> int:
    everything, found = specs(c), 0
    matrices = matrix_shapes(everything, embedding, float_routers(c))
    for name, (*rows, inputs) in matrices.items():
        found += math.prod(rows) * (inputs + FP32 * scale_groups(name, inputs, GROUP))
    floats = [s for s in everything if s.name not in matrices and not s.name.endswith(GATE_PAIR)]
    return found + FP32 * count(floats)


def optimizer_bytes(c: Config) -> dict:
    """AdamW in fp32: two moments (8 bytes a parameter).  With weights and gradient 16 bytes."""
    n = count(specs(c))
    return {"moments": 2 * n * FP32, "gradient": n * FP32, "training_total": 4 * n * FP32}


def decode_state_bytes(c: Config, context: int, cache_bytes: int = FP32) -> dict:
    """What decoding one sequence remembers after `context` tokens.

    gla: G D D fp32 a layer, whatever the context.  window: 2 W G D cache values a layer, a ring
    that is there from the start.  full: 2 T G D, growing (its array doubles when it is full, so
    that up to twice this is held).  With sinks both hold those S before.  A parallel hybrid has two.
    cache_bytes: 4 for fp32 caches (as on the CPU), 2 for bf16.  constant: what does not grow.
    full_attention: the same model with full attention in every layer, for comparison.
    """
    row = 2 * c.kv_heads * c.head_dim * cache_bytes
    a_layer = {
        "gla": c.kv_heads * c.head_dim * c.head_dim * FP32,
        "window": (c.sinks + c.window) * row,
        "full": (c.sinks + context) * row,
    }
    kinds = Counter(kind for i in range(c.layers) for kind in c.mixer(i).split("+"))
    by_kind = {kind: n * a_layer[kind] for kind, n in kinds.items()}
    total = sum(by_kind.values())
    constant = total - kinds["full"] * context * row
    return {**by_kind, "total": total, "constant": constant, "full_attention": c.layers * a_layer["full"]}


# --- FLOPs


def forward_flops(c: Config, keys: dict[str, float]) -> dict:
    """FLOPs of one token's forward pass, by part.  keys: softmax mixer -> keys a token sees.

    projections: 2 a weight of every q, k, v, o and gate projection.
    mixer, gla (as the recurrence, the least work that gives the result):
        decay the state D D G, add k^T v 2 D D G, read it by every query head 2 D D H
    mixer, softmax: 2 D H keys for the scores, as much for the weighted values.
    ffn: 2 * 3 C F, of experts the shared ones and K of E.   head: 2 C V.
    Norms, rotations, activations and the embedding look-up are left out: below 1 %.
    """
    flops = {"projections": 0, "mixer": 0, "ffn": 0, "head": 2 * c.width * c.vocab}
    for spec in specs(c):
        if _is_projection(spec):
            used = spec.size // c.experts * c.top_k if ".experts." in spec.name else spec.size
            flops["ffn" if ".mlp." in spec.name else "projections"] += 2 * used
    for i in range(c.layers):
        flops["mixer"] += sum(_mixer_flops(c, kind, keys) for kind in c.mixer(i).split("+"))
    return _with_total(flops)


def training_flops(c: Config) -> dict:
    """FLOPs of training on one token, in sequences of seq_len: 3 times the forward pass.

    Backward costs two forwards: a product Y = X W has two gradients, dX and dW, of its size.
    """
    length = c.seq_len
    forward = forward_flops(c, {"window": mean_keys(length, c.window), "full": mean_keys(length, length)})
    return _with_total({part: 3 * n for part, n in forward.items() if part != "total"})


def decoding_flops(c: Config, context: int) -> dict:
    """FLOPs of decoding one token after `context` tokens; a window is as full as it gets.

    full_attention: the total of the same model with full attention in every layer.
    """
    keys = {"window": min(context, c.window), "full": context}
    everywhere = forward_flops(replace(c, mixers=("full",)), keys)
    return {**forward_flops(c, keys), "full_attention": everywhere["total"]}


def mean_keys(length: int, window: int) -> float:
    """Keys that a token sees, averaged over a sequence: token t sees min(t, window), t from 1.

    sum = w (w + 1) / 2 + (length - w) w,  w = min(length, window)
    """
    w = min(length, window)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def _mixer_flops(c: Config, kind: str, keys: dict[str, float]) -> int:
    if kind == "gla":
        return c.head_dim * c.head_dim * (3 * c.kv_heads + 2 * c.heads)
    return round(4 * c.head_dim * c.heads * (c.sinks + keys[kind]))


def _with_total(flops: dict) -> dict:
    return {**flops, "total": sum(flops.values())}


def _is_projection(spec: Spec) -> bool:
    """A matrix inside a layer, or all experts': what a token is multiplied with, and what INT8 stores."""
    return spec.name.startswith("layers.") and len(spec.shape) >= 2
