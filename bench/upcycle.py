"""Does upcycling pay?  A dense run goes on as it is, and as a mixture of experts made from it.

    python bench/upcycle.py [--preset nano] [--base RUN] [--experts 8] [--steps 200] [--seeds 3] [--out runs/upcycle]

Both sides begin from the same weights, with moments at zero, and read the same batches in the same order at the
same learning rates; only the feed-forward networks differ.  Per seed one pair.  What is compared is the loss after
equally many tokens, on the whole validation text (`first`, `last`, and `difference` pair by pair: a seed is the order
of the batches, which both sides share).  The mixture does more work a token (the shared expert beside the routed ones):
`tok_per_s` are steps of both, taken in turn.  Finished runs in --out are kept, stopped ones go on.  Curves go to
OUT/upcycle.json and OUT/upcycle.png; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from minisb import checkpoint, cli
from minisb.backend import CpuBackend
from minisb.config import PRESETS, preset
from minisb.data import default_tokenizer, load_tokens
from minisb.evaluate import FINAL_TOKENS, GLANCE_TOKENS, evaluate, whole_windows
from minisb.model import SpikingBrain
from minisb.optim import update
from minisb.params import count
from minisb.plots import BLUE, GREY, ORANGE, _pyplot, _save
from minisb.train import TrainSettings, resume, start
from minisb.upcycle import begin, mismatch, upcycled_config, upcycled_store

SIDES = ("dense", "upcycled")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--preset", choices=PRESETS, default="nano", help="of the dense base (default: %(default)s)")
    add("--base", metavar="RUN", help="a finished dense run to begin from (default: one is trained first)")
    add("--base-steps", type=int, default=400, metavar="N", help="steps of that base (default: %(default)s)")
    add("--data", default="stdlib", help="text of the base (default: %(default)s)")
    add("--experts", type=int, default=8, metavar="E", help="routed experts, top-1, + 1 shared (default: %(default)s)")
    add("--exact", action="store_true", help="scale only `up` and `down`")
    add("--steps", type=int, default=200, metavar="N", help="of each side (default: %(default)s)")
    add("--lr", type=float, metavar="X", help="peak learning rate of both (default: a quarter of the base's)")
    add("--seeds", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    add("--threads", type=int, metavar="N")
    add("--out", default="runs/upcycle", metavar="DIR")
    return p


def main(argv) -> int:
    args = parser().parse_args(argv)
    out, be = Path(args.out), CpuBackend(args.threads)
    base = checkpoint.load_model(args.base or trained_base(args, out / "base", be), "cpu", threads=args.threads)
    folder = Path(args.base or out / "base")
    stored = checkpoint.load_config(folder)
    settings = replace(TrainSettings.from_dict(stored["training"]), spike_from=1.0)
    data = load_tokens(settings.data, base.tokenizer)
    dense = replace(base.config, steps=args.steps, lr=args.lr or base.config.lr / 4)
    configs = dict(zip(SIDES, (dense, upcycled_config(dense, args.experts)), strict=True))

    whole = whole_windows(data.val, dense, FINAL_TOKENS)
    glance = whole_windows(data.val, dense, GLANCE_TOKENS)
    before = evaluate(base, whole)["val_loss"]
    curves, first, last = ({side: [] for side in SIDES} for _ in range(3))
    differs, least = [], []
    for seed in range(args.seeds):
        trainers = {}
        for side, config in configs.items():
            run = out / f"{side}-{seed}"
            if not checkpoint.is_run(run):
                store = base.store if side == "dense" else upcycled_store(base, config, args.exact, seed)
                begins = evaluate(SpikingBrain(config, be, store), glance)["val_loss"]
                store = trainable(store, be)
                begin(run, config, replace(settings, seed=seed + 1), store, base.tokenizer, stored["data"])
                checkpoint.append_log(run, {"step": 0, "tokens": 0, "val_loss": begins})
            trainers[side] = trainer = resume(run, config, training(run), be, data)
            if not trainer.run():
                return cli.INTERRUPTED
            seen = [entry for entry in checkpoint.read_log(run) if "val_loss" in entry]
            curves[side].append([[entry["tokens"], entry["val_loss"]] for entry in seen])
            found = evaluate(trainer.model, whole)
            last[side].append(found["val_loss"])
            if side == "upcycled":
                least.append(found["expert_load_min"])
                model = SpikingBrain(config, be, upcycled_store(base, config, args.exact, seed))
                differs.append(float(np.mean(mismatch(base, model, whole[: config.seq_len]))))
            first[side].append(before if side == "dense" else evaluate(model, whole)["val_loss"])
            print(f"seed {seed}, {side:9} {first[side][-1]:.4f} -> {last[side][-1]:.4f}", flush=True)

    found = {
        "params": {side: count(SpikingBrain(c, be).specs) for side, c in configs.items()},
        "experts": args.experts, "exact": args.exact, "steps": args.steps, "lr": dense.lr, "mismatch": differs,
        "val_tokens": len(whole) - 1, "first": first,
        **compared(last),
        "expert_load_min": least,
        "tok_per_s": speeds(trainers),
        "curves": curves,
    }  # fmt: skip
    (out / "upcycle.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(curves, out / "upcycle.png", args.experts)
    print(json.dumps({key: value for key, value in found.items() if key != "curves"}))
    return 0


def training(run) -> TrainSettings:
    return TrainSettings.from_dict(checkpoint.load_config(run)["training"])


def compared(last: dict) -> dict:
    """The losses of both sides, seed by seed -> their means, their spread, and the same of the differences.

    Spreads are standard deviations of a sample (N - 1), None for one seed.
    """

    def spread(values):
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    difference = np.subtract(last["upcycled"], last["dense"])
    return {
        "last": {side: {"seeds": x, "mean": float(np.mean(x)), "spread": spread(x)} for side, x in last.items()},
        "difference": {
            "seeds": difference.tolist(), "mean": float(difference.mean()), "spread": spread(difference),
        },
    }  # fmt: skip


def speeds(trainers: dict, rounds: int = 15) -> dict:
    """Tokens a second of both sides, medians.  Steps are taken in turn, so that a busy machine slows both.

    At a learning rate of 0, and nothing is saved: the runs stay as they are.
    """
    seconds = {side: [] for side in trainers}
    for _ in range(rounds):
        for side, trainer in trainers.items():
            began = time.perf_counter()
            _, norm = trainer.gradients()
            update(trainer.model.be, trainer.model.store, trainer.step, 0.0, norm, trainer.settings)
            seconds[side].append(time.perf_counter() - began)
    return {side: round(trainers[side].tokens_per_step / float(np.median(x)), 1) for side, x in seconds.items()}


def trained_base(args, folder: Path, be) -> Path:
    """A dense run, trained here unless it is there already."""
    if checkpoint.is_run(folder):
        stored = checkpoint.load_config(folder)
        tokenizer = checkpoint.load_tokenizer(folder, stored["tokenizer"])
        settings = TrainSettings.from_dict(stored["training"])
        resume(folder, stored["model"], settings, be, load_tokens(settings.data, tokenizer)).run()
        return folder
    config = preset(args.preset, steps=args.base_steps)
    tokenizer = default_tokenizer(args.data, config.vocab)
    config = replace(config, vocab=tokenizer.vocab_size)
    settings = TrainSettings(data=args.data, spike_from=1.0, eval_every=config.steps, checkpoint_every=config.steps)
    start(folder, config, settings, be, tokenizer, load_tokens(args.data, tokenizer)).run()
    return folder


def trainable(store, be):
    """A store with room for moments: what was loaded for reading alone has none."""
    if store.flat_m.size:
        return store
    twin = type(store)(store.specs, be.xp, store.dtype, optimizer=True)
    twin.flat_p[...] = store.flat_p
    return twin


def picture(curves, path, experts: int):
    """Loss over tokens beside the difference of each pair: runs thin, means thick."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), dpi=120)
    names = {"dense": "dense, trained on", "upcycled": f"upcycled, {experts} experts + 1 shared"}
    runs = {side: np.array(curves[side]) for side in SIDES}  # (seeds, evaluations, 2)
    tokens = runs["dense"][0, :, 0]
    losses = {side: values[..., 1] for side, values in runs.items()}
    for side, colour, marker in zip(SIDES, (BLUE, ORANGE), ("o-", "x--"), strict=True):
        left.plot(tokens, losses[side].T, color=colour, lw=0.6, alpha=0.5)
        left.plot(tokens, losses[side].mean(0), marker, color=colour, ms=5, label=names[side])
    left.set_ylabel("loss on unseen text, nats a token")
    left.legend(fontsize=8)
    pairs = losses["upcycled"] - losses["dense"]
    right.axhline(0, color=BLUE, lw=1)
    right.plot(tokens, pairs.T, color=ORANGE, lw=0.6, alpha=0.5)
    right.plot(tokens, pairs.mean(0), "x--", color=ORANGE, ms=5, label="upcycled minus dense, same seed")
    if len(pairs) > 1:
        spread = losses["dense"].std(0, ddof=1)
        right.fill_between(tokens, -spread, spread, color=GREY, alpha=0.25, lw=0, label="spread of the dense seeds")
    right.set_ylabel("difference, nats a token")
    right.set_ylim(top=1.4 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("tokens read since the two parted")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if tokens[-1] > 1e5 else f"{x:g}")
    figure.tight_layout()
    _save(plt, figure, path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
