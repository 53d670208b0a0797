"""Neurons: the adaptive one gives eq. 21's counts in time, a fixed one falls silent or saturates."""

import numpy as np
import pytest
from conftest import backend_of

from minisb.backend import Backend
from minisb.errors import MinisbError
from minisb.ops.neuron import adaptive_neuron, fixed_neuron, over_excited_share, silent_share
from minisb.ops.spike import VTH_MAX, VTH_MIN, spike_count, spike_forward, threshold

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])


def scaled_rows(T=200, C=64, seed=0):
    """Tokens of very different sizes, as in a trained model: one threshold cannot suit them all."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, C)) * 10 ** rng.uniform(-1, 1, (T, 1))


def away_from(ratio, fraction):
    """Where ratio's fractional part is not `fraction`: sums of thresholds round, ties tip over."""
    return np.abs(np.abs(ratio) % 1 - fraction) > 1e-9


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_the_total_is_the_floor_from_rest_and_the_rounding_from_half_a_threshold(k):
    x = scaled_rows()
    vth = threshold(Backend(1), x, k)
    ratio = x / vth
    steps = int(np.abs(ratio).max()) + 1
    spikes = adaptive_neuron(x, vth, steps)
    assert spikes.dtype == np.int8 and spikes.shape == (steps, *x.shape)
    assert set(np.unique(spikes)) <= {-1, 0, 1} and (np.sign(spikes) * np.sign(x) >= 0).all()
    ok = away_from(ratio, 0) & away_from(ratio, 1)
    assert ok.mean() > 0.99
    assert np.array_equal(spikes.sum(0, dtype=int)[ok], (np.floor(np.abs(ratio)) * np.sign(x))[ok])
    rounded = adaptive_neuron(x, vth, steps, v0=vth / 2).sum(0, dtype=int)
    ok = away_from(ratio, 0.5)
    assert np.array_equal(rounded[ok], np.rint(ratio)[ok])
    assert not np.array_equal(rounded, spikes.sum(0, dtype=int))


def test_a_spike_a_step_from_the_first_until_the_potential_is_used_up():
    spikes = adaptive_neuron(np.array([2.5, -1.2, 0.3, 0.0]), 1.0, 4)
    assert spikes.T.tolist() == [[1, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert adaptive_neuron(np.array([9.5]), 1.0, 4).sum() == 4  # no time for the rest


def test_the_fixed_neuron_leaks_and_resets():
    """Current 1.6, leak 1/2, threshold 1: 0.8, then 1.2 fires; over 2 it fires at once, up to 1 never."""
    spikes = fixed_neuron(np.array([1.6, 2.0, 0.99, -1.6]), 1.0, 6)
    assert spikes.T.tolist() == [[0, 1] * 3, [1] * 6, [0] * 6, [0, -1] * 3]
    late = fixed_neuron(np.array([2.0]), 1.0, 6, v_reset=-0.6)  # 0.4, 0.9, 1.15: a longer way up
    assert late.T.tolist() == [[0, 0, 1] * 2]


def test_a_fixed_threshold_silences_some_tokens_and_saturates_others():
    """... and a threshold per token does neither, whatever the token's size."""
    x, steps = scaled_rows(), 16
    fixed = fixed_neuron(x, np.abs(x).mean(), steps).sum(0, dtype=int)
    silent, saturated = silent_share(fixed, -1), over_excited_share(fixed, steps - 1, -1)
    assert (silent == 1).mean() > 0.1 and (silent > 0.9).mean() > 0.3
    assert (saturated > 0.5).mean() > 0.1
    vth = threshold(Backend(1), x, 3)
    adaptive = adaptive_neuron(x, vth, steps, vth / 2).sum(0, dtype=int)
    silent, saturated = silent_share(adaptive, -1), over_excited_share(adaptive, steps - 1, -1)
    assert silent.max() < 0.35 and saturated.max() == 0


def test_shares():
    counts = np.array([[0, 0, 1, -9], [0, 2, 8, 7]])
    assert silent_share(counts) == 3 / 8 and silent_share(counts, -1).tolist() == [0.5, 0.25]
    assert over_excited_share(counts, 7) == 2 / 8 and over_excited_share(counts, 7, -1).tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    "call",
    [
        lambda: adaptive_neuron(np.ones(3), 0.0, 4),
        lambda: adaptive_neuron(np.ones(3), np.nan, 4),
        lambda: adaptive_neuron(np.ones(3), 1.0, 0),
        lambda: fixed_neuron(np.ones((2, 3)), np.ones((2, 1)), 4),
        lambda: fixed_neuron(np.ones(3), 1.0, 4, leak=0.0),
    ],
)
def test_bad_neurons(call):
    with pytest.raises(MinisbError):
        call()


@every_name
def test_every_token_is_coded_as_if_it_were_alone(name):
    """Scaling one token scales its x_hat and leaves its counts: with a threshold per tensor it would not."""
    be = backend_of(name, "spike_forward")
    x = scaled_rows().astype(np.float32)
    x_hat, vth = spike_forward(be, x, 3)
    np.testing.assert_allclose(vth, threshold(be, x, 3), rtol=1e-6)
    for row in (0, 7, 199):
        alone, vth_alone = spike_forward(be, x[row : row + 1], 3)
        assert np.array_equal(alone[0], x_hat[row]) and vth_alone[0] == vth[row]
    scaled, vth4 = spike_forward(be, 4 * x, 3)  # a power of two, so that the fractions stay the same
    assert np.array_equal(scaled, 4 * x_hat) and np.array_equal(vth4, 4 * vth)
    assert silent_share(spike_count(be, x_hat, vth), -1).max() < 0.35


@every_name
@pytest.mark.parametrize("C", [1, 7, 8, 31, 33, 64, 100, 2048])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_widths_that_leave_a_rest(name, dtype, C):
    """Every value counts in the mean and is rounded, also those after the last full vector."""
    be = backend_of(name, "spike_forward")
    x = (np.random.default_rng(C).standard_normal((9, C)) * 10.0).astype(dtype)
    x_hat, vth = spike_forward(be, x, 2.5)
    exact = np.abs(x.astype(np.float64)).mean(-1, keepdims=True) / 2.5
    np.testing.assert_allclose(vth, exact, rtol=1e-6)
    near_tie = np.abs(np.abs(x / exact) % 1 - 0.5) < 1e-4
    assert np.array_equal(np.rint(x_hat / vth)[~near_tie], np.rint(x / exact)[~near_tie])
    np.testing.assert_allclose(x_hat, np.rint(x_hat / vth) * vth, rtol=1e-6)


@every_name
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_goes_on_unless_checks_are_on(name, bad, monkeypatch):
    be = backend_of(name, "spike_forward")
    x = np.ones((3, 40), np.float32)
    x[1, 37] = bad
    x_hat, vth = spike_forward(be, x, 3)
    assert np.isfinite(x_hat[[0, 2]]).all() and not np.isfinite(x_hat[1, 37])
    assert np.isnan(vth[1, 0]) if np.isnan(bad) else vth[1, 0] == VTH_MAX
    monkeypatch.setattr(be, "checked", True)
    with pytest.raises(MinisbError, match=r"1 of 120 .* token 1, channel 37"):
        spike_forward(be, x, 3)
    x[1, 37] = 1
    spike_forward(be, x, 3)


def test_the_environment_turns_checks_on(monkeypatch):
    monkeypatch.delenv("MINISB_CHECK", raising=False)
    assert not Backend(1).checked
    monkeypatch.setenv("MINISB_CHECK", "1")
    assert Backend(1).checked


def test_the_threshold_is_the_mean_over_k_in_its_range():
    x = np.array([[1.0, -3.0], [0.0, 0.0], [1e9, 1e9]])
    assert threshold(Backend(1), x, 2).ravel().tolist() == [1.0, VTH_MIN, VTH_MAX]
