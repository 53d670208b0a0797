"""Draws picture.png: python lessons/04_gated_linear_attention/picture.py"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lessons._lib.pictures import REFERENCE, STUDENT, pyplot  # noqa: E402

T, CHUNK = 16, 4


def triangle(ax, title):
    random = np.random.default_rng(2)
    b = -random.exponential(0.16, T).cumsum()
    weights = np.tril(np.exp(b[:, None] - b[None])) * random.uniform(0.55, 1, (T, T))
    ax.imshow(np.where(np.tri(T), weights, np.nan), cmap="Greys", vmin=-0.15, vmax=1.3)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("token s, which wrote")
    ax.set_ylabel("token t, which reads")
    ax.set_xticks([0, 4, 8, 12])
    ax.set_yticks([0, 4, 8, 12])
    ax.spines[:].set_visible(False)


def box(ax, left, top, width, height, colour, **kwargs):
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=colour, lw=1.8, **kwargs))


def main():
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7), layout="constrained")
    triangle(axes[0], "recurrent: row after row,\nall of the past in one state")
    for t in range(T):
        box(axes[0], 0, t, t + 1, 1, REFERENCE)
    triangle(axes[1], "parallel: every pair (t, s)\nat once, and no state")
    for t in range(T):
        for s in range(t + 1):
            box(axes[1], s, t, 1, 1, STUDENT)
    triangle(axes[2], "chunks: pairs near the diagonal,\na state for the rest")
    for start in range(0, T, CHUNK):
        for t in range(start, start + CHUNK):
            for s in range(start, t + 1):
                box(axes[2], s, t, 1, 1, STUDENT)
        if start:
            box(axes[2], 0, start, start, CHUNK, REFERENCE)
    axes[2].text(9.2, 2.2, "orange: pairs\nblue: the state", fontsize=10)
    figure.savefig(Path(__file__).with_name("picture.png"))


if __name__ == "__main__":
    main()
