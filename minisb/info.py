"""`python -m minisb info PRESET`: the layer table and the costs of a preset, for people or as JSON."""

from __future__ import annotations

import json

from minisb.accounting import CONTEXTS, report
from minisb.config import PRESETS, preset

HELP = "layers, parameters, memory and FLOPs of a preset; allocates nothing"

PART_NAMES = {
    "embedding": "embedding",
    "gla": "linear attention",
    "window": "window attention",
    "full": "full attention",
    "ffn": "feed-forward",
    "norms": "norms",
    "head": "head",
}


def add_arguments(parser):
    parser.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args) -> int:
    found = report(preset(args.preset))
    print(json.dumps(found) if args.json else text(found))
    return 0


def text(found: dict) -> str:
    """accounting.report's dictionary as a page to read."""
    sections = (_shape, _layers, _parameters, _bytes, _decode_state, _flops)
    return "\n\n".join("\n".join(section(found)) for section in sections)


def _shape(found):
    c = found["config"]
    yield f"{found['preset']}: {found['parameters']['total']:,} parameters"
    yield (
        f"  {c['layers']} layers, width {c['width']}, {c['heads']} query heads on {c['kv_heads']} key/value heads of "
        f"{c['head_dim']}, FFN {c['ffn']}, window {c['window']}, vocabulary {c['vocab']}"
    )
    head, bias = "tied to the embedding" if c["tied"] else "untied", "with" if c["qkv_bias"] else "without"
    yield f"  head {head}; q, k, v {bias} bias"


def _layers(found):
    for number, (kind, layer) in enumerate(found["layer_kinds"].items()):
        if number:
            yield ""
        plural = "s" * (len(layer["layers"]) > 1)
        yield f"{PART_NAMES[kind]}: layer{plural} {_abridged(layer['layers'])} ({len(layer['layers'])} of them)"
        for tensor in layer["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            yield f"  {tensor['name']:<26}{shape:>16}{tensor['parameters']:>16,}"
        yield f"  {'one such layer':<42}{layer['parameters']:>16,}"


def _parameters(found):
    total = found["parameters"]["total"]
    yield "parameters by part"
    for part, n in found["parameters"]["by_part"].items():
        yield f"  {PART_NAMES[part]:<42}{n:>16,}{n / total:>8.1%}"
    yield f"  {'total':<42}{total:>16,}"


def _bytes(found):
    weights, optimizer = found["weight_bytes"], found["optimizer_bytes"]
    yield "memory (kB, MB, GB, TB: powers of 1000)"
    yield "  weights               " + "".join(f"{name} {_size(n):<14}" for name, n in weights.items()).rstrip()
    yield "                        (int8: projections with an fp32 scale per 128 inputs, the rest bf16)"
    yield f"  optimiser, fp32       moments {_size(optimizer['moments'])}, gradient {_size(optimizer['gradient'])}"
    total = _size(optimizer["training_total"])
    yield f"  training, fp32        weights, gradient and moments {total}, plus activations"


def _decode_state(found):
    yield "decode state of one sequence (linear-attention state fp32; keys and values as named)"
    yield f"  {'context':<10}{'fp32 cache':>12}{'if all full':>14}{'bf16 cache':>14}{'if all full':>14}"
    fp32, bf16 = (found["decode_state_bytes"][name] for name in ("fp32_cache", "bf16_cache"))
    for context in CONTEXTS:
        row = [states[context][column] for states in (fp32, bf16) for column in ("total", "full_attention")]
        yield f"  {context:<10}{_size(row[0]):>12}" + "".join(f"{_size(n):>14}" for n in row[1:])
    yield '  "if all full": the same model with full attention in every layer'


def _flops(found):
    training, decoding = found["flops_per_token"]["training"], found["flops_per_token"]["decoding"]
    parts = ("projections", "mixer", "ffn", "head", "total")
    yield "FLOPs per token (a multiply-add is 2)"
    yield f"  {'':<24}" + "".join(f"{part:>12}" for part in parts) + f"{'if all full':>14}"
    label = f"training, T {training['context']}"
    yield f"  {label:<24}" + "".join(f"{_flops_size(training[part]):>12}" for part in parts)
    for context, flops in decoding.items():
        label = f"decoding after {context}"
        row = "".join(f"{_flops_size(flops[part]):>12}" for part in parts)
        yield f"  {label:<24}{row}{_flops_size(flops['full_attention']):>14}"
    yield "  training = 3 x forward, windows as full as they are on average in T tokens"


def _abridged(numbers: list[int]) -> str:
    """0, 2, 4, ... 26 for a long list."""
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers))
    return ", ".join(map(str, numbers[:3])) + f", ... {numbers[-1]}"


def _size(n: float) -> str:
    return _scaled(n, ("B", "kB", "MB", "GB", "TB"))


def _flops_size(n: float) -> str:
    return _scaled(n, ("", "k", "M", "G", "T"))


def _scaled(n: float, units) -> str:
    """Three digits and a unit: 30.5 GB."""
    for unit in units:
        if n < 999.5 or unit == units[-1]:
            digits = 0 if n >= 99.95 or n == int(n) else 1 if n >= 9.995 else 2
            return f"{n:.{digits}f} {unit}".strip()
        n /= 1000
    raise AssertionError("unreachable")
