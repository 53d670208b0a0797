"""The 76B's layout: parallel hybrids, experts, sinks, as one model."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import backend_of, backends

from minisb import accounting, experts_cli, gradcheck
from minisb.backend import Backend, CpuBackend
from minisb.config import Config, preset
from minisb.errors import MinisbError
from minisb.experts import Loads
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain, specs
from minisb.ops.adamw import adamw
from minisb.ops.spike import spike_forward
from minisb.params import ParamStore, count
from minisb.train import evaluate

TINY = preset("76b-tiny", vocab=37, window=8)
#: Embeddings are small (0.1), so their norm bends soon: a larger step measures its curvature.
STEP = 3e-7


@pytest.fixture(params=["numpy", "cpu"])
def be(request):
    """One thread: that more give the same bits is test_ops.py's business, and so small a model gains nothing."""
    backend_of(request.param, "router_forward")
    return (CpuBackend if request.param == "cpu" else Backend)(threads=1)


def model_of(config, be, dtype=np.float32, seed=0, noise=0.1):
    """noise on every parameter: zero biases, unit norms and equal logits of the router would hide mistakes."""
    model = SpikingBrain(config, be, ParamStore(specs(config), np, dtype, optimizer=True))
    model.store.initialise(seed)
    model.store.flat_p += (noise * np.random.default_rng(seed + 1).standard_normal(model.store.size)).astype(dtype)
    return model


def tokens_of(config, B, T, seed=2):
    return np.random.default_rng(seed).integers(0, config.vocab, (B, T))


def directional_error(model, tokens, spike=False):
    """Against the loss with the routers' losses in it; spikes are rounded as at the first pass."""
    c, store, be = model.config, model.store, model.be
    frozen, calls = [], itertools.count()

    def spikes(be, x, k):
        i = next(calls)
        if i >= len(frozen) and not frozen_all:
            frozen.append(spike_forward.reference(be, x, k)[0] - x)
        return x + frozen[i % len(frozen)], spike_forward.reference(be, x, k)[1]

    def loss():
        own = []

        def tap(name, value):
            weight = {"balance_loss": c.balance_weight, "z_loss": c.z_weight}.get(name.rsplit(".", 1)[1])
            own.append(weight * value if weight else 0)

        return model.loss(tokens[:, :-1], tokens[:, 1:], spike, tap) + sum(own)

    frozen_all = False
    kept = be.natives.get("spike_forward")
    be.natives["spike_forward"] = spikes
    try:
        store.zero_grad()
        model.loss_and_backward(tokens[:, :-1], tokens[:, 1:], spike)
        frozen_all = True
        return gradcheck.directional(loss, {"p": store.flat_p}, {"p": store.flat_g}, step=STEP)
    finally:
        be.natives.pop("spike_forward")
        if kept:
            be.natives["spike_forward"] = kept


# --- sizes


@pytest.mark.parametrize(
    "shared, total, active", [(False, 76_877_957_632, 12_716_902_912), (True, 76_055_745_024, 11_894_690_304)]
)
def test_76b_has_the_parameters_of_its_name(shared, total, active):
    c = preset("76b", shared_projections=shared)
    found = accounting.parameters(c)
    assert found["total"] == count(specs(c)) == total
    assert found["active"] == active


def test_the_mini_is_one_thousandth():
    found, big = accounting.parameters(preset("76b-mini")), accounting.parameters(preset("76b"))
    assert 74.5e6 < found["total"] < 75.5e6
    assert 950 < big["total"] / found["total"] < 1050
    assert [preset("76b-mini").mixer(i) for i in range(28)] == [preset("76b").mixer(i) for i in range(28)]
    assert [i + 1 for i in range(28) if preset("76b").mixer(i) == "gla+full"] == [7, 14, 21, 28]


def test_decode_state_is_what_decoding_allocates(be):
    model = model_of(TINY, be)
    state = model.new_state()
    model.prefill(tokens_of(TINY, 1, 64), state)
    found = accounting.decode_state_bytes(TINY, 64)
    assert state.nbytes == found["total"] == found["gla"] + found["window"] + found["full"]


# --- gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_projections": True},
        {"gate": "low_rank", "gate_rank": 3, "gate_divisor": 2.0},
        {"gate": "low_rank", "gate_rank": 3, "feature_map": "relu", "shared_projections": True, "gate_divisor": 2.0},
        {"top_k": 2, "shared_experts": 2},
        {"shared_experts": 0, "sinks": 0},
        {"mixers": ("gla", "window", "full"), "ffns": ("moe",), "layers": 3},
    ],
    ids=lambda changes: ",".join(changes) or "76b",
)
def test_gradient_of_the_whole_model(be, changes):
    model = model_of(replace(TINY, **changes), be, np.float64)
    assert directional_error(model, tokens_of(TINY, 2, 24)) < gradcheck.LIMIT


@pytest.mark.parametrize("spike", [True, ("router", "gate", "o"), ("up", "k"), ("down", "q")], ids=str)
def test_gradient_through_spikes(be, spike):
    model = model_of(TINY, be, np.float64)
    assert directional_error(model, tokens_of(TINY, 2, 20), spike) < gradcheck.LIMIT


def test_every_parameter_gets_its_own_gradient(be):
    """One direction can miss a small tensor among large ones: each is checked alone."""
    model, tokens = model_of(replace(TINY, balance_weight=0.0, z_weight=0.0), be, np.float64), tokens_of(TINY, 2, 20)
    model.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
    for name, p in model.store.p.items():
        step = STEP if name in ("embeddings.weight", "sinks.weight") else 10 * STEP
        loss = lambda: model.loss(tokens[:, :-1], tokens[:, 1:])  # noqa: E731
        assert gradcheck.directional(loss, {name: p}, model.store.g, step=step) < gradcheck.LIMIT, name


# --- decoding


@pytest.mark.parametrize("changes", [{}, {"shared_projections": True, "sinks": 0}, {"mixers": ("gla", "window")}])
def test_prefill_steps_and_the_full_pass_agree(be, changes):
    """Three windows long, in pieces of every kind, through a full-attention layer too."""
    config = replace(TINY, **changes)
    model, tokens = model_of(config, be), tokens_of(config, 2, 3 * config.window)
    full, state = model.forward(tokens), model.new_state(2)
    for t in range(tokens.shape[1]):
        assert relative_rms(model.step(tokens[:, t], state), full[:, t]) < 1e-5, t
    for pieces in ([24], [1, 23], [5, 1, 1, 17], [8, 8, 8], [23, 1]):
        state, start = model.new_state(2), 0
        for size in pieces:
            logits = model.prefill(tokens[:, start : start + size], state)
            start += size
            assert relative_rms(logits, full[:, start - 1]) < 1e-5, (pieces, start)
        assert state.position == 24


def test_every_token_sees_the_sinks_and_they_see_no_text(be):
    model, tokens = model_of(TINY, be), tokens_of(TINY, 2, 3 * TINY.window)
    before = model.forward(tokens)
    memories, _ = model._read_sinks(False)
    model.sinks[0] += 1
    after = model.forward(tokens)
    changed = np.abs(after - before).max(-1)
    assert (changed > 1e-4).all()  # tokens far past the window too, and in every sequence
    again, _ = model._read_sinks(False)
    (state, (k, v)), (_, (k2, _)) = memories[1], again[1]
    assert state.shape == (1, 2, 6, 6) and k.shape == v.shape == (3, 2, 6)
    assert (np.abs(k2 - k).max((1, 2)) > 1e-5).all()  # sinks see each other, before and after them


def test_a_copied_state_goes_its_own_way(be):
    model, tokens = model_of(TINY, be), tokens_of(TINY, 1, 20)
    state = model.new_state()
    model.prefill(tokens, state)
    twin = state.copy()
    model.prefill(tokens, twin)
    one, state2 = model.step(np.array([5]), state), model.new_state()
    model.prefill(tokens, state2)
    assert relative_rms(one, model.step(np.array([5]), state2)) < 1e-5


# --- experts


def test_one_expert_is_the_dense_model(be):
    """One expert, always chosen, its gate 1: with the dense network's weights the same model."""
    dense = model_of(replace(TINY, ffns=("dense",)), be)
    moe = model_of(replace(TINY, ffns=("moe",), experts=1, shared_experts=0, z_weight=0.0), be)
    for name, p in moe.store.p.items():
        if ".experts." in name:
            p[0] = dense.store.p[name.replace(".experts", "")]
        elif "router" not in name:
            p[...] = dense.store.p[name]
    tokens = tokens_of(TINY, 2, 21)
    assert relative_rms(moe.forward(tokens), dense.forward(tokens)) < 1e-6
    dense.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
    moe.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
    for name, g in dense.store.g.items():
        ours = moe.store.g[name] if name in moe.store.g else moe.store.g[name.replace("mlp.", "mlp.experts.")][0]
        assert relative_rms(ours, g) < 1e-4, name


def test_the_tap_sees_the_load_of_the_text_only(be):
    model, tokens = model_of(TINY, be), tokens_of(TINY, 2, 21)
    seen = {}
    model.forward(tokens, tap=lambda name, x: seen.setdefault(name, []).append(x))
    assert sorted(n for n in seen if n.endswith(".load")) == ["layers.1.moe.load", "layers.3.moe.load"]
    for name in ("layers.1.moe.load", "layers.3.moe.load"):
        (load,) = seen[name]
        assert load.shape == (4,) and load.sum() == 42
    assert 0 < float(seen["layers.1.moe.entropy"][0]) <= np.log(4) + 1e-6
    assert int(seen["layers.1.moe.dropped"][0]) == 0


def test_the_least_loaded_expert_of_a_whole_text(be):
    """evaluate counts every token of every batch, and compares with an equal share."""
    model, tokens = model_of(TINY, be), np.random.default_rng(3).integers(0, TINY.vocab, 6 * TINY.seq_len + 1)
    chosen = {1: [], 3: []}
    model.forward(tokens[:-1].reshape(6, -1), tap=lambda n, x: chosen[int(n[7])].append(x) if ".load" in n else None)
    expected = min(min(load) * 4 / (6 * TINY.seq_len) for (load,) in chosen.values())
    found = evaluate(model, tokens)
    assert found["expert_load_min"] == pytest.approx(expected) and 0 < expected < 1
    assert experts_cli.measure(model, tokens)["load_min"] == pytest.approx(expected)
    model.store.p["layers.3.mlp.router.weight"][2] = 0  # nobody's choice, where another logit is above 0
    model.store.p["layers.3.mlp.router.weight"][1] = -model.store.p["layers.3.mlp.router.weight"][0]
    assert evaluate(model, tokens)["expert_load_min"] == 0
    assert "expert_load_min" not in evaluate(model_of(replace(TINY, ffns=("dense",)), be), tokens)


def test_shares_of_experts_are_over_all_tokens():
    """Not a mean over batches: those differ in size."""
    loads = Loads()
    for load in ([6, 2, 0, 0], [0, 0, 1, 1]):
        loads("layers.3.moe.load", np.array(load))
        loads("layers.3.moe.entropy", 0.5)
        loads("layers.1.moe.load", np.array([1, 1, 1, 1]))
        loads("layers.3.mlp.router.input", None)
    assert loads.shares() == {1: [0.25] * 4, 3: [0.6, 0.2, 0.1, 0.1]}
    assert loads.least() == pytest.approx(0.4) and loads.entropy() == 0.5


def test_capacity_drops_in_training_only(be):
    model, tokens = model_of(replace(TINY, capacity=0.5), be), tokens_of(TINY, 2, 21)
    free = SpikingBrain(TINY, be, model.store)
    np.testing.assert_array_equal(model.forward(tokens), free.forward(tokens))
    seen = {}
    limited = model.loss_and_backward(tokens[:, :-1], tokens[:, 1:], tap=lambda n, x: seen.update({n: x}))
    assert limited != free.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
    assert int(seen["layers.1.moe.dropped"]) > 0
    load, capacity = seen["layers.1.moe.load"], 5  # 0.5 * 40 / 4
    assert int(seen["layers.1.moe.dropped"]) == np.maximum(load - capacity, 0).sum()


def test_the_balance_loss_evens_out_the_load(be):
    """Half the tokens go to one expert at first; with nothing but the balance loss they spread."""
    c = replace(TINY, balance_weight=1.0, z_weight=0.0)
    model, tokens = model_of(c, be), tokens_of(c, 4, 33)
    router = "layers.1.mlp.router.weight"
    model.store.p[router][...] *= 10
    seen = {}

    def spread():
        model.forward(tokens, tap=lambda n, x: seen.update({n: x}))
        return float(seen["layers.1.moe.balance_loss"])

    before = spread()
    for _ in range(30):
        model.store.zero_grad()
        model.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
        model.store.p[router][...] -= 0.5 * model.store.g[router]
    assert spread() < min(before, 1.2)


@pytest.mark.parametrize("spike", [True, False])
def test_one_batch_is_learnt_by_heart(spike):
    """NumPy's gradients are compared above."""
    be = list(backends().values())[-1]
    model = model_of(TINY, be, noise=0.0)
    store, tokens = model.store, tokens_of(TINY, 2, 17, seed=8)
    for step in range(1, 101):
        store.zero_grad()
        loss = model.loss_and_backward(tokens[:, :-1], tokens[:, 1:], spike)
        adamw(
            be, store.flat_p, store.flat_g, store.flat_m, store.flat_v, store.decayed,
            0.02, 0.9, 0.99, 1e-8, 0.0, step, 1.0,
        )  # fmt: skip
    assert loss < (0.5 if spike else 0.1)


def test_spikes_reach_the_router_if_the_config_says_so(be):
    model, tokens = model_of(TINY, be), tokens_of(TINY, 2, 20)
    seen = {}
    model.forward(tokens, True, tap=lambda n, x: seen.update({n: x}))
    assert "layers.1.mlp.router.count" in seen and "layers.1.mlp.experts.down.count" in seen
    without = SpikingBrain(replace(TINY, spike=("q", "gate")), be, model.store)
    seen.clear()
    without.forward(tokens, True, tap=lambda n, x: seen.update({n: x}))
    assert "layers.1.mlp.router.count" not in seen and "layers.1.mlp.experts.gate.count" in seen


# --- settings


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mixers": ("gla+gla",)}, "unknown mixer"),
        ({"ffns": ("sparse",)}, "unknown feed-forward network"),
        ({"gate": "tied"}, "sigmoid"),
        ({"gate": "open"}, "unknown gate"),
        ({"ffns": ("moe",), "experts": 2, "top_k": 3}, "top_k"),
        ({"sinks": -1}, "sinks"),
    ],
)
def test_bad_settings_are_one_sentence(changes, words):
    with pytest.raises(MinisbError, match=words):
        Config(**changes)
