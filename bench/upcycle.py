"""Does upcycling pay?  A dense run goes on as it is, and as a mixture of experts made from it.

    python bench/upcycle.py [--preset nano] [--base RUN] [--experts 8] [--steps 200] [--seeds 3] [--out runs/upcycle]

Both sides begin from the same weights, with moments at zero, and read the same batches in the same order at the
same learning rates; only the feed-forward networks differ.  Per seed one pair.  What is compared is the loss after
equally many tokens: the mixture does more work a token (the shared expert beside the routed ones), and `tok_per_s`
says how much longer it takes.  Finished runs in --out are kept, stopped ones go on.  Curves go to OUT/upcycle.json and
OUT/upcycle.png; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from minisb import checkpoint, cli
from minisb.backend import CpuBackend
from minisb.config import PRESETS, preset
from minisb.data import default_tokenizer, load_tokens
from minisb.model import SpikingBrain
from minisb.params import count
from minisb.plots import BLUE, ORANGE, _pyplot, _save
from minisb.train import GLANCE_TOKENS, TrainSettings, evaluate, resume, start, whole_windows
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

    curves = {side: [] for side in SIDES}
    speeds, differs = {side: [] for side in SIDES}, []
    for seed in range(args.seeds):
        for side, config in configs.items():
            run = out / f"{side}-{seed}"
            if not checkpoint.is_run(run):
                store = base.store if side == "dense" else upcycled_store(base, config, args.exact, seed)
                model = SpikingBrain(config, be, store)
                if side == "upcycled":
                    differs.append(float(np.mean(mismatch(base, model, data.val[: config.seq_len]))))
                first = evaluate(model, whole_windows(data.val, config, GLANCE_TOKENS))["val_loss"]
                store = trainable(store, be)
                begin(run, config, replace(settings, seed=seed + 1), store, base.tokenizer, stored["data"])
                checkpoint.append_log(run, {"step": 0, "tokens": 0, "val_loss": first})
            trainer = resume(run, config, TrainSettings.from_dict(checkpoint.load_config(run)["training"]), be, data)
            if not trainer.run():
                return cli.INTERRUPTED
            seen = [entry for entry in checkpoint.read_log(run) if "val_loss" in entry]
            curves[side].append([[entry["tokens"], entry["val_loss"]] for entry in seen])
            speeds[side] += [entry["tok_per_s"] for entry in seen[1:]]
            print(f"seed {seed}, {side:9} {seen[0]['val_loss']:.4f} -> {seen[-1]['val_loss']:.4f}", flush=True)

    found = {
        "params": {side: count(SpikingBrain(c, be).specs) for side, c in configs.items()},
        "experts": args.experts, "exact": args.exact, "steps": args.steps, "lr": dense.lr, "mismatch": differs,
        "first": {side: float(np.mean([c[0][1] for c in curves[side]])) for side in SIDES},
        "last": {side: float(np.mean([c[-1][1] for c in curves[side]])) for side in SIDES},
        "last_std": {side: float(np.std([c[-1][1] for c in curves[side]])) for side in SIDES},
        "tok_per_s": {side: float(np.median(speeds[side])) for side in SIDES},
        "curves": curves,
    }  # fmt: skip
    (out / "upcycle.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(curves, out / "upcycle.png", args.experts)
    print(json.dumps({key: value for key, value in found.items() if key != "curves"}))
    return 0


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
    """Loss over tokens, each run thin, the mean of each side thick."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=130)
    names = {"dense": "dense, trained on", "upcycled": f"upcycled to {experts} experts + 1 shared"}
    for side, colour in zip(SIDES, (BLUE, ORANGE), strict=True):
        runs = np.array(curves[side])
        for run in runs:
            axes.plot(run[:, 0], run[:, 1], color=colour, lw=0.6, alpha=0.6)
        axes.plot(runs[0, :, 0], runs[..., 1].mean(0), "o-", color=colour, ms=3.5, label=names[side])
    axes.set_xlabel("tokens read since")
    axes.set_ylabel("loss on unseen text, nats a token")
    axes.legend(fontsize=8)
    figure.tight_layout()
    _save(plt, figure, path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
