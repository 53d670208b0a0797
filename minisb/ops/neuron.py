"""Neurons in time: the adaptive one behind the spike counts, and a fixed one to compare it with.

`spike_forward` (ops/spike.py) computes a whole train's count at once.  `adaptive_neuron` plays the same
train step by step (report, eq. 20), and `fixed_neuron` is what most spiking networks use instead.
Both take negative activations by sign and magnitude: the neuron sees |x|, its spikes get x's sign.
"""

from __future__ import annotations

import numpy as np

from minisb.errors import MinisbError


def adaptive_neuron(x, vth, steps: int, v0=0.0):
    """The time-expanded neuron of eq. 20: no leak, soft reset, threshold per token.

    x (..., C), the whole input, which arrives at t = 0; vth, v0 scalars or (..., 1) -> spikes (steps, ..., C) int8.
        v_t = v_{t-1} + x_t - vth * s_t,   s_t = 1 where the potential has reached vth
    With enough steps the train sums up to floor(|x| / vth) * sign(x) from v0 = 0, and to the rounding of
    eq. 21 from v0 = vth / 2 (away from ties: there rint goes to the even count and the neuron fires).
    """
    x, vth = _input(x, vth, steps)
    potential = np.abs(x) + v0
    spikes = np.zeros((steps, *x.shape), np.int8)
    for t in range(steps):
        fires = potential >= vth
        potential -= vth * fires
        spikes[t] = fires
    return spikes * np.sign(x).astype(np.int8)


def fixed_neuron(x, vth, steps: int, leak: float = 0.5, v_reset: float = 0.0):
    """The textbook leaky integrate-and-fire neuron under a constant current, one threshold for all.

    x (...), the current of every step; vth scalar -> spikes (steps, ...) int8.
        v_t = v_{t-1} + leak * (|x| - (v_{t-1} - v_reset)),   s_t = 1 and v_t = v_reset where v_t >= vth
    that is tau dv/dt = -(v - v_reset) + |x| in Euler steps with leak = dt / tau, and a hard reset.
    A current that stays under vth never fires, one over vth / leak fires at every step: between silence
    and saturation lies a factor 1 / leak, whatever the number of steps.
    """
    x, vth = _input(x, vth, steps)
    if vth.size != 1:
        raise MinisbError(f"a fixed neuron has one threshold for all inputs, got {vth.size}.")
    if not 0 < leak <= 1:
        raise MinisbError(f"leak is the share of the potential lost in a step, above 0 and at most 1; got {leak}.")
    current = np.abs(x)
    potential = np.full(x.shape, v_reset, np.float64)
    spikes = np.zeros((steps, *x.shape), np.int8)
    for t in range(steps):
        potential += leak * (current - (potential - v_reset))
        fires = potential >= vth
        potential[fires] = v_reset
        spikes[t] = fires
    return spikes * np.sign(x).astype(np.int8)


def silent_share(counts, axis=None):
    """The share of counts (...) that are 0, over all of them or along axis (-1: for each token)."""
    return (np.asarray(counts) == 0).mean(axis)


def over_excited_share(counts, limit: int, axis=None):
    """The share of counts (...) with |count| > limit: trains longer than the time there is for them."""
    return (np.abs(np.asarray(counts)) > limit).mean(axis)


def _input(x, vth, steps):
    x, vth = np.asarray(x, np.float64), np.asarray(vth, np.float64)
    if not (vth > 0).all():
        raise MinisbError("a neuron's threshold must be above 0.")
    if steps < 1:
        raise MinisbError(f"a spike train has at least 1 step, got {steps}.")
    if x.ndim < 1:
        raise MinisbError("a neuron's input has at least one axis.")
    return x, vth
