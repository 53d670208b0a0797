"""Plausible wrong answers for lessons 10 and 11, registered beside those of lessons/_ci/mutants.py."""

from __future__ import annotations

import numpy as np

from lessons._ci import adapters as right
from lessons._ci.mutants import mutant
from minisb.ops import codes

# --- 10 --------------------------------------------------------------------------------------------


@mutant("10", "threshold")
def _(x, k):
    """one threshold for all tokens"""
    return np.full((len(x), 1), np.clip(np.abs(x).mean() / k, 1e-5, 1e4))


@mutant("10", "threshold")
def _(x, k):
    """the mean of x instead of |x|"""
    return np.abs(x.mean(1, keepdims=True)) / k


@mutant("10", "threshold")
def _(x, k):
    """the mean of x, kept above the lower bound"""
    return np.clip(x.mean(1, keepdims=True) / k, 1e-5, 1e4)


@mutant("10", "threshold")
def _(x, k):
    """the mean is bounded before it is divided by k"""
    return right.threshold(x, 1) / k


@mutant("10", "threshold")
def _(x, k):
    """times k instead of divided by it"""
    return right.threshold(x, 1 / k)


@mutant("10", "threshold")
def _(x, k):
    """no bounds: an empty token divides by zero"""
    return np.abs(x).mean(1, keepdims=True) / k


@mutant("10", "threshold")
def _(x, k):
    """only the lower bound"""
    return np.maximum(np.abs(x).mean(1, keepdims=True) / k, 1e-5)


@mutant("10", "threshold")
def _(x, k):
    """root mean square instead of the mean magnitude"""
    return right.flip_10({"root mean square"})["threshold"](x, k)


@mutant("10", "threshold")
def _(x, k):
    """a mean over the tokens, a threshold for each channel"""
    return right.threshold(x.T, k)


@mutant("10", "spike_count")
def _(x, vth):
    """floor instead of rounding"""
    return np.floor(x / vth)


@mutant("10", "spike_count")
def _(x, vth):
    """cut towards zero"""
    return (x / vth).astype(int)


@mutant("10", "spike_count")
def _(x, vth):
    """ties go up"""
    return np.floor(x / vth + 0.5)


@mutant("10", "spike_count")
def _(x, vth):
    """ties go away from zero"""
    return np.sign(x) * np.floor(np.abs(x / vth) + 0.5)


@mutant("10", "spike_count")
def _(x, vth):
    """negative activations are silent"""
    return right.spike_count(np.maximum(x, 0), vth)


@mutant("10", "spike_count")
def _(x, vth):
    """the first token's threshold for all"""
    return right.spike_count(x, vth[:1])


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """a hard reset to zero"""
    return right.simulate_neuron(np.minimum(x + v0, vth), vth, steps, 0 * v0)


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """fires above the threshold only, not at it"""
    return right.simulate_neuron(x * (1 - 1e-12), vth, steps, v0)


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """forgets v0"""
    return right.simulate_neuron(x, vth, steps, 0 * v0)


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """spikes come one step late"""
    spikes = right.simulate_neuron(x, vth, steps, v0)
    return np.concatenate([0 * spikes[:1], spikes[:-1]])


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """a spike costs nothing"""
    return np.repeat((x + v0 >= vth)[None], steps, axis=0)


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """the input comes again in every step"""
    potential, spikes = v0 + 0 * x, []
    for _ in range(steps):
        potential = potential + x
        spikes.append(potential >= vth)
        potential = potential - vth * spikes[-1]
    return np.stack(spikes)


@mutant("10", "simulate_neuron")
def _(x, vth, steps, v0):
    """one threshold for all tokens"""
    return right.simulate_neuron(x, np.full_like(vth, vth.mean()), steps, v0)


@mutant("10", "ste_backward")
def _(dy, x, w, k):
    """weights are given the gradient of x, not of the spikes that were read"""
    return dy @ w, dy.T @ x


@mutant("10", "ste_backward")
def _(dy, x, w, k):
    """the true derivative of rounding: zero"""
    return 0 * x, right.ste_backward(dy, x, w, k)[1]


@mutant("10", "ste_backward")
def _(dy, x, w, k):
    """silent channels get no gradient"""
    dx, dw = right.ste_backward(dy, x, w, k)
    return dx * (np.rint(x / right.threshold(x, k)) != 0), dw


@mutant("10", "ste_backward")
def _(dy, x, w, k):
    """divides by the threshold on the way back"""
    dx, dw = right.ste_backward(dy, x, w, k)
    return dx / right.threshold(x, k), dw


@mutant("10", "ste_backward")
def _(dy, x, w, k):
    """counts instead of count * vth"""
    return dy @ w, dy.T @ np.rint(x / right.threshold(x, k))


# --- 11 --------------------------------------------------------------------------------------------


@mutant("11", "encode_binary")
def _(counts, steps):
    """one spike too many"""
    return right.encode_binary(counts + 1, steps + 1)[:steps]


@mutant("11", "encode_binary")
def _(counts, steps):
    """spikes at the end of the train"""
    return right.encode_binary(counts, steps)[::-1]


@mutant("11", "encode_binary")
def _(counts, steps):
    """time is the last axis"""
    return np.moveaxis(right.encode_binary(counts, steps), 0, -1)


@mutant("11", "encode_ternary")
def _(counts, steps):
    """without the sign"""
    return np.abs(right.encode_ternary(counts, steps))


@mutant("11", "encode_ternary")
def _(counts, steps):
    """negative counts are silent"""
    return right.encode_binary(np.maximum(counts, 0), steps)


@mutant("11", "encode_bidirectional")
def _(counts, steps):
    """without the sign"""
    return np.abs(right.encode_bidirectional(counts, steps))


@mutant("11", "encode_bidirectional")
def _(counts, steps):
    """the bits of the count itself: two's complement"""
    return right.encode_twos_complement(counts, steps)


@mutant("11", "encode_bidirectional")
def _(counts, steps):
    """only the highest bit carries the sign"""
    spikes = right.encode_bitwise(np.abs(counts), steps)
    highest = steps - 1 - np.argmax(spikes[::-1], axis=0)
    return np.where((np.arange(steps).reshape(-1, *[1] * counts.ndim) == highest) & (counts < 0), -spikes, spikes)


@mutant("11", "encode_bidirectional")
def _(counts, steps):
    """as many spikes as the count"""
    return right.encode_ternary(np.clip(counts, -steps, steps), steps)


@mutant("11", "encode_bitwise")
def _(counts, steps):
    """what the bits are worth instead of the bits"""
    return counts & (1 << np.arange(steps).reshape(-1, *[1] * counts.ndim))


@mutant("11", "encode_bitwise")
def _(counts, steps):
    """highest bit first"""
    return right.encode_bitwise(counts, steps)[::-1]


@mutant("11", "encode_bitwise")
def _(counts, steps):
    """starts at the second bit"""
    return right.encode_bitwise(counts >> 1, steps)


@mutant("11", "encode_bitwise")
def _(counts, steps):
    """as many spikes as the count"""
    return right.encode_binary(np.minimum(counts, steps), steps)


@mutant("11", "encode_twos_complement")
def _(counts, steps):
    """sign times the bits of the magnitude"""
    return codes.encode(np.clip(counts, -7, 7), "bidirectional", steps)


@mutant("11", "encode_twos_complement")
def _(counts, steps):
    """the bits of the magnitude"""
    return right.encode_bitwise(np.abs(counts), steps)


@mutant("11", "encode_twos_complement")
def _(counts, steps):
    """a sign bit and the magnitude"""
    spikes = right.encode_bitwise(np.minimum(np.abs(counts), 7), steps)
    spikes[-1] = counts < 0
    return spikes


@mutant("11", "encode_twos_complement")
def _(counts, steps):
    """one's complement: -1 is all bits of 1 turned"""
    return right.encode_twos_complement(counts - (counts < 0) * (counts > -8), steps)


@mutant("11", "decode")
def _(spikes, code):
    """every code is a rate code"""
    return spikes.sum(0)


@mutant("11", "decode")
def _(spikes, code):
    """highest bit first"""
    return right.decode(spikes[::-1], code)


@mutant("11", "decode")
def _(spikes, code):
    """the highest bit of two's complement is worth a positive power"""
    return right.decode(spikes, "bitwise" if code == "twos_complement" else code)


@mutant("11", "decode")
def _(spikes, code):
    """powers of two in int8"""
    counts = right.decode(spikes, code)
    return counts.astype(np.int8)


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """sums in int8 wrap round"""
    y, additions = right.event_matmul(spikes, w, code)
    return y.astype(np.int8), additions


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """the columns of a step are added up in int8"""
    steps = [right.event_matmul(one[None], w, "ternary")[0].astype(np.int8) for one in spikes]
    worth = codes.step_values(code, len(spikes))
    return np.tensordot(worth, np.stack(steps).astype(np.int64), 1), int(np.abs(spikes.astype(int)).sum())


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """the outputs come transposed"""
    y, additions = right.event_matmul(spikes, w, code)
    return y.T, additions


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """every step is worth 1"""
    return right.event_matmul(spikes, w, "ternary")


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """negative spikes are not counted"""
    return right.event_matmul(spikes, w, code)[0], int((spikes > 0).sum())


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """silent steps are counted"""
    return right.event_matmul(spikes, w, code)[0], spikes.size


@mutant("11", "event_matmul")
def _(spikes, w, code):
    """every weight is counted"""
    y, additions = right.event_matmul(spikes, w, code)
    return y, additions * len(w)
