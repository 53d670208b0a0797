"""A model, a text and a run small enough for tests, and `train_small.py` on them.

As a script it is train_small.py with a preset "tiny", which can end itself at a chosen moment:
    python tests/tiny_run.py kill 17 --preset tiny ...
counts everything that touches the run folder and every step's work, and dies of SIGKILL at the
17th of these, in the middle of a write where it is one.  With kill 0 it lives and, on the last
line of stderr, says how many moments there were.  "stop 3" presses Ctrl-C when the 3rd batch is read.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import minisb.config as config  # noqa: E402

WORDS = ("the", "brain", "reads", "tokens", "and", "counts", "spikes", "while", "state", "grows", "slowly")


@dataclass(frozen=True)
class Tiny(config.Config):
    preset: str = "tiny"
    vocab: int = 300
    width: int = 16
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    ffn: int = 24
    window: int = 8
    gate_rank: int = 4
    seq_len: int = 16
    batch_size: int = 2
    steps: int = 12


config.PRESETS["tiny"] = Tiny


def write_text(folder: Path, files: int = 6) -> Path:
    """A folder of small text files, the same each time."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(20)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


class Moments:
    """Counts moments; at number `last` the process does `half` of what it was about to do and dies."""

    def __init__(self, last: int):
        self.last, self.seen = last, 0

    def __call__(self, half=lambda: None):
        self.seen += 1
        if self.seen == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner, name: str, half=None, after: bool = False):
        """Make every call of owner.name a moment; half(*args) is done before the end."""
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self(lambda: half(original, *args) if half else None)
            result = original(*args, **kwargs)
            if after:
                self()
            return result

        setattr(owner, name, watched)


def _half_a_file(write, path, data, *_):
    write(path, data[: len(data) // 2])


def _half_a_line(_, folder, record):
    with open(Path(folder) / "log.jsonl", "a") as file:
        file.write(repr(record)[: len(repr(record)) // 2])


def watch_everything(last: int) -> Moments:
    from minisb import checkpoint, train

    moments = Moments(last)
    moments.watch(os, "replace", after=True)
    moments.watch(os, "fsync")
    moments.watch(Path, "write_bytes", _half_a_file)
    moments.watch(Path, "write_text", _half_a_file)
    moments.watch(checkpoint, "append_log", _half_a_line)
    moments.watch(train, "batch")
    moments.watch(train, "update", after=True)
    return moments


def press_ctrl_c(at: int):
    from minisb import train

    original, seen = train.batch, []

    def batch(*args):
        seen.append(args)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    train.batch = batch


if __name__ == "__main__":
    from minisb import cli

    how, number, *argv = sys.argv[1:]
    import train_small

    moments = watch_everything(int(number)) if how == "kill" else press_ctrl_c(int(number))
    code = cli.run(train_small.main, argv)
    if moments:
        print(moments.seen, file=sys.stderr)
    sys.exit(code)
