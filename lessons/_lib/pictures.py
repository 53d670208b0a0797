"""Pictures of the student's result beside the reference; text where matplotlib is not installed."""

from __future__ import annotations

import numpy as np

SHADES = " .:-=+*#%@"
#: The package's own colours: the student's in orange, the reference in blue.
STUDENT, REFERENCE, GREY = "#ea580c", "#1d4ed8", "#94a3b8"


def pyplot():
    """matplotlib.pyplot without a window, or None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "font.size": 9,
            "axes.titlesize": 9,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt


def as_text(title: str, image) -> str:
    """A small picture in letters: rows of `image`, dark where |value| is large."""
    image = np.abs(np.atleast_2d(np.asarray(image, np.float64)))
    top = image[np.isfinite(image)].max(initial=0) or 1.0
    rows = []
    for row in image:
        levels = np.nan_to_num(row / top, nan=0, posinf=1).clip(0, 1) * (len(SHADES) - 1)
        rows.append("".join(SHADES[int(round(level))] for level in levels))
    return "\n".join([title, *(f"  |{row}|" for row in rows)])


def side_by_side(pairs) -> str:
    return "\n".join(as_text(title, image) for title, image in pairs)


def heat(axes, image, title: str, x: str, y: str, **kwargs):
    shown = axes.imshow(image, aspect="auto", interpolation="nearest", **{"cmap": "viridis", **kwargs})
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return shown


def raster(axes, spikes, title: str, colour: str = "black"):
    """spikes (steps, channels): steps counted from 0; a tick for each spike of +1, a red cross for each of -1."""
    spikes = np.asarray(spikes)
    for sign, marker, size, ink in ((1, "|", 60, colour), (-1, "x", 22, "#dc2626")):
        step, channel = np.nonzero(spikes == sign)
        axes.scatter(step, channel, marker=marker, s=size, linewidths=1.6, color=ink)
    axes.set_title(title)
    axes.set_xlabel("time step")
    axes.set_ylabel("channel")
    axes.set_xlim(-0.7, spikes.shape[0] - 0.3)
    axes.set_ylim(-0.7, spikes.shape[1] - 0.3)
