# %% [markdown]
# 11 Spike codes: how a whole number travels as a train of spikes.
#
# counts have any shape (...); spikes are (steps, ...): time is the first axis.  Two conventions:
#
#     binary and ternary: the first |count| steps fire, the others are silent
#     bitwise, bidirectional and two's complement: bit t travels at step t (lowest bit first)
#
# `steps` is always large enough.  Replace each `raise` by your code; helpers may go in the same cell.

# %% imports
import numpy as np


# %% encode_binary
def encode_binary(counts, steps):
    """counts (...) >= 0 -> spikes (steps, ...), each 0 or 1: as many ones as the count."""
    raise NotImplementedError("encode_binary")


# %% encode_ternary
def encode_ternary(counts, steps):
    """counts (...) of both signs -> spikes (steps, ...), each -1, 0 or 1: |count| spikes with the count's sign."""
    raise NotImplementedError("encode_ternary")


# %% encode_bitwise
def encode_bitwise(counts, steps):
    """counts (...) >= 0 -> spikes (steps, ...), each 0 or 1: the bits of the count."""
    raise NotImplementedError("encode_bitwise")


# %% encode_bidirectional
def encode_bidirectional(counts, steps):
    """counts (...) of both signs -> spikes (steps, ...), each -1, 0 or 1: the bits of |count| with the count's sign."""
    raise NotImplementedError("encode_bidirectional")


# %% encode_twos_complement
def encode_twos_complement(counts, steps):
    """counts (...) from -2^(steps-1) to 2^(steps-1) - 1 -> spikes (steps, ...), each 0 or 1.

    The bits of count modulo 2^steps: as bitwise, but the highest bit is worth -2^(steps-1) instead of
    +2^(steps-1).
    """
    raise NotImplementedError("encode_twos_complement")


# %% decode
def decode(spikes, code):
    """spikes (steps, ...) -> counts (...), whole numbers.

    code: "binary", "ternary", "bitwise", "bidirectional" or "twos_complement".
    """
    raise NotImplementedError("decode")


# %% event_matmul
def event_matmul(spikes, w, code):
    """spikes (steps,N,I) int8, w (O,I) int8 -> y (N,O) whole numbers, additions.

    y = counts w^T, computed step by step: a step's spikes add up weights (the column of w that belongs to
    the input which fired; a spike of -1 subtracts it), and what came together is worth what the step is worth.
    additions: how many columns of w were added or subtracted, one for each spike.
    """
    raise NotImplementedError("event_matmul")
