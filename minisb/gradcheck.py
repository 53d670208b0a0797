"""Gradient checks: one random direction, float64, a random upstream gradient.

For y = f(x, ...) and a fixed random upstream u, L = sum(u * y) is a number.  Along a random
direction d its derivative is sum(dx * d), which a central difference of L must equal:
    (L(x + h d) - L(x - h d)) / 2h
An upstream of ones would pass a softmax backward that returns zeros; a random one does not.
"""

from __future__ import annotations

import numpy as np

LIMIT = 1e-6
STEP = 1e-5

#: How many checks have run, for the test suite's closing line.
ran = 0


def directional(loss, inputs: dict, grads: dict, seed: int = 0, step: float = STEP) -> float:
    """The relative error of `grads` along one random direction through all `inputs` at once.

    loss() -> float reads the arrays in `inputs` (float64, changed in place and restored).
    """
    global ran
    ran += 1
    rng = np.random.default_rng(seed)
    directions = {name: rng.standard_normal(x.shape) for name, x in inputs.items()}
    analytic = sum(float((grads[name] * directions[name]).sum()) for name in inputs)
    base = {name: x.copy() for name, x in inputs.items()}
    values = []
    for sign in (1, -1):
        for name, x in inputs.items():
            x[...] = base[name] + sign * step * directions[name]
        values.append(loss())
    for name, x in inputs.items():
        x[...] = base[name]
    numeric = (values[0] - values[1]) / (2 * step)
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-8)


def elementwise(loss, x, dx, step: float = STEP) -> float:
    """The largest error of dx against differences entry by entry, relative to the largest entry."""
    global ran
    ran += 1
    numeric = np.empty_like(dx)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        up = loss()
        x[index] = kept - step
        numeric[index] = (up - loss()) / (2 * step)
        x[index] = kept
    return float(np.abs(numeric - dx).max() / max(np.abs(numeric).max(), 1e-8))


def relative_rms(x, reference) -> float:
    """||x - reference|| / ||reference||, in float64."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), 1e-300))
