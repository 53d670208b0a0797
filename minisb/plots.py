"""Pictures, with matplotlib (pip install -e ".[plots]").

    python -m minisb.plots runs/nano docs/loss.png          the loss curve of a run
    python -m minisb spikes runs/nano --pictures docs       its spikes
    python -m minisb.plots sweep.json docs/spike_sweep.png  what bench/spike_sweep.py printed
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from minisb.backend import on_host
from minisb.checkpoint import load_config, read_log
from minisb.cli import run
from minisb.errors import MinisbError
from minisb.ops.codes import CODES, RATE, SIGNED, encode, step_values
from minisb.ops.neuron import adaptive_neuron, fixed_neuron, over_excited_share, silent_share

BLUE, ORANGE, GREY, GREEN = "#1d4ed8", "#ea580c", "#94a3b8", "#16a34a"


def _pyplot():
    """Raises MinisbError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise MinisbError('pictures need matplotlib: pip install -e ".[plots]"') from None
    matplotlib.use("Agg")  # no window: this also runs where there is no screen
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                         "font.size": 9, "axes.titlesize": 10})  # fmt: skip
    return plt


def _save(plt, figure, picture) -> Path:
    figure.savefig(picture)
    plt.close(figure)
    return Path(picture)


def loss_curve(folder, picture, bigram: float | None = None):
    """Training and validation loss of the run in `folder`, in nats a token, over tokens -> a PNG.

    bigram: the baseline's loss, drawn as a line.
    Raises MinisbError if the run has logged nothing yet or matplotlib is not installed.
    """
    plt = _pyplot()
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
    axes.legend(fontsize=8)
    figure.tight_layout()
    _save(plt, figure, picture)


def expert_load(folder, picture) -> Path:
    """What share of the tokens each expert took over a run, the layers with experts below each other -> a PNG.

    White is the fair share 1/E, blue is less, orange is more.
    """
    plt = _pyplot()
    log = [entry for entry in read_log(folder) if "expert_load" in entry]
    if not log:
        raise MinisbError(f"{folder} has logged no load of experts.")
    layers = list(log[0]["expert_load"])
    load = np.array([[entry["expert_load"][layer] for layer in layers] for entry in log])  # (steps, layers, E)
    E = load.shape[2]
    over = np.log2(np.maximum(load * E, 1 / 8))  # fair shares, as a logarithm
    colours = plt.matplotlib.colors.LinearSegmentedColormap.from_list("load", [BLUE, "white", ORANGE])
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.11 * len(layers) * min(E, 8)), dpi=120)
    rows = over.reshape(len(log), -1).T
    ends = (0, log[-1]["tokens"], len(layers), 0)
    image = axes.imshow(rows, aspect="auto", cmap=colours, vmin=-3, vmax=3, extent=ends, interpolation="nearest")
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=7)
    axes.hlines(np.arange(1, len(layers)), 0, log[-1]["tokens"], color="white", lw=1)
    axes.set_ylabel("layer")
    axes.set_xlabel("tokens read")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if log[-1]["tokens"] > 1e5 else f"{x:g}")
    bar = figure.colorbar(image, ax=axes, ticks=[-3, 0, 3], shrink=min(1.0, 8 / len(layers)))
    bar.ax.set_yticklabels(["1/8", "fair", "x 8"], fontsize=7)
    axes.set_title(f"share of the tokens that each of a layer's {E} experts took")
    figure.tight_layout()
    return _save(plt, figure, picture)


def raster(counts, picture) -> Path:
    """The same counts (N,) in every code, one neuron a row, time to the right (report, figure 10) -> a PNG.

    Codes of bits are drawn highest bit first, as the report does; they are stored lowest first.
    Codes without a sign are given |count|.
    """
    plt = _pyplot()
    counts = np.asarray(counts, np.int64)
    trains = {code: encode(counts if code in SIGNED else np.abs(counts), code) for code in CODES}
    figure, panels = plt.subplots(
        1, len(CODES), figsize=(9.6, 4.4), dpi=120, sharey=True,
        width_ratios=[max(len(train), 6) for train in trains.values()],
    )  # fmt: skip
    for axes, (code, train) in zip(panels, trains.items(), strict=True):
        drawn = train if code in RATE else train[::-1]
        for sign, colour in ((1, BLUE), (-1, ORANGE)):
            step, neuron = np.nonzero(drawn == sign)
            axes.scatter(step, neuron, s=17, marker="s", linewidths=0, color=colour)
        steps = len(train)
        ticks = np.arange(steps) if code not in RATE else np.linspace(0, steps - 1, 4).astype(int)
        labels = step_values(code, steps)[::-1] if code not in RATE else ticks + 1
        axes.set_xticks(ticks, labels, fontsize=8)
        axes.set_xlim(-0.7, steps - 0.3)
        axes.set_xlabel("time step" if code in RATE else "value of the step", fontsize=8)
        name = {"twos_complement": "two's complement"}.get(code, code) + ", |count|" * (code not in SIGNED)
        spikes = np.count_nonzero(train)
        axes.set_title(f"{name}\n{steps} steps\n{spikes} spikes", fontsize=8.5)
    panels[0].set_ylabel("channel")
    panels[0].set_ylim(len(counts) - 0.3, -0.7)
    for colour, label in ((BLUE, "spike +1"), (ORANGE, "spike -1")):
        panels[0].scatter([], [], s=40, marker="s", linewidths=0, color=colour, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1), w_pad=0.6)
    return _save(plt, figure, picture)


def count_histogram(tally, picture, k: float, most: int = 24) -> Path:
    """How often each count came, of a meter's Tally (report, figure 9) -> a PNG.  most: the rest is one bar."""
    plt = _pyplot()
    values = np.clip(np.arange(-tally.reach, tally.reach + 1), -most, most)
    shares = np.bincount(values + most, weights=tally.seen, minlength=2 * most + 1) / tally.seen.sum()
    at = np.arange(-most, most + 1)
    inside = np.abs(at) <= 7
    figure, axes = plt.subplots(figsize=(7.2, 3.4), dpi=130)
    axes.bar(at[inside], shares[inside], color=BLUE, label=f"|count| <= 7: {shares[inside].sum():.1%}")
    axes.bar(at[~inside], shares[~inside], color=ORANGE, label=f"|count| > 7: {shares[~inside].sum():.1%}")
    axes.bar([0], shares[[most]], color=GREY, label=f"silent: {shares[most]:.1%}")
    axes.set_yscale("log")
    ticks = np.arange(-most + most % 8, most, 8)
    axes.set_xticks([-most, *ticks[1:], most], [f"<={-most}", *ticks[1:], f">={most}"])
    axes.set_xlabel("spike count of a (token, channel)")
    axes.set_ylabel("share, logarithmic")
    axes.set_title(f"spike counts at k = {k:g}, all projections")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return _save(plt, figure, picture)


def thresholds(picture, k: float = 3.0, steps: int = 16, tokens: int = 400, seed: int = 0) -> Path:
    """Silent and over-excited neurons under a fixed and an adaptive threshold -> a PNG.

    Tokens of 256 normal activations, each token times 10^U(-1, 1); the fixed threshold is that of the whole.
    """
    plt = _pyplot()
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-1, 1, (tokens, 1))
    x = rng.standard_normal((tokens, 256)) * size
    vth = np.abs(x).mean(-1, keepdims=True) / k
    neurons = {
        "one fixed threshold, leaky neuron": fixed_neuron(x, np.abs(x).mean(), steps),
        "a threshold a token (eq. 19-20)": adaptive_neuron(x, vth, steps, vth / 2),
    }
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.3), dpi=120, sharey=True)
    for axes, (name, spikes) in zip(panels, neurons.items(), strict=True):
        counts = spikes.sum(0, dtype=np.int64)
        axes.scatter(size, silent_share(counts, -1), s=9, color=GREY, label="silent")
        axes.scatter(size, over_excited_share(counts, steps - 1, -1), s=9, color=ORANGE, label="fire at every step")
        axes.set_xscale("log")
        axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        axes.set_xlabel("size of the token's activations")
        axes.set_title(name)
    panels[0].set_ylabel(f"share of its neurons, {steps} steps")
    panels[0].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    panels[1].legend(fontsize=9, loc="center right", markerscale=2)
    figure.tight_layout()
    return _save(plt, figure, picture)


def sweep_curves(result: dict, picture) -> Path:
    """Loss and sparsity over k, from the JSON of bench/spike_sweep.py -> a PNG."""
    plt = _pyplot()
    rows = result["by_k"] + ([result["at_report_sparsity"]] if result["at_report_sparsity"] else [])
    rows = sorted(rows, key=lambda row: row["k"])
    ks = [row["k"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), dpi=120)
    left.plot(ks, [100 * row["cost_untrained"] for row in rows], "x--", color=GREY, label="spikes switched on")
    left.plot(ks, [100 * row["cost"] for row in rows], "o-", color=BLUE, ms=4, label="trained with spikes")
    for row, marker in zip(result["broken"], "^v", strict=False):
        left.plot(row["k"], 100 * row["cost"], marker, color=ORANGE, ms=6, label=f"broken backward: {row['name']}")
    left.axhline(0, color=GREEN, lw=1, ls=":", label="float")
    left.set_ylabel("loss against the float twin, %")
    left.legend(fontsize=8)
    right.plot(ks, [row["sparsity"] for row in rows], "o-", color=BLUE, ms=4, label="all channels")
    right.plot(ks, [row["sparsity_firing"] for row in rows], "x--", color=GREY, label="channels that fire")
    right.axhline(0.6915, color=GREEN, lw=1, ls=":", label="the report, 69.15 %")
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    right.set_ylabel("empty slots of the 3-step window")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("k (threshold = mean|x| / k)")
    figure.tight_layout()
    return _save(plt, figure, picture)


def draw_spikes(folder, model, sample, tallies) -> list[Path]:
    """The pictures of a measured run (minisb/spikes_cli.py) -> their paths in `folder`, which is made.

    sample (N,): tokens, of which the first is looked at; tallies: of meter.measure.
    """
    _pyplot()
    from minisb.meter import Tally  # here: a loss curve needs no meter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    return [
        raster(_some_counts(model, sample), folder / "spike_raster.png"),
        count_histogram(total, folder / "spike_counts.png", model.config.spike_k),
        thresholds(folder / "spike_thresholds.png", model.config.spike_k),
    ]


def _some_counts(model, sample, channels: int = 32, most: int = 15):
    """Counts of one token's first channels in the first spiking projection, those of up to 4 bits."""
    seen = []
    model.forward(sample[None, : model.config.seq_len], True, lambda name, x: seen.append((name, x)))
    counts = next(x for name, x in seen if name.endswith(".count"))[0, -1]
    counts = on_host(counts)
    return counts[np.abs(counts) <= most][:channels].astype(np.int64)


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2:
        raise MinisbError("usage: python -m minisb.plots RUN|SWEEP.json PICTURE.png")
    source, picture = arguments
    if source.endswith(".json"):
        sweep_curves(_last_json(source), picture)
    else:
        loss_curve(source, picture)
    return 0


def _last_json(path) -> dict:
    """The last line of a file, such as the kept output of bench/spike_sweep.py."""
    try:
        result = json.loads(Path(path).read_text("utf-8").splitlines()[-1])
        if not {"by_k", "broken", "at_report_sparsity"} <= set(result):
            raise ValueError("keys are missing")
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise MinisbError(f"{path} does not end with the JSON line of bench/spike_sweep.py: {error}.") from error
    return result


if __name__ == "__main__":
    sys.exit(run(main))
