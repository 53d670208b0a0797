"""Draws picture.png: python lessons/11_spike_codes/picture.py"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lessons._lib.pictures import pyplot, raster  # noqa: E402
from minisb.ops.codes import encode, spikes_emitted, steps_needed  # noqa: E402

COUNTS = np.array([0, 1, 2, 3, 5, 7, 12, -1, -3, -6])
SHOWN = ("binary", "ternary", "bitwise", "bidirectional", "twos_complement")


def main():
    plt = pyplot()
    figure, axes = plt.subplots(1, 5, figsize=(12.5, 3.6), layout="constrained", width_ratios=[2.2, 2.2, 1, 1, 1.1])
    for ax, code in zip(axes, SHOWN, strict=True):
        counts = np.abs(COUNTS) if code in ("binary", "bitwise") else COUNTS
        steps, spikes = steps_needed(counts, code), int(spikes_emitted(counts, code, steps_needed(counts, code)).sum())
        raster(ax, encode(counts, code, steps), f"{code}\n{steps} steps, {spikes} spikes")
        ax.set_yticks(range(len(counts)), counts)
        ax.set_ylabel("count")
        ax.set_xticks(range(0, steps, 1 if steps < 6 else 2))
    figure.savefig(Path(__file__).with_name("picture.png"))


if __name__ == "__main__":
    main()
