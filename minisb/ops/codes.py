"""Spike codes: how a whole number travels as a train of spikes (report, section 3.3.2, eq. 22-23).

A count becomes `steps` spikes, one a time step, and is read back as sum_t value_t * s_t:

    code             spike s_t    value of step t         steps for a count      signs
    binary           0, 1         1                       count                  not negative
    ternary          -1, 0, 1     1                       |count|                both
    bitwise          0, 1         2^t                     bits of count          not negative
    bidirectional    -1, 0, 1     2^t                     bits of |count|        both
    twos_complement  0, 1         2^t, the last -2^(T-1)  bits and one for sign  both

Time is the first axis and t counts from 0 here (eq. 23 counts from 1), lowest bit first; pictures
draw the highest bit first, as the report's figure 4 does.

The report gives 256, 128, 8 and 7 steps for a count of 256.  What holds exactly:
  - binary 256: for the count 256 itself.
  - ternary 128: not for 256, which takes 256 steps of one sign.  It holds for counts 0..256 that
    are moved to -128..128 first; the offset of 128 must then be added back after the product.
  - bitwise 8: not for 256, which takes 9 bits.  It holds for the 256 counts 0..255.
  - bidirectional 7: for counts -127..127.  128 and -128 take 8, and 256 itself takes 9, so the
    moved range -128..128 just misses it.
  - two's complement, for which the report gives no figure here: 8 for -128..127, 10 for 256.
`code_table(256)` prints these.

A product with spike-coded inputs needs additions only: y = sum_t value_t * (W s_t), where W s_t
adds up the columns of W whose input fires, and value_t is a shift (`event_linear`).
"""

from __future__ import annotations

import numpy as np

from minisb.errors import MinisbError

CODES = ("binary", "ternary", "bitwise", "bidirectional", "twos_complement")
#: Codes by what a step is worth, and by whether a count may be negative and a spike may be.
RATE, SIGNED, SIGNED_SPIKES = ("binary", "ternary"), CODES[1:2] + CODES[3:], ("ternary", "bidirectional")
#: Larger counts would overflow int64 somewhere below.
LARGEST = 1 << 61


def encode(counts, code, steps=None):
    """counts (...) whole numbers -> spikes (steps, ...) int8, lowest bit first.

    steps: length of the trains, by default steps_needed(counts, code).
    Raises MinisbError for counts that are not whole, a sign that the code lacks, or too few steps.
    """
    counts = _whole(counts, code)
    steps = _enough_steps(counts, code, steps)
    time = np.arange(steps).reshape(-1, *[1] * counts.ndim)
    if code in RATE:
        fires = time < np.abs(counts)
    elif code == "twos_complement":
        fires = counts >> time & 1  # a shift keeps the sign, so these are the bits modulo 2^steps
    else:
        fires = np.abs(counts) >> time & 1
    spikes = fires.astype(np.int8)
    return spikes * np.sign(counts).astype(np.int8) if code in SIGNED_SPIKES else spikes


def decode(spikes, code):
    """spikes (steps, ...) -> counts (...) int64: each spike times the value of its step (eq. 23)."""
    spikes = _spikes(spikes, code)
    return np.tensordot(step_values(code, len(spikes)), spikes.astype(np.int64), axes=1)


def step_values(code, steps):
    """What a spike is worth at each step, (steps,) int64."""
    _known(code)
    if steps < 1 or (code not in RATE and steps > 62):
        raise MinisbError(f"a {code} train has at least 1 step and, where bits are sent, at most 62; got {steps}.")
    if code in RATE:
        return np.ones(steps, np.int64)
    values = np.int64(1) << np.arange(steps, dtype=np.int64)
    if code == "twos_complement":
        values[-1] *= -1
    return values


def steps_needed(counts, code) -> int:
    """The fewest steps in which every one of counts (...) can be sent; at least 1."""
    counts = _whole(counts, code)
    if not counts.size:
        return 1
    most = int(np.abs(counts).max())
    if code in RATE:
        return max(most, 1)
    if code == "twos_complement":  # T bits hold -2^(T-1) .. 2^(T-1) - 1
        return max(int(counts.max()), ~int(counts.min())).bit_length() + 1
    return max(most.bit_length(), 1)


def spikes_emitted(counts, code, steps=None):
    """How many spikes the train of each count (...) has, int64; silent steps cost nothing.

    steps matters to two's complement alone, where a negative count has a one in every bit above
    its own: -1 takes one spike a step.
    """
    counts = _whole(counts, code)
    if code in RATE:
        return np.abs(counts)
    steps = _enough_steps(counts, code, steps)
    bits = counts if code == "twos_complement" else np.abs(counts)
    return sum((bits >> t & 1 for t in range(steps)), np.zeros_like(counts))


def event_linear(spikes, w, code):
    """spikes (steps, N, I), whole-numbered w (O, I) -> y (N, O) int64, additions.

    y = counts @ w.T exactly (eq. 22), without a multiplication: a spike of input i adds (or, being
    negative, subtracts) the O weights of that input, and each step's sum is shifted by its bit.
    additions: of O weights at a time, one per spike.
    """
    spikes, w = _spikes(spikes, code), np.asarray(w)
    if w.dtype.kind not in "iu":
        raise MinisbError(f"event_linear adds whole-numbered weights, got {w.dtype}.")
    if spikes.ndim != 3 or w.ndim != 2 or spikes.shape[2] != w.shape[1]:
        raise MinisbError(f"spikes (steps, N, I) do not fit weights (O, I): {spikes.shape} and {w.shape}.")
    weights_of_input = w.T.astype(np.int64)
    y = np.zeros((spikes.shape[1], w.shape[0]), np.int64)
    additions = 0
    for fired, value in zip(spikes, step_values(code, len(spikes)).tolist(), strict=True):
        step_sum = np.zeros_like(y)
        for accumulate, sign in ((np.add, 1), (np.subtract, -1)):
            token, channel = np.nonzero(fired == sign)
            accumulate.at(step_sum, token, weights_of_input[channel])
            additions += len(token)
        step_sum <<= abs(value).bit_length() - 1
        y = y + step_sum if value > 0 else y - step_sum
    return y, additions


def code_table(count: int) -> str:
    """Steps of every code for `count` itself and for ranges of that many counts, as lines to print."""
    half = count // 2
    ranges = {
        f"{count}": [count],
        f"0..{count - 1}": [0, count - 1],
        f"{-half}..{half}": [-half, half],
        f"{1 - half}..{half - 1}": [1 - half, half - 1],
    }
    lines = [f"{'steps for':<16}" + "".join(f"{name:>14}" for name in ranges) + f"{'spikes of ' + str(count):>16}"]
    for code in CODES:
        row = [steps_needed(ends, code) if min(ends) >= 0 or code in SIGNED else "-" for ends in ranges.values()]
        spikes = int(spikes_emitted(count, code))
        lines.append(f"{code:<16}" + "".join(f"{steps:>14}" for steps in row) + f"{spikes:>16}")
    return "\n".join(lines)


def _known(code):
    if code not in CODES:
        raise MinisbError(f"unknown spike code {code!r}; choose from {', '.join(CODES)}.")


def _whole(counts, code):
    """counts (...) as int64.  Raises MinisbError for fractions, NaN, and a sign that the code lacks."""
    _known(code)
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iufb":
        raise MinisbError(f"spike counts are whole numbers, got {counts.dtype}.")
    # Written so that NaN is refused too.
    if counts.dtype.kind == "f" and not (np.rint(counts) == counts).all():
        raise MinisbError("spike counts must be whole numbers: divide by the threshold and round first.")
    if counts.size and not (counts.min() > -LARGEST and counts.max() < LARGEST):
        raise MinisbError(f"spike counts must be finite and below 2^{LARGEST.bit_length() - 1} in size.")
    counts = counts.astype(np.int64)
    if code not in SIGNED and (counts < 0).any():
        raise MinisbError(f"the {code} code has no sign and got {counts.min()}: use {', '.join(SIGNED)}.")
    return counts


def _enough_steps(counts, code, steps) -> int:
    needed = steps_needed(counts, code)
    if steps is None:
        return needed
    if steps < needed:
        raise MinisbError(f"these counts need {needed} steps in the {code} code, got {steps}.")
    step_values(code, steps)  # refuses more bits than a number has
    return steps


def _spikes(spikes, code):
    _known(code)
    spikes = np.asarray(spikes)
    lowest = -1 if code in SIGNED_SPIKES else 0
    if spikes.dtype.kind not in "iub" or spikes.ndim < 1:
        raise MinisbError(f"spikes (steps, ...) are integers, got {spikes.ndim} axes of {spikes.dtype}.")
    if spikes.size and (spikes.min() < lowest or spikes.max() > 1):
        raise MinisbError(f"spikes of the {code} code are {lowest}..1, got {spikes.min()}..{spikes.max()}.")
    return spikes
