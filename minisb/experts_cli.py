"""`python -m minisb experts RUN`: how evenly the routers of a trained model use its experts, on unseen text."""

from __future__ import annotations

import json
import math

from minisb import checkpoint
from minisb.data import eval_batches, load_tokens
from minisb.errors import MinisbError
from minisb.evaluate import FINAL_TOKENS, whole_windows
from minisb.experts import Loads
from minisb.model import SpikingBrain

HELP = "how many tokens each expert of a run gets, on its validation text"


def add_arguments(parser):
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run with experts, quantised or not")
    add("--tokens", type=int, default=FINAL_TOKENS, metavar="N",
        help="validation tokens to read at most (default: as at the end of training, %(default)s)")  # fmt: skip
    add("--spike", action="store_true", help="with spiking activations, as a quantised run always has")
    add("--threads", type=int, metavar="N", help="cores to use (default: all)")
    add("--json", action="store_true", help="print one JSON object instead")


def main(args) -> int:
    if args.tokens < 1:
        raise MinisbError(f"--tokens must be at least 1, got {args.tokens}.")
    settings = checkpoint.load_config(args.run)
    if not settings["model"].has_experts:
        raise MinisbError(f"the run in {args.run} has no experts: python -m minisb upcycle makes one that has.")
    model = checkpoint.load_model(args.run, threads=args.threads)
    val = load_tokens(settings["training"].get("data", "stdlib"), model.tokenizer).val
    found = {"run": str(args.run)} | measure(model, whole_windows(val, model.config, args.tokens), args.spike)
    print(json.dumps(found) if args.json else text(found))
    return 0


def measure(model: SpikingBrain, tokens, spike=False) -> dict:
    """Run `model` over tokens (N,) -> what its routers did, as plain numbers.

    "load": layer -> for each expert its slots over its fair share N K / E; "load_min": the least of all.
    "entropy": of the router's probabilities, in nats, mean over tokens and layers; at most "entropy_max", log E.
    Nothing is dropped outside training.
    """
    c, loads = model.config, Loads()
    for x, y in eval_batches(tokens, c.batch_size, c.seq_len):
        model.loss(model.be.xp.asarray(x), model.be.xp.asarray(y), spike, loads)
    return {
        "tokens": len(tokens) - 1,
        "experts": c.experts,
        "top_k": c.top_k,
        "load": {str(layer): [share * c.experts for share in shares] for layer, shares in loads.shares().items()},
        "load_min": loads.least(),
        "entropy": loads.entropy(),
        "entropy_max": math.log(c.experts),
    }


def text(found: dict) -> str:
    """measure's dictionary as a page to read."""
    E, load = found["experts"], found["load"]
    layer, expert = min(((n, e) for n in load for e in range(E)), key=lambda at: load[at[0]][at[1]])
    lines = [
        f"{found['run']}: {found['tokens']:,} validation tokens; {found['top_k']} of {E} experts a token",
        "tokens of each expert over its fair share: 1.00 if all had as many",
        f"  {'layer':<8}{'least':>7}{'most':>7}   experts 0 to {E - 1}",
    ]
    for n, row in load.items():
        lines.append(f"  {n:<8}{min(row):>7.2f}{max(row):>7.2f}   " + " ".join(f"{x:.2f}" for x in row))
    lines.append(f"least of all: {found['load_min']:.1%} of its fair share, expert {expert} of layer {layer}")
    lines.append(
        f"how undecided the routers are, by the entropy of their probabilities: {found['entropy']:.3f} nats, "
        f"from 0 (sure of one expert) to {found['entropy_max']:.3f} (all {E} alike)"
    )
    return "\n".join(lines)
