# %% [markdown]
# 10 Neurons with an adaptive threshold.
#
# N tokens of C channels: x is (N,C).  Two conventions hold in all four functions:
#
#     Vth = mean |x| / k over the channels of a token, kept between 1e-5 and 1e4 (after the division)
#     count = x / Vth rounded to a whole number; a tie (1.5, 2.5) goes to the even one
#
# Replace each `raise` by your code; helpers may go in the same cell.

# %% imports
import numpy as np


# %% threshold
def threshold(x, k):
    """x (N,C) -> vth (N,1), by the convention above."""
    raise NotImplementedError("threshold")


# %% spike_count
def spike_count(x, vth):
    """x (N,C), vth (N,1) -> the counts (N,C), whole numbers with the sign of x, by the convention above."""
    raise NotImplementedError("spike_count")


# %% simulate_neuron
def simulate_neuron(x, vth, steps, v0):
    """x (N,C) >= 0, vth (N,1), v0 (N,1) -> spikes (steps,N,C), each 0 or 1.

    Every neuron starts with the potential v0 + x: all of its input has arrived before the first step.
    In each step, a neuron whose potential has reached vth (v >= vth) fires, and its potential falls by vth.
    """
    raise NotImplementedError("simulate_neuron")


# %% ste_backward
def ste_backward(dy, x, w, k):
    """Gradients of a projection that reads spikes, straight through the rounding.

    Forward: x_hat = count * vth, y = x_hat w^T, with x (N,I), w (O,I), y (N,O).
    dy (N,O) is the gradient of y -> dx (N,I), dw (O,I).
    """
    raise NotImplementedError("ste_backward")
