"""`python -m minisb spikes RUN`: the spikes of a trained model, measured, for people or as JSON."""

from __future__ import annotations

import argparse
import json
import math

from minisb import checkpoint, energy
from minisb.data import load_tokens
from minisb.errors import MinisbError
from minisb.evaluate import whole_windows
from minisb.meter import QUANTITIES, REPORT_SPARSITY, mean_loss, measure

HELP = "measure the spikes of a run: counts, codes, sparsity, loss over k, energy"
DEFAULT_K, DEFAULT_TOKENS = (2.0, 2.5, 3.0, 3.5, 4.0), 16384
#: Columns of the table by projection: heading, quantity, width, format.
COLUMNS = (
    ("silent", "silent", 9, ".1%"),
    ("channels", "silent_channels", 10, ".1%"),
    ("|s|<=7", "at_most_7", 9, ".1%"),
    ("|s|>16", "over_16", 9, ".2%"),
    ("mean |s|", "mean_count", 10, ".2f"),
    ("spikes", "spikes_per_channel", 8, ".2f"),
    ("a firing", "spikes_per_firing", 10, ".2f"),
    ("sparsity", "sparsity", 10, ".1%"),
)


def add_arguments(parser):
    parser.add_argument("run", metavar="RUN", help="folder of a trained run")
    add = parser.add_argument
    add("--k", type=_numbers, default=DEFAULT_K, metavar="K,K,...",
        help="thresholds mean|x| / K to measure, besides the run's own (default: 2,2.5,3,3.5,4)")  # fmt: skip
    add("--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="validation tokens to read (default: 16384)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    add("--threads", type=int, metavar="N", help="cores to use (default: all)")
    add("--pictures", metavar="DIR", help="also draw PNG pictures into DIR (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object instead")


def main(args) -> int:
    model, sample = load(args.run, args.tokens, args.threads, args.device)
    found, tallies = measure_run(args.run, model, sample, args.k)
    if args.pictures:
        from minisb.plots import draw_spikes  # here: matplotlib is an extra

        found["pictures"] = [str(path) for path in draw_spikes(args.pictures, model, sample, tallies)]
    print(json.dumps(found) if args.json else text(found))
    return 0


def load(run, tokens: int = DEFAULT_TOKENS, threads: int | None = None, device: str = "auto"):
    """-> the model of a run, and about `tokens` of its validation text.  MinisbError if it has no spikes."""
    settings = checkpoint.load_config(run)
    if "quantized" in settings:
        raise MinisbError(f"the run in {run} is quantised: measure the run that it was made from.")
    if not settings["model"].spike:
        raise MinisbError(f"the run in {run} has no spikes (it was made with --spike none): nothing to measure.")
    if tokens < 1:
        raise MinisbError(f"--tokens must be at least 1, got {tokens}.")
    model = checkpoint.load_model(run, device, threads=threads)
    data = load_tokens(settings["training"]["data"], model.tokenizer)
    return model, whole_windows(data.val, model.config, tokens)


def measure_run(run, model, sample, ks=DEFAULT_K):
    """-> everything that the command prints, as one dictionary, and the tallies at the run's own k."""
    own = model.config.spike_k
    measured = {k: measure(model, sample, k) for k in sorted({*ks, own})}
    found = {
        "run": str(run),
        "tokens": len(sample) - 1,
        "float_loss": mean_loss(model, sample, spike=False),
        "spike_k": own,
        "definitions": {q.key: q.definition for q in QUANTITIES},
        "report": {q.key: q.report for q in QUANTITIES},
        "by_k": [m for m, _ in measured.values()],
        "energy": {
            "note": energy.NOTE,
            "picojoules": energy.PICOJOULES,
            "per_mac": energy.account(measured[own][0]["operations"]),
            "report": energy.report_claims(),
        },
    }
    return found, measured[own][1]


def text(found: dict) -> str:
    """measure_run's dictionary as a page to read."""
    own = next(m for m in found["by_k"] if m["k"] == found["spike_k"])
    sections = _quantities(found, own), _codes(own), _projections(own), _sweep(found), _energy(found["energy"])
    return "\n\n".join("\n".join(section) for section in sections)


def _quantities(found, own):
    size = f"{found['tokens']:,} validation tokens, {len(own['projections'])} projections"
    yield f"{found['run']}: {size}, k = {own['k']:g}"
    yield f"  {'':<20}{'this run':>9}{'the 7B':>9}  definition"
    for q in QUANTITIES:
        style = ".2%" if q.share else ".3f"
        report = "" if q.report is None else format(q.report, style)
        yield f"  {q.key:<20}{own['total'][q.key]:>9{style}}{report:>9}  {q.definition}"
    yield "  this run: all projections together; an input that three share counts three times"
    yield "  the 7B: the report's SpikingBrain-7B at k = 3 (section 3.3), which leaves open what exactly was counted"


def _codes(own):
    yield "spikes by code (codes without a sign: what |count| takes; steps: for the largest count of the sample)"
    yield f"  {'':<20}{'steps':>8}{'spikes a pair':>19}{'a firing pair':>19}"
    for code, c in own["total"]["codes"].items():
        yield f"  {code:<20}{c['steps']:>8}{c['spikes_per_channel']:>19.3f}{c['spikes_per_firing']:>19.3f}"


def _projections(own):
    yield "by layer and projection (silent: pairs; channels: silent in the whole sample; spikes: a pair, a firing pair)"
    longest = max(20, *map(len, own["projections"])) + 2
    yield f"  {'':<{longest}}" + "".join(f"{heading:>{width}}" for heading, _, width, _ in COLUMNS)
    for name, s in [*own["projections"].items(), ("all", own["total"])]:
        yield f"  {name:<{longest}}" + "".join(f"{s[key]:>{width}{style}}" for _, key, width, style in COLUMNS)


def _sweep(found):
    yield "over k (loss in nats a token; cost: how much higher than without spikes, from the same weights)"
    yield f"  {'':<25}{'sparsity':>11}{'sparsity':>11}{'sparsity of':>13}{'':>9}{'spikes a':>10}"
    yield f"  {'k':<7}{'loss':>9}{'cost':>9}{'this run':>11}{'the 7B':>11}{'those firing':>13}{'silent':>9}{'pair':>10}"
    yield f"  {'float':<7}{found['float_loss']:>9.4f}"
    for m in found["by_k"]:
        cost, s = m["loss"] / found["float_loss"] - 1, m["total"]
        report = f"{REPORT_SPARSITY[m['k']]:.1%}" if m["k"] in REPORT_SPARSITY else ""
        yield (
            f"  {m['k']:<7g}{m['loss']:>9.4f}{cost:>+9.2%}{s['sparsity']:>11.1%}{report:>11}"
            f"{s['sparsity_firing']:>13.1%}{s['silent']:>9.1%}{s['spikes_per_channel']:>10.3f}"
        )
    yield "  small costs on few tokens are noise: of nano 0.15 % on 2,000 tokens and 0.05 % on 16,384 can be chance"
    yield f"  (these are from {found['tokens']:,}; --tokens N reads more)"


def _energy(found):
    columns = next(iter(found["per_mac"].values()))
    yield f"energy of one multiply-accumulate, pJ (eq. 24; {energy.NOTE})"
    yield f"  {'':<28}" + "".join(f"{name:>14}" for name in columns)
    for name, row in found["per_mac"].items():
        yield f"  {name:<28}" + "".join(f"{pj:>14.3f}" for pj in row.values()) + f"   {energy.NOTE}"
    ours = found["per_mac"]["spikes, as counted here"]
    for name in ("FP16", "INT8"):
        dense, name = found["per_mac"][f"{name} multiply-accumulate"], f"ours against {name}"
        yield f"  {name:<28}" + "".join(f"{ours[m] / dense[m] - 1:>+14.1%}" for m in columns) + f"   {energy.NOTE}"
    r = found["report"]
    yield (
        f"  the report: 1.13 x 0.03 = {r['energy_pj']} pJ, {-r['saved_fp16']:.1%} and {-r['saved_int8']:.1%} "
        f"against FP16 and INT8   {energy.NOTE}"
    )
    yield (
        f"  its 43.48x is 1 / (1 - {r['saved_fp16']}) = {r['factor_from_rounded']}, from the rounded share; "
        f"1.5 / {r['energy_pj']} = {r['factor']}   {energy.NOTE}"
    )
    yield "  memory: decoding one sequence, each weight fetched once a token; spikes fetch those of firing channels"
    yield "  constants, published figures in pJ:"
    for name, (pj, source) in found["picojoules"].items():
        yield f"  {name:<28}{pj:>14.3f}   {source}"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        ks = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 2,2.5,3") from None
    if not all(k > 0 and math.isfinite(k) for k in ks):
        raise argparse.ArgumentTypeError(f"every k must be a finite number above 0, got {text}")
    return ks
