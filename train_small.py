"""Train a SpikingBrain: `python train_small.py` does it on a laptop, on text that is already there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

# ruff: noqa: E402
NOTHING_SAVED = "\nstopped; nothing was saved yet, so start again with the same command"
if __name__ == "__main__":  # Ctrl-C while the modules below load, which takes a moment: a sentence, not a traceback
    signal.signal(signal.SIGINT, lambda *_: sys.exit(print(NOTHING_SAVED, file=sys.stderr) or 130))

import minisb
from minisb import checkpoint, cli
from minisb.backend import choose, is_gpu
from minisb.config import PRESETS, SPIKE_PROJECTIONS, preset
from minisb.corpus import DOWNLOADS, load_corpus
from minisb.data import default_tokenizer, load_tokens
from minisb.errors import MinisbError
from minisb.params import count
from minisb.plots import expert_load, loss_curve
from minisb.train import TrainSettings, check_memory, describe_data, intervals, resume, start

#: Flags by where their values go.  None means "not given": the preset or the stored run decides.
CONFIG_FLAGS = ("steps", "batch_size", "seq_len", "lr", "spike", "spike_k", "capacity")
TRAIN_FLAGS = ("data", "seed", "accumulate", "spike_from", "eval_every", "checkpoint_every")
MACHINE_FLAGS = ("device", "native", "dtype")  # may change when a run goes on
SAMPLE_TOKENS = 200
SAMPLE_FROM = (0.6, None, 0.95)  # temperature, top-k, top-p: a small model is best kept to what it is sure of


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(description=__doc__)
    add = p.add_argument
    add("--preset", help=f"size of the model: {', '.join(PRESETS)} (default: nano, on a GPU small)")
    add("--data", type=_data, help=f"stdlib, {', '.join(DOWNLOADS)}, or a text file or folder (default: stdlib)")
    add("--steps", type=int, help="updates of the weights (default: the preset's)")
    add("--batch-size", type=int, metavar="B", help="sequences read at once (default: the preset's)")
    add("--seq-len", type=int, metavar="T", help="tokens in a sequence (default: the preset's)")
    add("--lr", type=float, metavar="X", help="peak learning rate, after warm-up (default: the preset's)")
    add("--seed", type=int, metavar="S", help="of the initial weights and the order of the text (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    add("--dtype", type=_dtype, help="auto, float32, bfloat16 or float16; a CPU has float32 only (default: auto)")
    add("--native", metavar="all|none|LIST", help="compiled operations to use, by name (default: all)")
    add("--spike", type=_spike, metavar="all|none|LIST",
        help=f"projections that read spikes, of {','.join(SPIKE_PROJECTIONS)}, each in all layers or in some: "
             "down,3.q,0-3.gate,5.all (layers count from 0; default: all)")  # fmt: skip
    add("--spike-k", type=float, metavar="K", help="threshold = mean|x| / K: larger K, finer spikes (default: 3)")
    add("--spike-from", type=float, metavar="FRACTION",
        help="share of the steps after which spikes are on (default: 0.8)")  # fmt: skip
    add(
        "--capacity",
        type=float,
        metavar="X",
        help="in training an expert takes X times its fair share of tokens at most, 0: all that come (default: 0)",
    )
    add("--accumulate", type=int, metavar="N", help="batches in one update, as if B were N times larger (default: 1)")
    add("--threads", type=int, metavar="N", help="cores to use (default: all that this process may use)")
    add("--graph", choices=("on", "off"), help="record a step once and replay it; for GPUs (default: on there)")
    add(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations (default: an eighth of the steps, at least 10)",
    )
    add(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps between checkpoints (default: a fifth of the steps, at least 10)",
    )
    add("--out", metavar="DIR", help="folder of the run (default: runs/PRESET, or the next free runs/PRESET-2, ...)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its own settings")
    return p


def main(argv) -> int:
    began = time.perf_counter()
    args = parser().parse_args(argv)
    folder, config, settings = stored_run(args) if args.resume else new_run(args)
    try:
        return train(args, folder, config, settings, began)
    except KeyboardInterrupt:  # before the first step, while the last words are written, or pressed twice
        saved = checkpoint.is_run(folder)
        print(f"\nstopped; go on with: {_script()} --resume {folder}" if saved else NOTHING_SAVED, file=sys.stderr)
        return cli.INTERRUPTED


def train(args, folder: Path, config, settings: TrainSettings, began: float) -> int:
    """A run from its first line on the screen to its last -> exit code."""
    be, why = choose(settings.device, settings.native, args.threads)
    if args.graph == "on" and be.name != "cuda":
        raise MinisbError("--graph on needs a GPU: there is nothing to record on a CPU.")
    settings = replace(settings, dtype=_activations(settings.dtype, be, args))
    print(f"device  {be.name}: {why}; {settings.dtype}")
    check_memory(config, be)

    if args.resume:
        tokenizer = checkpoint.load_tokenizer(folder, checkpoint.load_config(folder).get("tokenizer"))
    else:
        tokenizer = default_tokenizer(settings.data, config.vocab)
        config = replace(config, vocab=tokenizer.vocab_size)  # a small text has fewer tokens than asked for
    data = load_tokens(settings.data, tokenizer)
    if args.resume:
        _note_changed_data(folder, data)
        trainer = resume(folder, config, settings, be, data, args.graph != "off")
    else:
        trainer = start(folder, config, settings, be, tokenizer, data, args.graph != "off")
    _introduce(trainer)

    if not trainer.run():
        print(f"stopped at step {trainer.step} of {config.steps}; go on with: {_script()} --resume {folder}",
              file=sys.stderr)  # fmt: skip
        return cli.INTERRUPTED
    result = trainer.summary()
    _conclude(result, trainer.model, tokenizer, folder)
    if importlib.util.find_spec("matplotlib"):
        loss_curve(folder, folder / "loss.png", result["bigram_loss"])
        if config.has_experts:
            expert_load(folder, folder / "experts.png")
    result |= {
        "wall_s": round(time.perf_counter() - began, 1),
        "device": be.name,
        "native": sorted(getattr(be, "modules", [])),
        "out": str(folder),
    }
    print(json.dumps(result))
    return 0


# --- which run


def new_run(args):
    """-> folder, Config, TrainSettings of the flags; nothing is written yet."""
    usual = "small" if is_gpu(args.device or "auto") else "nano"
    config = preset(args.preset or usual, **_given(args, CONFIG_FLAGS))
    settings = TrainSettings(
        **intervals(config.steps) | {"dtype": "auto"} | _given(args, (*TRAIN_FLAGS, *MACHINE_FLAGS))
    )
    return _new_folder(args.out, config.preset), config, settings


def stored_run(args):
    """-> folder, Config, TrainSettings of the run in --resume.

    What depends on the machine may be otherwise this time; a flag that contradicts the run is an error.
    """
    folder = Path(args.resume)
    stored = checkpoint.load_config(folder)
    config, settings = stored["model"], TrainSettings.from_dict(stored["training"])
    values = {**config.to_dict(), **asdict(settings), "out": str(folder)}
    for name, value in _given(args, ("preset", *CONFIG_FLAGS, *TRAIN_FLAGS, "out")).items():
        if name == "steps" and value != config.steps:
            raise MinisbError(
                f"--steps cannot change in a resumed run, which has {config.steps}: its learning rate falls to zero "
                f"over just these, so a run of another length differs from its first step on; start one with: "
                f"{_another_length(config, value)}"
            )
        if value != values[name]:
            raise MinisbError(
                f"--{name.replace('_', '-')} cannot change in a resumed run, which has {values[name]}: "
                "leave the flag away, or start a new run without --resume."
            )
    return folder, config, replace(settings, **_given(args, MACHINE_FLAGS))


def _another_length(config, steps: int) -> str:
    if config.preset in PRESETS:
        return f"{_script()} --preset {config.preset} --steps {steps}"
    return f"python -m minisb upcycle RUN --experts E --steps {steps} --out DIR"  # which calls its runs PRESET-moe


def _given(args, names) -> dict:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _new_folder(out: str | None, name: str) -> Path:
    """--out, or the first of runs/NAME, runs/NAME-2, ... without a run: no run is ever overwritten."""
    if out is not None:
        if checkpoint.is_run(out):
            raise MinisbError(f"{out} already holds a run: go on with it by --resume {out}, or give another --out.")
        return Path(out)
    folder, number = Path("runs") / name, 2
    while checkpoint.is_run(folder):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _data(text: str) -> str:
    """A path as an absolute one, so that --resume finds it from any folder."""
    return text if text in ("stdlib", *DOWNLOADS) else str(Path(text).absolute())


def _dtype(text: str) -> str:
    if text not in ("auto", "float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}")
    return text


def _activations(name: str, be, args) -> str:
    """The dtype to train in: what the flag says, else what the run had if this machine can, else what suits it."""
    if be.name == "cuda":
        return be.activations if name == "auto" else name
    if args.dtype in ("bfloat16", "float16"):
        raise MinisbError(f"--dtype {args.dtype} needs a GPU: on a CPU this trains in float32.")
    return "float32"


def _spike(text: str) -> tuple[str, ...]:
    return {"all": SPIKE_PROJECTIONS, "none": ()}.get(text, tuple(text.split(",")))


def _note_changed_data(folder, data):
    if checkpoint.load_config(folder).get("data") != describe_data(data):
        print("note: the text is not the one this run began with, so it goes on differently", file=sys.stderr)


# --- what people read


def _introduce(trainer):
    c, s, data = trainer.model.config, trainer.settings, trainer.data
    corpus = load_corpus(s.data)
    experts = f", {c.experts} experts + {c.shared_experts} shared" if c.has_experts else ""
    print(f"model   {c.preset}: {count(trainer.model.specs):,} parameters, {c.layers} layers ({', '.join(c.mixers)} "
          f"in turn{experts}), width {c.width}, vocabulary {c.vocab:,}")  # fmt: skip
    print(f"data    {s.data}: {len(corpus.train):,} texts and {len(data.train):,} tokens to learn from, "
          f"{len(corpus.val):,} and {len(data.val):,} to test, "
          f"{data.train_bytes / len(data.train):.2f} bytes a token")  # fmt: skip
    print(f"run     {trainer.folder}: {c.steps:,} steps of {trainer.tokens_per_step:,} tokens, "
          + (f"from step {trainer.step:,}, " if trainer.step else "")
          + f"spikes from step {round(s.spike_from * c.steps):,}", flush=True)  # fmt: skip


def _conclude(result, model, tokenizer, folder):
    def line(label, name):
        bits = result[f"{name}_bits_per_byte"]
        print(f"{label:24}{result[name]:8.4f} nats a token {bits:8.4f} bits a byte")

    print("\non text it has not seen:")
    line("  float activations", "val_loss")
    line("  with spikes", "val_loss_spike")
    line("  bigram baseline", "bigram_loss")
    if result["sparsity"] is not None:
        print(f"  {result['sparsity']:.1%} of the spike slots are empty")
    spike = result["sparsity"] is not None
    ids = minisb.generate(model, [], SAMPLE_TOKENS, *SAMPLE_FROM, stop=tokenizer.eot, spike=spike)
    print(f"\na sample{' (with spikes)' * spike}:\n")
    for text in tokenizer.stream(ids):
        print(text, end="", flush=True)
    print(f"\n\nmore: {_script('sample.py')} {folder}{' --spike' * spike}\n")


def _script(name: str = "train_small.py") -> str:
    """How to call a script that lies beside this one, from where the reader stands."""
    path = Path(__file__).with_name(name)
    here = Path.cwd()
    return f"python {path.relative_to(here) if path.is_relative_to(here) else path}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.run(main))
