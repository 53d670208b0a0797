"""Windowed attention against a softmax over the whole matrix of scores, and its special cases."""

import numpy as np
import pytest
from conftest import backend_of

from minisb.gradcheck import relative_rms
from minisb.ops.attention import attention_backward, attention_forward, attention_step

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])


def inputs(T, S, H, G, D, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, T, H, D)), *(rng.standard_normal((2, S, G, D)) for _ in range(2))


def naive(q, k, v, window, scale=None):
    """Every score of every head at once; -> o, lse."""
    T, S, R = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = np.repeat(k, R, axis=2), np.repeat(v, R, axis=2)
    s = np.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    at, key = np.arange(S - T, S)[:, None], np.arange(S)
    s = np.where((key <= at) & (at - key < window), s, -np.inf)
    lse = np.log(np.exp(s).sum(-1))
    return np.einsum("bhts,bshd->bthd", np.exp(s - lse[..., None]), v), lse.swapaxes(1, 2)


@every_name
@pytest.mark.parametrize("window", [1, 5, 64, 100, 150, 1000])
@pytest.mark.parametrize("T, S", [(1, 1), (63, 63), (150, 150), (65, 150), (1, 77)])
@pytest.mark.parametrize("H, G, D", [(6, 2, 8), (3, 3, 5)])
def test_equals_the_full_softmax(name, window, T, S, H, G, D):
    be = backend_of(name, "attention_forward")
    q, k, v = inputs(T, S, H, G, D)
    o, saved = attention_forward(be, q, k, v, window)
    want, lse = naive(q, k, v, window)
    assert relative_rms(o, want) < 1e-12
    np.testing.assert_allclose(saved[4], lse, rtol=1e-12, atol=1e-12)
    assert saved[3] is o or np.array_equal(saved[3], o)


@every_name
def test_a_window_of_one_returns_v(name):
    be = backend_of(name, "attention_forward")
    q, k, v = inputs(70, 70, 6, 2, 4)
    o, _ = attention_forward(be, q, k, v, 1)
    np.testing.assert_allclose(o, np.repeat(v, 3, axis=2), rtol=1e-12)


@every_name
@pytest.mark.parametrize("longer", [150, 151, 10**9])
def test_a_window_of_T_or_more_is_full(name, longer):
    be = backend_of(name, "attention_forward")
    q, k, v = inputs(150, 150, 6, 2, 6)
    do = np.random.default_rng(1).standard_normal(q.shape)
    results = []
    for window in (150, longer):
        o, saved = attention_forward(be, q, k, v, window)
        results.append((o, *attention_backward(be, do, saved)))
    for got, want in zip(*results, strict=True):
        assert relative_rms(got, want) < 1e-13


@every_name
def test_the_scale_is_used(name):
    be = backend_of(name, "attention_forward")
    q, k, v = inputs(70, 70, 3, 3, 6)
    o, saved = attention_forward(be, q, k, v, 9, scale=0.7)
    assert relative_rms(o, naive(q, k, v, 9, 0.7)[0]) < 1e-12
    step = attention_step(be, q[:, -1:], k[:, -9:], v[:, -9:], 9, scale=0.7)
    assert relative_rms(step, o[:, -1:]) < 1e-12
    twice, saved_twice = attention_forward(be, 2 * q, k, v, 9, scale=0.35)
    assert relative_rms(twice, o) < 1e-12
    for got, want, factor in zip(
        attention_backward(be, o, saved_twice), attention_backward(be, o, saved), (0.5, 1, 1), strict=True
    ):
        assert relative_rms(got, factor * want) < 1e-12


@every_name
@pytest.mark.parametrize("window", [7, 64, 200])
def test_step_equals_the_last_row_in_any_order_of_slots(name, window):
    be = backend_of(name, "attention_step")
    q, k, v = inputs(1, 131, 6, 2, 6)
    want, _ = attention_forward(be, q, k, v, window)
    count = min(window, 131)
    order = np.random.default_rng(2).permutation(count)
    slots = count + 4  # what lies beyond `count` must not matter
    cache = [np.full((2, slots, 2, 6), np.nan) for _ in range(2)]
    for kept, x in zip(cache, (k, v), strict=True):
        kept[:, :count] = x[:, -count:][:, order]
    assert relative_rms(attention_step(be, q, *cache, count), want) < 1e-12


@every_name
def test_pieces_of_a_prompt_equal_the_whole(name):
    be = backend_of(name, "attention_forward")
    q, k, v = inputs(150, 150, 6, 2, 6)
    whole, _ = attention_forward(be, q, k, v, 20)
    for start, end in ((0, 1), (1, 70), (70, 150)):
        first = max(0, start - 19)
        part, _ = attention_forward(be, q[:, start:end], k[:, first:end], v[:, first:end], 20)
        assert relative_rms(part, whole[:, start:end]) < 1e-12


@every_name
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_scores_far_from_zero(name, dtype, limit):
    """Scores of hundreds: without the maximum taken out, exp would be infinite."""
    be = backend_of(name, "attention_forward")
    q, k, v = (x.astype(dtype) for x in inputs(70, 70, 3, 3, 8))
    q *= 100
    o, saved = attention_forward(be, q, k, v, 30)
    s64 = [x.astype(np.float64) for x in (q, k, v)]
    s = np.einsum("bthd,bshd->bhts", *s64[:2]) / 8**0.5
    at, key = np.arange(70)[:, None], np.arange(70)
    s = np.where((key <= at) & (at - key < 30), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), s64[2])
    assert relative_rms(o, want) < 30 * limit  # an error of 1e-7 in a score of 300 is one of 3e-5 in exp
    assert all(np.isfinite(d).all() for d in attention_backward(be, o, saved))
