"""Draws picture.png: python lessons/10_adaptive_threshold/picture.py"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lessons._lib.book import lesson  # noqa: E402
from lessons._lib.pictures import GREY, STUDENT, pyplot, raster  # noqa: E402
from minisb.backend import Backend  # noqa: E402
from minisb.ops.neuron import adaptive_neuron  # noqa: E402
from minisb.ops.spike import spike_count, threshold  # noqa: E402

CHANNELS = 14


def main():
    plt, be = pyplot(), Backend(1)
    x = np.random.default_rng(6).laplace(size=(1, CHANNELS))
    vth = threshold(be, x, 2.0)
    counts = spike_count(be, x, vth)[0].astype(int)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    channels = np.arange(CHANNELS)
    axes[0].barh(channels, x[0], color=GREY)
    for n in range(-6, 7):
        axes[0].axvline(n * vth[0, 0], color=STUDENT, lw=0.5 + (n in (-1, 1)), alpha=0.9 if n in (-1, 1) else 0.35)
    for channel, count in zip(channels, counts, strict=True):
        axes[0].text(6.4 * vth[0, 0], channel, f"{count:+d}" if count else "0", va="center", fontsize=8)
    axes[0].set_xlim(-6.6 * vth[0, 0], 7.3 * vth[0, 0])
    axes[0].set_ylim(-0.7, CHANNELS - 0.3)
    axes[0].set_title("one token: activations, multiples of Vth,\nand the counts at the right")
    axes[0].set_ylabel("channel")
    axes[0].set_xlabel("activation")
    raster(
        axes[1], adaptive_neuron(x, vth, 8, vth / 2)[:, 0], "the same token, played in time\n(crosses: spikes of -1)"
    )
    check = lesson("10").check
    check.draw_shares(axes[2], lambda x, k: threshold(be, x, k), lambda x, vth: spike_count(be, x, vth), "per token")
    axes[2].set_title("channels that say nothing, or shout,\nas the token's size changes")
    figure.savefig(Path(__file__).with_name("picture.png"))
    print(f"counts {counts.tolist()}, Vth {vth[0, 0]:.3f}")


if __name__ == "__main__":
    main()
