# %% [markdown]
# 04 Gated linear attention in three forms.
#
# One head.  T tokens, D channels; q, k, v, log_g are (T,D), the state is (D,D) with the key axis first.
#
#     S_t = diag(g_t) S_{t-1} + k_t v_t^T        g_t = exp(log_g_t), every log_g <= 0
#     o_t = D^-0.5 * q_t S_t
#
# Three functions, one answer.  Replace each `raise` by your code; helpers may go in the same cell.

# %% imports
import numpy as np


# %% gla_step
def gla_step(q, k, v, log_g, state):
    """One token: q, k, v, log_g (D,), state (D,D) -> o (D,), the new state (D,D).

    S_t = diag(g_t) S_{t-1} + k_t v_t^T,  o_t = D^-0.5 * q_t S_t.
    Return a new state; leave the old one as it was.
    """
    raise NotImplementedError("gla_step")


# %% gla_recurrent
def gla_recurrent(q, k, v, log_g, state):
    """All tokens, one after the other: q, k, v, log_g (T,D), state (D,D) -> o (T,D), the last state (D,D)."""
    raise NotImplementedError("gla_recurrent")


# %% gla_parallel
def gla_parallel(q, k, v, log_g):
    """All pairs of tokens at once, without a state: q, k, v, log_g (T,D) -> o (T,D).

    The same o as gla_recurrent from an empty state (zeros).  No loop over tokens: arrays of (T,T) or
    (T,T,D) are fine here.  Every exponent that you take must be <= 0.
    """
    raise NotImplementedError("gla_parallel")


# %% gla_chunk
def gla_chunk(q, k, v, log_g, state, chunk):
    """Chunks of `chunk` tokens: q, k, v, log_g (T,D), state (D,D) -> o (T,D), the last state (D,D).

    Inside a chunk as in gla_parallel; from chunk to chunk only the state is handed on.  T need not be
    a multiple of chunk.  Must stay finite for any log_g <= 0, in float32 too.
    """
    raise NotImplementedError("gla_chunk")
