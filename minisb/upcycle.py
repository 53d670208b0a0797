"""python -m minisb upcycle RUN --experts E --out DIR: from dense feed-forward networks to a mixture of experts.

Every expert begins as a copy of the dense network (report, eq. 15-18), the shared one too, and the router near
zero, so that each gate is close to 1/E.  With S shared experts and K of E routed ones
    shared(x) + sum of p_i E_i(x)  is about  (S + K/E) dense(x)
which is evened out in the experts' weights.  A SwiGLU is linear in `up` and in `down`, and nearly so in `gate`:
    the report's way: all three matrices times alpha = (1 / (S + K/E))^(1/3)
    --exact:          `up` and `down` times (1 / (S + K/E))^(1/2); nothing is lost in the silu
The new folder is a run at step 0 with moments at zero; `train_small.py --resume DIR` goes on from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from minisb import checkpoint
from minisb.config import Config
from minisb.data import load_tokens
from minisb.errors import MinisbError
from minisb.evaluate import GLANCE_TOKENS, evaluate, whole_windows
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain, specs
from minisb.params import ParamStore, count
from minisb.train import TrainSettings, intervals

HELP = "turn the feed-forward networks of a run into mixtures of experts"
MATRICES = ("gate_proj", "up_proj", "down_proj")


def add_arguments(parser):
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a dense run")
    add("--experts", type=int, required=True, metavar="E", help="routed experts of a layer")
    add("--out", required=True, metavar="DIR", help="folder of the new run")
    add("--top-k", type=int, default=1, metavar="K", help="experts that a token is routed to (default: 1)")
    add("--shared", type=int, default=1, metavar="S", help="experts that every token goes through (default: 1)")
    add("--dense", default="", metavar="LIST", help="layers that stay dense, counted from 0: 0,1,2 (default: none)")
    add("--exact", action="store_true", help="scale only `up` and `down`: exact, where the report's way is not quite")
    add("--steps", type=int, metavar="N", help="updates that will follow (default: the run's)")
    add("--lr", type=float, metavar="X", help="their peak learning rate (default: a quarter of the run's)")
    add("--threads", type=int, metavar="N", help="cores to use (default: all that this process may use)")


def main(args) -> int:
    if checkpoint.is_run(args.out):
        raise MinisbError(f"{args.out} already holds a run: give another --out.")
    stored = checkpoint.load_config(args.run)
    if "quantized" in stored:
        raise MinisbError(f"{args.run} is quantised: upcycle the run that it was made from.")
    dense = checkpoint.load_model(args.run, "cpu", threads=args.threads)
    settings = TrainSettings.from_dict(stored["training"])
    c = dense.config
    c = replace(c, steps=args.steps or c.steps, lr=args.lr or c.lr / 4)
    config = upcycled_config(c, args.experts, _layers(args.dense), args.top_k, args.shared)
    store = upcycled_store(dense, config, args.exact, settings.seed)
    begin(args.out, config, replace(settings, seed=settings.seed + 1), store, dense.tokenizer, stored.get("data", {}))

    model = SpikingBrain(config, dense.be, store)
    val = whole_windows(load_tokens(settings.data, dense.tokenizer).val, config, GLANCE_TOKENS)
    found = {
        "params": count(dense.specs), "params_upcycled": count(model.specs), "experts": args.experts,
        "scale": scales(config, args.exact), "mismatch": mismatch(dense, model, val[: config.seq_len]),
        "val_loss": evaluate(dense, val)["val_loss"], "val_loss_upcycled": evaluate(model, val)["val_loss"],
        "out": args.out,
    }  # fmt: skip
    print(text(found))
    print(json.dumps(found))
    return 0


def upcycled_config(c: Config, experts: int, dense: tuple[int, ...] = (), top_k: int = 1, shared: int = 1) -> Config:
    """c with experts in every layer but those in `dense`.  Raises MinisbError if there is nothing to upcycle."""
    if c.has_experts:
        raise MinisbError("the run has experts already: only dense feed-forward networks can be upcycled.")
    outside = [layer for layer in dense if not 0 <= layer < c.layers]
    if outside:
        raise MinisbError(f"there is no layer {outside[0]} to keep dense: the model has 0 to {c.layers - 1}.")
    ffns = tuple("dense" if layer in dense else "moe" for layer in range(c.layers))
    if "moe" not in ffns:
        raise MinisbError("every layer is to stay dense: nothing is left to upcycle.")
    values = {"ffns": ffns, "experts": experts, "top_k": top_k, "shared_experts": shared}
    return Config.from_dict({**c.to_dict(), **values, "preset": f"{c.preset}-moe"})


def scales(c: Config, exact: bool) -> dict[str, float]:
    """What the copies of each matrix are multiplied by."""
    share = 1 / (c.shared_experts + c.top_k / c.experts)
    alpha = share ** (1 / 2 if exact else 1 / 3)
    return dict(zip(MATRICES, (1.0 if exact else alpha, alpha, alpha), strict=True))


def upcycled_store(dense: SpikingBrain, config: Config, exact: bool, seed: int) -> ParamStore:
    """The weights of the dense model, copied into every expert; only the routers are drawn."""
    store = ParamStore(specs(config), dense.be.xp, dense.store.dtype, optimizer=True)
    store.initialise(seed)
    factors, S = scales(config, exact), config.shared_experts
    for name, p in store.p.items():
        matrix = name.split(".")[-2]
        if ".mlp.experts." in name:
            p[...] = factors[matrix] * dense.store.p[name.replace(".experts", "")]
        elif ".mlp.shared." in name:  # S networks side by side are one, S times as wide
            w = factors[matrix] * dense.store.p[name.replace(".shared", "")]
            p[...] = np.concatenate([w] * S, axis=1 if matrix == "down_proj" else 0)
        elif ".mlp.router." not in name:
            p[...] = dense.store.p[name]
    return store


def mismatch(dense: SpikingBrain, model: SpikingBrain, tokens) -> list[float]:
    """For each layer with experts: |experts(x) - dense(x)| / |dense(x)| over the inputs x that `tokens` (T,) give."""
    inputs = {}
    dense.forward(tokens[None], tap=lambda name, x: inputs.update({name: x}))
    ctx = model._context(model._rotary(0, 1), False, None)
    found = []
    for i, (before, after) in enumerate(zip(dense.blocks, model.blocks, strict=True)):
        if model.config.ffn_kind(i) == "moe":
            x = inputs[f"layers.{i}.mlp.gate+up.input"]
            found.append(relative_rms(after.ffn.forward(ctx, x)[0], before.ffn.forward(ctx, x)[0]))
    return found


def begin(folder, config: Config, settings: TrainSettings, store: ParamStore, tokenizer, data: dict):
    """A run at step 0 in `folder`, from the weights in `store`."""
    folder = Path(folder)
    tokenizer.save(folder / checkpoint.TOKENIZER)
    checkpoint.trim_log(folder, -1)
    checkpoint.save_state(folder, store, 0)
    settings = replace(settings, **intervals(config.steps))
    checkpoint.save_config(folder, config, asdict(settings), tokenizer, data)


def text(found: dict) -> str:
    differs = found["mismatch"]
    return "\n".join([
        f"{found['params']:,} parameters became {found['params_upcycled']:,}; copies times "
        + ", ".join(f"{value:.4f} ({name})" for name, value in found["scale"].items()),
        f"a layer's output differs from the dense one's by {np.mean(differs):.2%} (worst layer {max(differs):.2%})",
        f"loss on unseen text: {found['val_loss']:.4f} dense, {found['val_loss_upcycled']:.4f} upcycled",
        f"go on with: python train_small.py --resume {found['out']}",
    ])  # fmt: skip


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise MinisbError(f"--dense takes layers such as 0,1,2, got {text!r}.") from None
