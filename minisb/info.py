"""`python -m minisb info PRESET`: the layer table and the costs of a preset or a run, for people or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from minisb import checkpoint
from minisb.accounting import CONTEXTS, report
from minisb.config import PRESETS, Config, preset

HELP = "layers, parameters, memory and FLOPs of a preset or of a run's folder; allocates nothing"

PART_NAMES = {
    "embedding": "embedding",
    "gla": "linear attention",
    "window": "window attention",
    "full": "full attention",
    "gla+window": "linear attention + window attention",
    "gla+full": "linear attention + full attention",
    "moe": "mixture of experts",
    "sinks": "sinks",
    "ffn": "feed-forward",
    "router": "routers",
    "experts": "routed experts",
    "shared": "shared experts",
    "norms": "norms",
    "head": "head",
}


def add_arguments(parser):
    parser.add_argument("preset", metavar="PRESET", help=f"{', '.join(PRESETS)}, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args) -> int:
    found = report(described(args.preset))
    if args.preset not in PRESETS:
        found["run"] = args.preset
    print(json.dumps(found) if args.json else text(found))
    return 0


def described(name: str) -> Config:
    """The preset of that name, or the settings of the run in that folder."""
    if name not in PRESETS and (Path(name).is_dir() or Path(name).name != name):
        return checkpoint.load_config(name)["model"]
    return preset(name)


def text(found: dict) -> str:
    """accounting.report's dictionary as a page to read."""
    sections = (_shape, _layers, _parameters, _bytes, _decode_state, _flops)
    return "\n\n".join("\n".join(section(found)) for section in sections)


def _shape(found):
    c = found["config"]
    total, active = (found["parameters"][name] for name in ("total", "active"))
    name = f"{found['run']}, {found['preset']}" if "run" in found else found["preset"]
    yield f"{name}: {total:,} parameters" + (f", {active:,} active" if active < total else "")
    yield (
        f"  {c['layers']} layers, width {c['width']}, {c['heads']} query heads on {c['kv_heads']} key/value heads of "
        f"{c['head_dim']}, FFN {c['ffn']}, window {c['window']}, vocabulary {c['vocab']}"
    )
    head, bias = "tied to the embedding" if c["tied"] else "untied", "with" if c["qkv_bias"] else "without"
    yield f"  head {head}; q, k, v {bias} bias"
    if "moe" in c["ffns"]:
        yield (
            f"  experts: {c['experts']} routed, {c['top_k']} of them a token, + {c['shared_experts']} shared, each of "
            f"width {c['ffn']}"
        )
    if c["sinks"]:
        yield f"  {c['sinks']} learned sinks before the text"
    if found["other_projections"]:
        which, counts = found["other_projections"]["which"], found["other_projections"]
        yield f"  with {which} q, k, v, o in a hybrid's two branches: {counts['total']:,}, {counts['active']:,} active"


def _layers(found):
    for number, (kind, layer) in enumerate(found["layer_kinds"].items()):
        if number:
            yield ""
        plural = "s" * (len(layer["layers"]) > 1)
        yield f"{_kind_name(kind)}: layer{plural} {_abridged(layer['layers'])} ({len(layer['layers'])} of them)"
        for tensor in layer["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            yield f"  {tensor['name']:<28}{shape:>20}{tensor['parameters']:>18,}"
        yield f"  {'one such layer':<48}{layer['parameters']:>18,}"


def _parameters(found):
    total, active = (found["parameters"][name] for name in ("total", "active"))
    yield f"{'parameters by part':<50}{'':>18}{'':>8}{'fp32':>10}{'bf16':>10}"
    for part, n in [*found["parameters"]["by_part"].items(), ("total", total)]:
        yield f"  {PART_NAMES.get(part, part):<48}{n:>18,}{n / total:>8.1%}{_size(4 * n):>10}{_size(2 * n):>10}"
    if active < total:
        yield f"  {'active, what one token goes through':<48}{active:>18,}{active / total:>8.1%}"


def _bytes(found):
    optimizer, weights = found["optimizer_bytes"], {k: _size(n) for k, n in found["weight_bytes"].items()}
    yield "memory (kB, MB, GB, TB: powers of 1000)"
    yield f"  weights               fp32 {weights['fp32']:<14}bf16 {weights['bf16']}"
    yield f"  quantised             int8 {weights['int8']}, with --quantize-embedding {weights['int8_embedding']}"
    yield "                        (as `quantize` writes it: matrices in int8 with fp32 scales, the rest fp32)"
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
    first = fp32[next(iter(CONTEXTS))]
    if first["constant"] < first["total"]:
        growing = sum(n * kind.endswith(("full", "full+moe")) for kind, n in _layer_counts(found).items())
        yield f"  of it {_size(first['constant'])} constant in fp32; {growing} full-attention caches grow"
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


def _layer_counts(found) -> dict[str, int]:
    return {kind: len(layer["layers"]) for kind, layer in found["layer_kinds"].items()}


def _kind_name(kind: str) -> str:
    name = PART_NAMES[kind.removesuffix("+moe")]
    return f"{name}, {PART_NAMES['moe']}" if kind.endswith("+moe") else name


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
