"""Mixed precision: float32 masters and gradients, activations and what products read in bfloat16 or float16."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from conftest import backends
from emulator import here
from test_gpu_model import model_of
from test_model import TINY, batch

from minisb import kernels
from minisb.backend import Backend
from minisb.data import TokenData
from minisb.gradcheck import relative_rms
from minisb.kernels import element
from minisb.model import SpikingBrain, specs
from minisb.ops.adamw import adamw, grad_norm
from minisb.optim import LossScale, update
from minisb.params import ParamStore
from minisb.train import Trainer, TrainSettings

HALVES = ["bfloat16", "float16"]


def half(name: str):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return element(name)


def mixed_model(config, be, name: str) -> SpikingBrain:
    model = SpikingBrain(config, be, ParamStore(specs(config), be.xp, optimizer=True, activations=half(name)))
    model.store.initialise(0)
    return model


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("head_dim", [None, 64], ids=["plain", "tensor cores"])
def test_loss_and_gradient_follow_float32(cuda, name, head_dim):
    """The whole model, by plain kernels, and with heads that the kernels on tensor cores take."""
    config = replace(TINY, head_dim=head_dim, layers=2, mixers=("gla", "window")) if head_dim else TINY
    tokens, targets = batch(config, T=66 if head_dim else 21)
    expected, model = model_of(config, backends()["numpy"]), mixed_model(config, cuda, name)
    want = expected.loss_and_backward(tokens, targets)
    got = model.loss_and_backward(cuda.xp.asarray(tokens), cuda.xp.asarray(targets), scale=64.0)
    assert model.store.mixed and model.embedding.dtype == half(name)
    assert float(got) == pytest.approx(float(want), rel=3e-3)
    found = here(model.store.flat_g)
    assert found.dtype == np.float32
    assert relative_rms(found / 64, expected.store.flat_g) < (0.03 if name == "bfloat16" else 0.005)


@pytest.mark.parametrize("name", HALVES)
def test_decoding_follows_the_full_pass(cuda, name):
    model, (tokens, _) = mixed_model(TINY, cuda, name), batch(TINY)
    tokens = cuda.xp.asarray(tokens)
    want = here(model.forward(tokens)).astype(np.float32)
    state = model.new_state(len(tokens))
    model.prefill(tokens[:, :9], state)
    for t in range(9, 20):
        got = here(model.step(tokens[:, t], state)).astype(np.float32)
        assert relative_rms(got, want[:, t]) < (0.03 if name == "bfloat16" else 0.004)
    assert state.layers[0].matrix.dtype == np.float32  # sums stay wide


@pytest.mark.parametrize("name", HALVES)
def test_adamw_writes_the_rounded_copy_too(cuda, name):
    rng = np.random.default_rng(0)
    p, g, m = (rng.standard_normal(1000).astype(np.float32) for _ in range(3))
    v, want = m**2, p.copy()
    for be in (Backend(1), *backends().values(), cuda):
        arrays = [be.xp.array(x) for x in (p, g, m, v)]
        rounded = be.xp.zeros(1000, half(name))
        adamw(be, *arrays, 600, 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0.5, rounded)
        want = want if be.name != "numpy" else arrays[0].copy()
        np.testing.assert_allclose(here(arrays[0]), want, rtol=1e-5, atol=1e-6)
        assert (here(rounded) == here(arrays[0]).astype(half(name))).all()


@pytest.mark.parametrize("name", HALVES)
def test_a_short_run_goes_as_float32_does(cuda, name, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda.device, "_ready", {})  # a GPU's is shared with earlier tests: what this one loads, alone
    config = replace(tiny_run.Tiny(), steps=6)
    rng = np.random.default_rng(0)
    text = (rng.integers(0, 300, 900) // 3).astype(np.uint16)
    data, losses = TokenData(text[:800], text[800:], 800, 100), []
    for be, dtype in ((Backend(2), "float32"), (cuda, name)):
        settings = TrainSettings(log_every=1, eval_every=6, spike_from=1.0, dtype=dtype)
        model = mixed_model(config, be, dtype)
        (tmp_path / dtype).mkdir()
        trainer = Trainer(tmp_path / dtype, model, settings, data)
        if trainer.loss_scale.needed:
            trainer.loss_scale.value = be.xp.full((), 256.0)
        found = trainer._record
        seen = []
        trainer._record = lambda loss, *rest, found=found, seen=seen: (seen.append(loss), found(loss, *rest))
        assert trainer.run()
        losses.append(seen)
    np.testing.assert_allclose(losses[1], losses[0], rtol=4e-3)
    other = {kernels.signatures()[kernel][0] for kernel, its in cuda.device._ready if its != half(name)}
    assert "adamw" in other and other <= set(kernels.MIXED)  # compiled side by side with the rest, not one by one


def test_the_loss_scale_halves_at_an_overflow_and_grows_again():
    scale = LossScale(np, needed=True)
    first = float(scale.value)
    scale.follow(np.inf)
    assert scale.value == first / 2 and scale.good == 0
    for _ in range(LossScale.GROWTH):
        assert scale.value == first / 2
        scale.follow(1.0)
    assert scale.value == first and scale.good == 0
    none = LossScale(np, needed=False)
    none.follow(np.nan)
    assert none.value == 1


def test_a_step_that_overflows_changes_no_weight(cuda, tmp_path):
    config = replace(tiny_run.Tiny(), steps=2)
    data = TokenData(np.arange(200, dtype=np.uint16), np.arange(50, dtype=np.uint16), 200, 50)
    model = mixed_model(config, cuda, "float16")
    trainer = Trainer(tmp_path, model, TrainSettings(log_every=1, eval_every=2, dtype="float16"), data)
    trainer.loss_scale.value = cuda.xp.full((), 2.0**40)
    before = here(model.store.flat_p).copy()
    with np.errstate(all="ignore"):
        loss, norm = trainer.gradients()
    assert np.isfinite(float(loss)) and not np.isfinite(float(norm))
    update(cuda, model.store, 1, 1e-2, norm, trainer.settings, trainer.loss_scale.value)
    trainer.loss_scale.follow(norm)
    assert (here(model.store.flat_p) == before).all()
    assert float(trainer.loss_scale.value) == 2.0**39


def test_the_norm_of_a_gradient_is_told_without_the_scale(cuda, tmp_path):
    config = tiny_run.Tiny()
    data = TokenData(np.arange(200, dtype=np.uint16), np.arange(50, dtype=np.uint16), 200, 50)
    norms = []
    for power in (0, 10):
        trainer = Trainer(tmp_path, mixed_model(config, cuda, "float16"), TrainSettings(dtype="float16"), data)
        trainer.loss_scale.value = cuda.xp.full((), 2.0**power)
        norms.append(float(trainer.gradients()[1]))
        assert float(grad_norm(cuda, trainer.model.store.flat_g)) == pytest.approx(norms[-1] * 2**power)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


# --- a recorded step


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*HALVES, "float32"])
@pytest.mark.parametrize("spike_from", [1.0, 0.5])
def test_recorded_steps_give_the_bits_of_launched_ones(name, spike_from, tmp_path):
    from minisb.backend import choose

    be = choose("cuda")[0]
    config = replace(tiny_run.Tiny(), steps=12)
    text = np.random.default_rng(0).integers(0, 300, 900, np.uint16)
    data, found = TokenData(text[:800], text[800:], 800, 100), []
    for graph in (False, True):
        folder = tmp_path / str(graph)
        folder.mkdir()
        settings = TrainSettings(log_every=5, eval_every=12, spike_from=spike_from, dtype=name, accumulate=2)
        trainer = Trainer(folder, mixed_model(config, be, name), settings, data, graph=graph)
        assert trainer.run()
        found.append(here(trainer.model.store.flat_p))
    takes = trainer.recorded.takes
    assert len(takes) == (1 if spike_from == 1 else 2) and all(take.graph for take in takes.values())
    assert (found[0] == found[1]).all()
