"""The whole model: its gradient along a random direction, one batch learnt by heart, golden numbers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from minisb import gradcheck, native
from minisb.backend import Backend, CpuBackend
from minisb.config import PRESETS, SPIKE_PROJECTIONS, Config, preset
from minisb.errors import MinisbError
from minisb.model import SpikingBrain, embedding_std, specs
from minisb.ops.adamw import adamw, grad_norm
from minisb.ops.cross_entropy import IGNORE
from minisb.ops.spike import spike_forward
from minisb.params import ParamStore, count

TINY = Config(
    vocab=37, width=12, layers=3, heads=2, kv_heads=1, head_dim=6, ffn=20, window=5,
    mixers=("gla", "window", "full"), gate_rank=3, gate_divisor=2.0,
)  # fmt: skip
#: Loss in nats and gradient norm of TINY at its initial values (seed 0), on batch(TINY).
GOLDEN = (3.71876355, 3.45729433)
#: Embeddings are small (0.1), so their norm bends soon: a larger step measures its curvature.
STEP = 3e-7


def backends():
    yield pytest.param(Backend, id="numpy")
    compiled = any(reason == "" for reason in native.status().values())
    yield pytest.param(CpuBackend, id="cpu", marks=pytest.mark.skipif(not compiled, reason="natives are not compiled"))


@pytest.fixture(params=backends())
def be(request):
    return request.param(threads=2)


def model_of(config, be, dtype=np.float32, seed=0, noise=0.0):
    """noise is added to every parameter: zero biases and unit norms would hide mistakes."""
    model = SpikingBrain(config, be, ParamStore(specs(config), np, dtype, optimizer=True))
    model.store.initialise(seed)
    model.store.flat_p += (noise * np.random.default_rng(seed + 1).standard_normal(model.store.size)).astype(dtype)
    return model


def batch(config, B=2, T=23, seed=5):
    """Tokens and targets (B,T), the first targets of the second row not counted."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab, (B, T + 1))
    targets = tokens[:, 1:].copy()
    targets[1:, :3] = IGNORE
    return tokens[:, :-1], targets


class FrozenRemainder:
    """spike_forward whose rounding is fixed at the base point.

    The first pass records r = x_hat - x of every call; afterwards x + r is returned, call by
    call: a smooth function with the value and the straight-through gradient of the spiking one.
    """

    def __init__(self):
        self.remainders, self.recording, self.call = [], True, 0

    def __call__(self, be, x, k):
        if self.recording:
            x_hat, vth = spike_forward.reference(be, x, k)
            self.remainders.append((x_hat - x, vth))
            return x_hat, vth
        r, vth = self.remainders[self.call % len(self.remainders)]
        self.call += 1
        return x + r, vth


def directional_error(model, tokens, targets, spike=False, frozen=None):
    store = model.store
    store.zero_grad()
    model.loss_and_backward(tokens, targets, spike)
    if frozen:
        frozen.recording = False
    return gradcheck.directional(
        lambda: model.loss(tokens, targets, spike), {"p": store.flat_p}, {"p": store.flat_g}, step=STEP
    )


@pytest.mark.parametrize("tied, bias", [*itertools.product([True, False], repeat=2)])
def test_gradient_of_the_whole_model(be, tied, bias):
    config = replace(TINY, tied=tied, qkv_bias=bias)
    model = model_of(config, be, np.float64, noise=0.1)
    assert directional_error(model, *batch(config)) < gradcheck.LIMIT


@pytest.mark.parametrize("length", [1, 63, 65])
def test_gradient_at_awkward_lengths(be, length):
    model = model_of(TINY, be, np.float64, noise=0.1)
    tokens, _ = batch(TINY, T=length)
    targets = np.roll(tokens, 1, axis=1)
    assert directional_error(model, tokens, targets) < gradcheck.LIMIT


@pytest.mark.parametrize(
    "spike", [SPIKE_PROJECTIONS, ("q", "gk", "down"), ("k", "up"), ("o",), ("v", "gate", "o")], ids=",".join
)
def test_gradient_through_spikes(be, spike):
    """All projections of an input spike, or some of them: these share one rounding."""
    model = model_of(TINY, be, np.float64, noise=0.1)
    frozen = FrozenRemainder()
    be.use("spike_forward", frozen)
    assert directional_error(model, *batch(TINY), spike, frozen) < gradcheck.LIMIT
    assert frozen.call == 2 * len(frozen.remainders) > 0


def test_every_parameter_gets_its_own_gradient(be):
    """One direction can miss a small tensor among large ones: each is checked alone."""
    model, (tokens, targets) = model_of(TINY, be, np.float64, noise=0.1), batch(TINY)
    model.loss_and_backward(tokens, targets)
    for name, p in model.store.p.items():
        step = STEP if name == "embeddings.weight" else 10 * STEP  # small gradients want larger differences
        error = gradcheck.directional(lambda: model.loss(tokens, targets), {name: p}, model.store.g, step=step)
        assert error < gradcheck.LIMIT, name


def test_spikes_change_the_loss_and_names_choose_them(be):
    model, (tokens, targets) = model_of(TINY, be), batch(TINY)
    silent = model.loss(tokens, targets)
    assert model.loss(tokens, targets, spike=()) == silent
    assert model.loss(tokens, targets, spike=True) == model.loss(tokens, targets, spike=SPIKE_PROJECTIONS) != silent
    assert model.loss(tokens, targets, spike=("down",)) not in (silent, model.loss(tokens, targets, spike=True))


def test_the_tap_sees_counts(be):
    model, (tokens, _) = model_of(TINY, be), batch(TINY)
    seen = {}
    model.forward(tokens, spike=True, tap=lambda name, x: seen.update({name: x}))
    assert len(seen) == 8 + 7 + 7  # linear attention has a gate projection more
    for name, counts in seen.items():
        assert name.startswith("layers.") and name.endswith(".count")
        np.testing.assert_array_equal(counts, np.rint(counts))
    assert any(".gk." in name for name in seen)


def test_the_tap_sees_every_input_and_changes_nothing(be):
    """Without a tap the feed-forward is one operation, here wide enough for its native."""
    config, seen = replace(TINY, width=48, ffn=64, layers=2, mixers=("gla", "window")), {}
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 65))
    losses, gradients = [], []
    for tap in (None, lambda name, x: seen.update({name: x.shape[-1]})):
        model = model_of(config, be, np.float64)
        losses.append(model.loss_and_backward(tokens[:, :-1], tokens[:, 1:], tap=tap))
        gradients.append(model.store.flat_g)
    assert {name: n for name, n in seen.items() if ".1." in name} == {
        "layers.1.attn.q+k+v.input": 48, "layers.1.attn.o.input": 12,
        "layers.1.mlp.gate+up.input": 48, "layers.1.mlp.down.input": 64,
    }  # fmt: skip
    assert abs(losses[0] - losses[1]) < 1e-13
    np.testing.assert_allclose(*gradients, rtol=1e-12, atol=1e-15)


def test_loss_is_the_mean_over_counted_targets(be):
    model, (tokens, targets) = model_of(TINY, be), batch(TINY)
    logits = model.forward(tokens).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = targets != IGNORE
    expected = -np.take_along_axis(log_p, np.where(counted, targets, 0)[..., None], -1)[..., 0][counted].mean()
    assert abs(model.loss(tokens, targets) / expected - 1) < 1e-5
    assert abs(model.loss_and_backward(tokens, targets) / expected - 1) < 1e-5


def test_the_head_in_slices_is_the_head_in_one(be, monkeypatch):
    model, (tokens, targets) = model_of(TINY, be, np.float64), batch(TINY, T=70)
    whole = model.loss_and_backward(tokens, targets)
    kept = model.store.flat_g.copy()
    model.store.zero_grad()
    monkeypatch.setattr(be, "head_logits", 1)
    assert abs(model.loss_and_backward(tokens, targets) / whole - 1) < 1e-12
    assert gradcheck.relative_rms(model.store.flat_g, kept) < 1e-12


def test_gradients_accumulate_and_scale(be):
    model, (tokens, targets) = model_of(TINY, be, np.float64), batch(TINY)
    model.loss_and_backward(tokens, targets)
    once = model.store.flat_g.copy()
    model.loss_and_backward(tokens, targets, scale=0.5)
    assert gradcheck.relative_rms(model.store.flat_g, 1.5 * once) < 1e-12


def test_one_batch_is_learnt_by_heart(be):
    model = model_of(TINY, be)
    store = model.store
    tokens = np.random.default_rng(8).integers(0, TINY.vocab, (2, 17))
    for step in range(1, 61):
        store.zero_grad()
        loss = model.loss_and_backward(tokens[:, :-1], tokens[:, 1:])
        adamw(
            be, store.flat_p, store.flat_g, store.flat_m, store.flat_v, store.decayed,
            0.02, 0.9, 0.99, 1e-8, 0.0, step, 1.0,
        )  # fmt: skip
    assert loss < 0.1


def test_golden_loss_and_gradient(be):
    """The same numbers as ever: a change here is a change of the model or of its initial values."""
    model, (tokens, targets) = model_of(TINY, be), batch(TINY)
    loss = model.loss_and_backward(tokens, targets)
    norm = grad_norm(be, model.store.flat_g)
    assert abs(loss / GOLDEN[0] - 1) < 1e-5 and abs(norm / GOLDEN[1] - 1) < 1e-5, (loss, norm)


def test_the_store_holds_what_the_specs_say():
    for tied in (True, False):
        config = replace(TINY, tied=tied)
        model = model_of(config, Backend(threads=1))
        assert set(model.store.p) == {spec.name for spec in specs(config)}
        assert sum(p.size for p in model.store.p.values()) == count(specs(config))
        assert ("lm_head.weight" in model.store.p) is not tied


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda model: model.forward([[1, 2]]), r"ids \(B,T\), such as np.array\(\[\[1, 2, 3\]\]\); got the list"),
        (lambda model: model.forward(np.array([1, 2])), r"got int64 of shape \(2,\)"),
        (lambda model: model.forward(np.ones((1, 2))), "got float64"),
        (lambda model: model.prefill([[1]], model.new_state()), "got the list"),
        (lambda model: model.loss([[1]], np.array([[2]])), "got the list"),
        (lambda model: model.step(3, model.new_state()), r"ids \(B,\), such as np.array\(\[1\]\); got the int 3"),
        (lambda model: model.step(np.int64(3), model.new_state()), r"got int64 of shape \(\)"),
        (lambda model: model.step([3], model.new_state()), "got the list"),
        (lambda model: model.step(np.array([[3]]), model.new_state()), r"got int64 of shape \(1, 1\)"),
    ],
)
def test_tokens_that_are_no_array_of_ids_are_one_sentence(call, words):
    model = model_of(replace(TINY, sinks=2), Backend(1))
    with pytest.raises(MinisbError, match=words):
        call(model)


def test_no_token_begins_sure_of_itself():
    """In a tied model a token's own logit begins at up to width * std, whatever the width."""
    for name in PRESETS:
        c = preset(name)
        (embedding,) = (spec for spec in specs(c) if spec.name == "embeddings.weight")
        assert embedding.init <= 0.1 and (not c.tied or c.width * embedding.init <= 12.8 + 1e-9)
    assert embedding_std(preset("nano")) == 0.1 and embedding_std(preset("small")) == 0.025
