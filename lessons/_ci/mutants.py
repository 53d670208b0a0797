"""Plausible wrong answers: the adapters with one thing changed.  Each must fail at least one check.

MUTANTS: lesson -> list of (function, what is wrong, the wrong function).  Here are those of lesson 04;
those of 10 and 11 stand in mutants_spikes.py.
"""

from __future__ import annotations

import numpy as np

from lessons._ci import adapters as right

MUTANTS: dict[str, list] = {}


def mutant(lesson: str, function: str):
    """Register the decorated function as a wrong answer; its docstring says what is wrong."""

    def register(f):
        MUTANTS.setdefault(lesson, []).append((function, f.__doc__, f))
        return f

    return register


# --- 04 --------------------------------------------------------------------------------------------


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """the gate is forgotten"""
    return right.gla_step(q, k, v, 0 * log_g, state)


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """the gate lets the state grow"""
    return right.gla_step(q, k, v, -log_g, state)


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """the gate fades columns instead of rows"""
    new = right.gla_step(q, v, k, log_g, state.T)[1].T
    return len(q) ** -0.5 * q @ new, new


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """the new token is faded too: g (S + k v)"""
    return right.gla_step(q, k * np.exp(log_g), v, log_g, state)


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """reads before it writes"""
    return len(q) ** -0.5 * q @ state, right.gla_step(q, k, v, log_g, state)[1]


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """without the scale"""
    o, new = right.gla_step(q, k, v, log_g, state)
    return o * len(q) ** 0.5, new


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """writes into the state that it was given"""
    o, state[...] = right.gla_step(q, k, v, log_g, state)
    return o, state


@mutant("04", "gla_recurrent")
def _(q, k, v, log_g, state):
    """the gates come one token late"""
    late = np.vstack([np.zeros_like(log_g[:1]), log_g[:-1]])
    return right.gla_recurrent(q, k, v, late, state)


@mutant("04", "gla_recurrent")
def _(q, k, v, log_g, state):
    """starts from zeros whatever it is given"""
    return right.gla_recurrent(q, k, v, log_g, 0 * state)


@mutant("04", "gla_recurrent")
def _(q, k, v, log_g, state):
    """returns the state before the last token"""
    o, _ = right.gla_recurrent(q, k, v, log_g, state)
    return o, right.gla_recurrent(q[:-1], k[:-1], v[:-1], log_g[:-1], state)[1] if len(q) > 1 else state


@mutant("04", "gla_recurrent")
def _(q, k, v, log_g, state):
    """one gate for all channels of a token"""
    return right.gla_recurrent(q, k, v, np.broadcast_to(log_g.mean(1, keepdims=True), log_g.shape), state)


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """no mask: later tokens are seen"""
    flipped = [x[::-1] for x in (q, k, v, log_g)]
    own = (q * k).sum(1, keepdims=True) * v * q.shape[1] ** -0.5
    return right.gla_parallel(q, k, v, log_g) + right.gla_parallel(*flipped)[::-1] - own


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """the mask leaves the token itself out"""
    return right.gla_parallel(q, k, v, log_g) - (q * k).sum(1, keepdims=True) * v * q.shape[1] ** -0.5


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """the writer's own gate is counted: exp(b_t - b_{s-1})"""
    return right.gla_parallel(q, k * np.exp(log_g), v, log_g)


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """log_g instead of its running sum"""
    decay = np.exp(log_g[:, None] - log_g[None])
    weights = np.tril(np.einsum("td,sd,tsd->ts", q, k, decay))
    return q.shape[1] ** -0.5 * weights @ v


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """the mask comes after the exponential: infinity times zero at strong gates"""
    b = log_g.cumsum(0)
    with np.errstate(all="ignore"):
        decay = np.exp(b[:, None] - b[None]) * np.tri(len(b))[..., None]
        return q.shape[1] ** -0.5 * np.einsum("td,sd,tsd->ts", q, k, decay) @ v


@mutant("04", "gla_parallel")
def _(q, k, v, log_g):
    """exp(b_t) times exp(-b_s): overflows at strong gates"""
    b = log_g.cumsum(0)
    with np.errstate(all="ignore"):
        return q.shape[1] ** -0.5 * np.tril((q * np.exp(b)) @ (k * np.exp(-b)).T) @ v


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """k * v instead of the outer product"""
    return right.gla_step(q, np.ones_like(k), k * v, log_g, state)


@mutant("04", "gla_step")
def _(q, k, v, log_g, state):
    """the new state comes transposed"""
    o, new = right.gla_step(q, k, v, log_g, state)
    return o, new.T


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """older tokens are read without exp(b) on the query"""
    return read_older(q, k, v, log_g, state, chunk, lambda b: np.ones_like(b))


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """older tokens are read with exp(-b) on the query"""
    return read_older(q, k, v, log_g, state, chunk, lambda b: np.exp(-b))


def read_older(q, k, v, log_g, state, chunk, factor):
    """gla_chunk whose queries read the state with factor(b) instead of exp(b)."""
    outputs = []
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        tokens = (q[at], k[at], v[at], log_g[at])
        with np.errstate(all="ignore"):
            older = q.shape[1] ** -0.5 * (q[at] * factor(log_g[at].cumsum(0))) @ state
        outputs.append(right.gla_recurrent(*tokens, 0 * state)[0] + older)
        state = right.gla_recurrent(*tokens, state)[1]
    return np.vstack(outputs), state


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """only whole chunks come back: the outputs are too short"""
    whole = max(len(q) // chunk, 1) * chunk
    return right.gla_chunk(q[:whole], k[:whole], v[:whole], log_g[:whole], state, chunk)


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """k is divided by the decay, q multiplied with it: overflows at strong gates"""
    o = np.empty_like(v)
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        b = log_g[at].cumsum(0)
        with np.errstate(all="ignore"):
            reader, writer = q[at] * np.exp(b), k[at] * np.exp(-b)
            o[at] = q.shape[1] ** -0.5 * (np.tril(reader @ writer.T) @ v[at] + reader @ state)
        state = right.gla_recurrent(q[at], k[at], v[at], log_g[at], state)[1]
    return o, state


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """every chunk starts from an empty state"""
    outputs = []
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        o, state = right.gla_recurrent(q[at], k[at], v[at], log_g[at], 0 * state if start else state)
        outputs.append(o)
    return np.vstack(outputs), state


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """the tokens after the last whole chunk are dropped"""
    whole = max(len(q) // chunk, 1) * chunk
    o, state = right.gla_chunk(q[:whole], k[:whole], v[:whole], log_g[:whole], state, chunk)
    return np.vstack([o, np.zeros_like(q[whole:])]), state


@mutant("04", "gla_chunk")
def _(q, k, v, log_g, state, chunk):
    """the state is not faded from chunk to chunk"""
    outputs = []
    for start in range(0, len(q), chunk):
        at = slice(start, start + chunk)
        o, _ = right.gla_recurrent(q[at], k[at], v[at], log_g[at], state)
        state = state + right.gla_recurrent(q[at], k[at], v[at], log_g[at], 0 * state)[1]
        outputs.append(o)
    return np.vstack(outputs), state
