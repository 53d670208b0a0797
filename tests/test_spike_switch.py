"""Spikes by projection and by layer: what a name switches on, and the report's ablations (Table 13)."""

from dataclasses import replace

import numpy as np
import pytest
from test_model import TINY, FrozenRemainder, batch, directional_error, model_of

import train_small
from minisb import gradcheck
from minisb.config import SPIKE_PROJECTIONS, Config, spikes_by_layer
from minisb.errors import MinisbError

ALL = set(SPIKE_PROJECTIONS)


def taps(model, tokens, spike=True):
    """The names of the projections that read spikes -> their counts."""
    seen = {}
    model.forward(tokens, spike, tap=lambda name, x: seen.update({name: x}))
    return {name.removesuffix(".count"): x for name, x in seen.items() if name.endswith(".count")}


@pytest.mark.parametrize(
    "spike, expected",
    [
        ((), [set()] * 3),
        (SPIKE_PROJECTIONS, [ALL] * 3),
        (("all",), [ALL] * 3),
        (("down", "q"), [{"down", "q"}] * 3),
        (("1.q",), [set(), {"q"}, set()]),
        (("0-1.gate", "2.up"), [{"gate"}, {"gate"}, {"up"}]),
        (("2.all", "o"), [{"o"}, {"o"}, ALL]),
    ],
)
def test_names_become_one_set_a_layer(spike, expected):
    assert spikes_by_layer(spike, 3) == tuple(map(frozenset, expected))
    assert spikes_by_layer(spike, 3) is spikes_by_layer(spike, 3)  # worked out once, not at every step


@pytest.mark.parametrize(
    "bad", ["knee", "", "3.knee", "3.q", "2-1.q", "x.q", "-1.q", "1-.q", ".q", "0-3.q", "q.1", "1 .q"]
)
def test_what_is_no_name_is_refused(bad):
    with pytest.raises(MinisbError, match="in spike"):
        Config(layers=3, spike=("down", bad))


def test_a_layer_spikes_where_it_is_told_to(be):
    model, (tokens, _) = model_of(TINY, be), batch(TINY)
    names = taps(model, tokens, ("1.all", "0-1.down", "2.gate", "0.gk"))
    window = {f"layers.1.attn.{name}" for name in "qkvo"} | {f"layers.1.mlp.{n}" for n in ("gate", "up", "down")}
    assert set(names) == window | {"layers.0.mlp.down", "layers.0.attn.gk", "layers.2.mlp.gate"}


def test_the_config_decides_what_spiking_means(be):
    tokens, targets = batch(TINY)
    silent = model_of(replace(TINY, spike=()), be)
    assert silent.loss(tokens, targets, True) == silent.loss(tokens, targets, False)
    one = model_of(replace(TINY, spike=("2.up",)), be)
    assert set(taps(one, tokens)) == {"layers.2.mlp.up"}
    assert one.loss(tokens, targets, True) == silent.loss(tokens, targets, ("2.up",)) != silent.loss(tokens, targets)


def test_projections_of_one_input_share_their_counts(be):
    model, (tokens, _) = model_of(TINY, be), batch(TINY)
    seen = taps(model, tokens, ("0.q", "0.v", "0.gk", "0.gate", "0.up"))
    assert np.array_equal(seen["layers.0.attn.q"], seen["layers.0.attn.v"])
    assert np.array_equal(seen["layers.0.attn.q"], seen["layers.0.attn.gk"])
    assert np.array_equal(seen["layers.0.mlp.gate"], seen["layers.0.mlp.up"])


@pytest.mark.parametrize("spike", [("0.all",), ("1.q", "2.down"), ("0-1.gk", "1-2.up", "o")], ids=",".join)
def test_gradient_with_spikes_in_some_layers(be, spike, monkeypatch):
    model = model_of(TINY, be, np.float64, noise=0.1)
    frozen = FrozenRemainder()
    monkeypatch.setitem(be.natives, "spike_forward", frozen)  # the backend is shared by tests
    assert directional_error(model, *batch(TINY), spike, frozen) < gradcheck.LIMIT
    assert frozen.call == 2 * len(frozen.remainders) > 0


def test_a_choice_by_layer_is_stored_and_read_back():
    config = replace(TINY, spike=("0-1.gate", "2.all"))
    assert Config.from_dict({**config.to_dict(), "spike": list(config.spike)}) == config


def test_the_flag():
    def spike(text):
        return train_small.new_run(train_small.parser().parse_args(["--spike", text, "--out", "nowhere"]))[1].spike

    assert spike("all") == SPIKE_PROJECTIONS and spike("none") == ()
    assert spike("down,0-3.gate,1.all") == ("down", "0-3.gate", "1.all")
    with pytest.raises(MinisbError, match="0 to 3"):
        spike("4.q")
