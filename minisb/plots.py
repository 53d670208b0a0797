"""Pictures of a run, with matplotlib (pip install -e ".[plots]").

    python -m minisb.plots runs/nano docs/loss.png
"""

from __future__ import annotations

import math
import sys

from minisb.checkpoint import load_config, read_log
from minisb.cli import run
from minisb.errors import MinisbError


def loss_curve(folder, picture, bigram: float | None = None):
    """Training and validation loss of the run in `folder`, in nats a token, over tokens -> a PNG.

    bigram: the baseline's loss, drawn as a line.
    Raises MinisbError if the run has logged nothing yet or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MinisbError('pictures need matplotlib: pip install -e ".[plots]"') from None
    matplotlib.use("Agg")  # no window: this also runs where there is no screen
    import matplotlib.pyplot as plt

    log = read_log(folder)
    if not log:
        raise MinisbError(f"{folder} has no logged steps to draw yet.")
    values = load_config(folder)
    first_spiking = math.ceil(values["training"]["spike_from"] * values["model"].steps)
    spikes_from = first_spiking * log[-1]["tokens"] / log[-1]["step"]
    evaluated = [entry for entry in log if "val_loss" in entry]

    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=130)
    axes.plot([e["tokens"] for e in log], [e["loss"] for e in log], color="#94a3b8", lw=1, label="training")
    tokens = [e["tokens"] for e in evaluated]
    axes.plot(tokens, [e["val_loss"] for e in evaluated], "o-", color="#1d4ed8", ms=4, label="unseen files")
    axes.plot(tokens, [e["val_loss_spike"] for e in evaluated], "x--", color="#ea580c", ms=5,
              label="unseen files, with spikes")
    if bigram:
        axes.axhline(bigram, color="#16a34a", ls=":", label="bigram baseline")
    if spikes_from < log[-1]["tokens"]:
        axes.axvspan(spikes_from, log[-1]["tokens"], color="#fed7aa", alpha=0.4, lw=0, label="training with spikes")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        raise MinisbError("usage: python -m minisb.plots RUN PICTURE.png")
    loss_curve(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
