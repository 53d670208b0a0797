"""Linear attention: its three forms are one, with states, strong gates and chunks of any size."""

import numpy as np
import pytest
from conftest import backend_of, backends

from minisb.gradcheck import relative_rms
from minisb.ops.gla import (
    gla_backward,
    gla_forward,
    gla_recurrent_backward,
    gla_recurrent_forward,
    gla_step,
)

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])
SHAPES = [(6, 2, 6), (3, 3, 8), (6, 2, 20)]  # H, G, D: 20 is whole vectors and a rest


def inputs(T, H, G, D, seed=0, dtype=np.float64, gates=(-5, 0), B=2):
    """q, k, v, log_g, first state."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, T, H, D))
    k, v = (rng.standard_normal((B, T, G, D)) for _ in range(2))
    log_g = rng.uniform(*gates, (B, T, G, D)) if len(gates) == 2 else np.full((B, T, G, D), float(gates[0]))
    return [x.astype(dtype) for x in (q, k, v, log_g, rng.standard_normal((B, G, D, D)))]


def upstream(o, state, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(x.shape).astype(x.dtype) for x in (o, state)]


def recurrent(x, do=None, dstate=None):
    """The definition in float64: o, final state and, with upstream gradients, all gradients."""
    be = backends()["numpy"]
    q, k, v, log_g, state = (a.astype(np.float64) for a in x)
    o, final, states = gla_recurrent_forward(be, q, k, v, log_g, state)
    grads = () if do is None else gla_recurrent_backward(be, do, dstate, q, k, v, log_g, states)
    return o, final, *grads


def chunked(be, x, do, dstate, **options):
    o, final, saved = gla_forward(be, *x, **options)
    return o, final, *gla_backward(be, do, dstate, saved)


def step_by_step(be, q, k, v, log_g, state):
    state = state.copy()
    outputs = []
    for t in range(q.shape[1]):
        at = slice(t, t + 1)
        outputs.append(gla_step(be, q[:, at], k[:, at], v[:, at], log_g[:, at], state))
    return np.concatenate(outputs, axis=1), state


@every_name
@pytest.mark.parametrize("T", [1, 63, 65, 130])
@pytest.mark.parametrize("chunk", [None, 1, 16, 64, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recurrent_chunked_and_step_are_one(name, T, chunk, shape):
    be = backend_of(name, "gla_forward")
    x = inputs(T, *shape)
    do, dstate = upstream(x[0], x[4])
    want = recurrent(x, do, dstate)
    for got, expected in zip(chunked(be, x, do, dstate, **({"chunk": chunk} if chunk else {})), want, strict=True):
        assert relative_rms(got, expected) < 1e-12
    for got, expected in zip(step_by_step(be, *x), want[:2], strict=True):
        assert relative_rms(got, expected) < 1e-12


@every_name
def test_no_state_is_a_state_of_zeros(name):
    be = backend_of(name, "gla_forward")
    x = inputs(40, 6, 2, 8)
    do, dstate = upstream(x[0], x[4])
    x[4] = np.zeros_like(x[4])
    with_zeros = chunked(be, x, do, np.zeros_like(dstate))
    without = chunked(be, x[:4], do, None)
    for got, want in zip(without, with_zeros, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)


@every_name
def test_the_first_state_is_left_alone(name):
    be = backend_of(name, "gla_forward")
    x = inputs(40, 6, 2, 8)
    do, dstate = upstream(x[0], x[4])
    before = [a.copy() for a in (*x, do, dstate)]
    chunked(be, x, do, dstate)
    for a, b in zip((*x, do, dstate), before, strict=True):
        assert np.array_equal(a, b)


@every_name
def test_the_scale_is_used(name):
    be = backend_of(name, "gla_forward")
    x = inputs(40, 6, 2, 8)
    do, dstate = upstream(x[0], x[4])
    plain = chunked(be, x, do, dstate, scale=1.0)
    half = chunked(be, [2 * x[0], *x[1:]], do, dstate, scale=0.5)
    for index, (got, want) in enumerate(zip(half, plain, strict=True)):
        assert relative_rms(got, want / 2 if index == 2 else want) < 1e-12  # index 2: dq
    state = x[4].copy()
    step = gla_step(be, *(a[:, :1] for a in x[:4]), state, scale=1.0)
    assert relative_rms(step, plain[0][:, :1]) < 1e-12


@every_name
@pytest.mark.parametrize("cuts", [(1, 64), (63, 2), (64, 1), (20, 45)])
def test_a_sequence_in_two_pieces(name, cuts):
    be = backend_of(name, "gla_forward")
    q, k, v, log_g, state = inputs(sum(cuts), 6, 2, 8)
    whole, final, _ = gla_forward(be, q, k, v, log_g, state)
    parts = []
    for at in (slice(0, cuts[0]), slice(cuts[0], None)):
        o, state, _ = gla_forward(be, q[:, at], k[:, at], v[:, at], log_g[:, at], state)
        parts.append(o)
    assert relative_rms(np.concatenate(parts, axis=1), whole) < 1e-12
    assert relative_rms(state, final) < 1e-12


@every_name
@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-6), (np.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_that_forget_all(name, dtype, limit, shape):
    """log g = -20: what a token adds to its own output must not leak into the gate's gradient."""
    be = backend_of(name, "gla_forward")
    x = inputs(70, *shape, dtype=dtype, gates=(-20,))
    do, dstate = upstream(x[0], x[4])
    got = chunked(be, x, do, dstate)
    want = recurrent(x, do.astype(np.float64), dstate.astype(np.float64))
    for a, b in zip(got, want, strict=True):
        assert relative_rms(a, b) < limit


@every_name
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gates_of_all_strengths_mixed(name, dtype):
    """0 (keep all), -20 and the strongest that a float can hold, channel by channel, never overflow."""
    be = backend_of(name, "gla_forward")
    for strongest in (-20.0, -1e4):
        x = inputs(150, 6, 2, 8, dtype=dtype)
        x[3] = np.where(np.random.default_rng(3).random(x[3].shape) < 0.5, 0, strongest).astype(dtype)
        do, dstate = upstream(x[0], x[4])
        got = chunked(be, x, do, dstate)
        assert all(np.isfinite(a).all() for a in got)
        want = recurrent(x, do.astype(np.float64), dstate.astype(np.float64))
        limit = 1e-5 if dtype == np.float32 else 1e-11
        for a, b in zip(got, want, strict=True):
            assert relative_rms(a, b) < limit


@every_name
def test_long_and_weak_gates_in_float32(name):
    """Gates near 0 over many chunks: sums of hundreds of terms keep their digits."""
    be = backend_of(name, "gla_forward")
    x = inputs(400, 3, 3, 8, dtype=np.float32, gates=(-0.01, 0), B=1)
    do, dstate = upstream(x[0], x[4])
    got = chunked(be, x, do, dstate)
    want = recurrent(x, do.astype(np.float64), dstate.astype(np.float64))
    for a, b in zip(got, want, strict=True):
        assert relative_rms(a, b) < 1e-5


@pytest.mark.parametrize("T", [1, 65])
def test_recurrent_gradient_along_a_random_direction(T):
    from minisb import gradcheck

    be = backends()["numpy"]
    x = inputs(T, 6, 2, 6)
    do, dstate = upstream(x[0], x[4])
    grads = recurrent(x, do, dstate)[2:]

    def loss():
        o, final = recurrent(x)
        return float((o * do).sum() + (final * dstate).sum())

    names = ("q", "k", "v", "log_g", "state")
    assert be.name == "numpy"
    assert (
        gradcheck.directional(loss, dict(zip(names, x, strict=True)), dict(zip(names, grads, strict=True)))
        < gradcheck.LIMIT
    )
