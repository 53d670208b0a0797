"""The loop: schedule, clipping, accumulation, learning at all, evaluation, threads, what it reports."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny_run

from minisb import checkpoint, train
from minisb.backend import Backend, CpuBackend
from minisb.best import Best
from minisb.data import TokenData, batch
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain, specs
from minisb.ops.adamw import grad_norm
from minisb.ops.spike import window_sparsity
from minisb.optim import clip_scale, lr_at, update
from minisb.params import ParamStore
from minisb.tokenizer import Tokenizer
from minisb.train import Trainer, TrainSettings, evaluate, resume, start, whole_windows

BYTES = Tokenizer([bytes([i]) for i in range(256)])
CONFIG = tiny_run.Tiny(vocab=257)
SETTINGS = TrainSettings(eval_every=4, checkpoint_every=3, spike_from=0.5, log_every=2)


def byte_data(lines=60) -> TokenData:
    rng = random.Random(1)
    text = [" ".join(rng.choice(tiny_run.WORDS) for _ in range(8)) + "\n" for _ in range(lines)]
    train_text, val_text = "".join(text[:-10]).encode(), "".join(text[-10:]).encode()
    return TokenData(*(np.frombuffer(t, np.uint8).astype(np.uint16) for t in (train_text, val_text)),
                     len(train_text), len(val_text))  # fmt: skip


DATA = byte_data()


def begin(folder, config=CONFIG, settings=SETTINGS, be=None) -> Trainer:
    return start(folder, config, settings, be or Backend(), BYTES, DATA)


def new_model(config=CONFIG, seed=0):
    store = ParamStore(specs(config), optimizer=True)
    store.initialise(seed)
    return SpikingBrain(config, Backend(), store)


def same(a: Trainer, b: Trainer) -> bool:
    flats = ("flat_p", "flat_m", "flat_v")
    return a.step == b.step and all(np.array_equal(getattr(a.model.store, n), getattr(b.model.store, n)) for n in flats)


def records(folder) -> list:
    return [{k: v for k, v in r.items() if k != "tok_per_s"} for r in checkpoint.read_log(folder)]


# --- the best weights


def judged(folder, losses):
    """A Best that saw these losses at steps 10, 20, ..., each with other weights; and the store."""
    store, best = new_model().store, Best(folder, "val_loss")
    for i, loss in enumerate(losses):
        store.flat_p.fill(10 * (i + 1))
        best.judge({"val_loss": loss}, store, 10 * (i + 1), is_last=i == len(losses) - 1)
    return best, store


def test_the_best_weights_come_back_if_validation_turned(tmp_path):
    best, store = judged(tmp_path, [5.0, 4.0, 4.2, 4.1])
    assert best.settle(store) == 20
    assert (store.flat_p[:3] == 20).all()
    kept = new_model().store
    assert checkpoint.load_weights(tmp_path, kept) == 20
    assert (kept.p["norm.weight"] == 20).all()


@pytest.mark.parametrize("losses", [[5.0, 4.0], [5.0, 4.0, 4.01]], ids=["fell", "chance"])
def test_the_last_weights_stay_if_validation_did_not_turn(tmp_path, losses):
    best, store = judged(tmp_path, losses)
    assert best.settle(store) is None
    assert (store.flat_p[:3] == 10 * len(losses)).all()
    assert not (tmp_path / checkpoint.BEST).exists()


def test_a_turned_run_says_so_and_resumes_with_its_best_in_mind(tmp_path, capsys, monkeypatch):
    rising = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr("minisb.train.evaluate", lambda *_: {"val_loss": 9.0, "val_loss_spike": next(rising)})
    settings = replace(SETTINGS, eval_every=3)
    config = replace(CONFIG, steps=9)
    first = begin(tmp_path, config, settings)
    first.model.config = replace(config, steps=6)  # stopped here
    first.run()
    assert not (tmp_path / checkpoint.BEST).exists()
    checkpoint.save_weights(tmp_path, first.model.store, 6, checkpoint.BEST)  # as a kill would have left it
    second = resume(tmp_path, config, settings, Backend(), DATA)
    assert (second.best.loss, second.best.step) == (2.0, 6)
    best = second.model.store.flat_p.copy()
    second.run()
    assert second.turned == 6 and (second.model.store.flat_p == best).all()
    assert "turned after step 6" in capsys.readouterr().out
    again = resume(tmp_path, config, settings, Backend(), DATA)
    again.run()  # nothing left to do, and the same is kept
    assert again.turned == 6 and (again.model.store.flat_p == best).all()
    assert checkpoint.load_state(tmp_path, again.model.store) == 9  # what goes on is the last


# --- schedule and clipping


def test_learning_rate_rises_in_a_line_then_falls_to_its_floor():
    rates = [lr_at(step, 2.0, 100, 10, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.2)
    assert np.diff(rates[10:]) == pytest.approx(np.full(89, (rates[99] - rates[10]) / 89))


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (3, 0), (5, 5)])
def test_learning_rate_of_very_short_runs(steps, warmup):
    rates = [lr_at(step, 1.0, steps, warmup, 0.1) for step in range(steps)]
    assert all(0.1 - 1e-9 <= rate <= 1 for rate in rates)


def test_clipping_scales_only_what_is_too_long():
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == 0.25


def test_update_is_that_of_the_clipped_gradient():
    stores = [ParamStore(specs(CONFIG), optimizer=True) for _ in range(2)]
    g = np.random.default_rng(0).standard_normal(stores[0].size).astype(np.float32)
    norm = grad_norm(Backend(), g)
    for store, gradient, told in zip(stores, (g, g / np.float32(norm)), (norm, 1.0), strict=True):
        store.initialise(0)
        store.flat_g[:] = gradient
        update(Backend(), store, 1, 1e-2, told, SETTINGS)
    assert relative_rms(stores[0].flat_m, stores[1].flat_m) < 1e-6
    assert relative_rms(stores[0].flat_p, stores[1].flat_p) < 1e-5
    assert np.linalg.norm(stores[0].flat_m) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) * clip


def test_update_corrects_the_moments_by_the_step_and_decays_matrices_only():
    store = ParamStore(specs(CONFIG), optimizer=True)
    store.flat_p[:], store.flat_g[:] = 1, 1e-3
    update(Backend(), store, 5, 1e-2, 0.5, SETTINGS)
    change = 1e-2 * (0.1 / (1 - 0.9**5)) / np.sqrt(0.01 / (1 - 0.99**5))
    assert store.flat_p[store.decayed] == pytest.approx(1 - change, rel=1e-5)
    assert store.flat_p[0] == pytest.approx(1 - 1e-2 * 0.1 - change, rel=1e-5)


# --- learning


def test_accumulating_n_batches_is_a_batch_n_times_larger(tmp_path):
    config = replace(CONFIG, batch_size=6)
    whole = begin(tmp_path / "whole", config)
    parts = begin(tmp_path / "parts", replace(config, batch_size=2), replace(SETTINGS, accumulate=3))
    (loss, norm), (loss_3, norm_3) = whole.gradients(), parts.gradients()
    assert loss_3 == pytest.approx(loss, rel=1e-5) and norm_3 == pytest.approx(norm, rel=1e-5)
    assert relative_rms(parts.model.store.flat_g, whole.model.store.flat_g) < 1e-5
    assert whole.tokens_per_step == parts.tokens_per_step == 96


def test_loss_goes_down_and_everything_is_reported(tmp_path):
    config = replace(CONFIG, steps=60, lr=2e-2, batch_size=4)
    trainer = begin(tmp_path, config, replace(SETTINGS, eval_every=20))
    assert trainer.run()
    log = checkpoint.read_log(tmp_path)
    assert [r["step"] for r in log] == [1, *range(2, 61, 2)]
    assert log[0]["loss"] > 5.4 and log[-1]["loss"] < 3
    assert all({"step", "tokens", "loss", "lr", "grad_norm", "tok_per_s"} <= set(r) for r in log)
    evaluated = [r for r in log if "val_loss" in r]
    assert [r["step"] for r in evaluated] == [20, 40, 60]
    assert all({"val_loss", "val_loss_spike", "sparsity"} <= set(r) for r in evaluated)
    assert evaluated[-1]["val_loss"] < 3 and log[-1]["tokens"] == 60 * 64

    result = trainer.summary()
    assert result["steps"] == 60 and result["tokens"] == 60 * 64
    assert result["val_loss"] == pytest.approx(evaluated[-1]["val_loss"])  # short text: both read all of it
    assert result["train_loss"] == pytest.approx(np.mean([r["loss"] for r in log if r["step"] > 57]))
    assert result["val_loss_bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))  # bytes are tokens
    assert 0 < result["bigram_loss"] < 3 and 0 < result["sparsity"] < 1
    assert json.loads(json.dumps(result)) == result


def test_one_batch_is_learnt_by_heart():
    model = new_model()
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 257, (2, 2, 16)).astype(np.int32)
    for step in range(150):
        model.store.zero_grad()
        loss = model.loss_and_backward(x, y)
        update(model.be, model.store, step + 1, 1e-2, grad_norm(model.be, model.store.flat_g), SETTINGS)
    assert loss < 0.1


def test_spikes_are_on_from_their_share_of_the_steps(tmp_path, monkeypatch):
    seen = []
    original = SpikingBrain.loss_and_backward

    def spy(self, x, y, spike=False, *rest):
        seen.append(spike)
        return original(self, x, y, spike, *rest)

    monkeypatch.setattr(SpikingBrain, "loss_and_backward", spy)
    begin(tmp_path, settings=replace(SETTINGS, spike_from=0.75)).run()
    assert seen == [False] * 9 + [True] * 3


# --- evaluation


def test_evaluation_is_the_mean_over_whole_windows():
    model = new_model(replace(CONFIG, batch_size=3))
    tokens = whole_windows(DATA.val, model.config, 10**6)
    windows = (len(DATA.val) - 1) // 16
    assert len(tokens) == windows * 16 + 1 and windows % 3  # the last batch is a smaller one
    x, y = tokens[:-1].reshape(-1, 16).astype(int), tokens[1:].reshape(-1, 16).astype(int)
    found = evaluate(model, tokens)
    assert found["val_loss"] == pytest.approx(model.loss(x, y), rel=1e-6)
    assert found["val_loss_spike"] == pytest.approx(model.loss(x, y, True), rel=1e-4)
    assert found["val_loss_spike"] != found["val_loss"]
    assert len(whole_windows(DATA.val, model.config, 40)) == 33
    assert len(whole_windows(DATA.val, model.config, 5)) == 17


def test_evaluation_reads_small_batches_together(monkeypatch):
    """As many windows a pass as PASS_TOKENS holds, never fewer than the run's own batch; the losses stay."""
    model, shapes = new_model(), []
    tokens, original = whole_windows(DATA.val, model.config, 10 * 16), model.loss
    monkeypatch.setattr(model, "loss", lambda x, *rest: shapes.append(x.shape) or original(x, *rest))
    found = {}
    for budget in (5, 70, 10**6):
        monkeypatch.setattr("minisb.evaluate.PASS_TOKENS", budget)
        found[budget] = evaluate(model, tokens)
    one_by_two, by_four, whole = 2 * [(2, 16)] * 5, 2 * [(4, 16), (4, 16), (2, 16)], 2 * [(10, 16)]
    assert shapes == one_by_two + by_four + whole
    for name in ("val_loss", "val_loss_spike"):
        assert found[5][name] == pytest.approx(found[70][name], rel=1e-6) == pytest.approx(found[10**6][name], rel=1e-6)


def test_a_pass_without_backward_keeps_nothing_for_it():
    model, x = new_model(), batch(DATA.val, 2, 16, 0, 0)[0]
    kept, _, _ = model._forward(x, False)[1]
    assert kept == [None] * CONFIG.layers
    kept, _, _ = model._forward(x, False, aux=1.0)[1]
    assert all(kept)


def test_a_short_run_is_judged_on_no_more_than_it_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "GLANCE_TOKENS", 48)
    trainer = begin(tmp_path, replace(CONFIG, steps=4))
    assert trainer.run()
    result = trainer.summary()
    assert result["val_tokens"] == result["tokens"] == 4 * 32 < len(DATA.val) - 16
    assert result["val_loss"] == pytest.approx(evaluate(trainer.model, DATA.val[:129])["val_loss"], rel=1e-6)
    trainer.step = 1
    assert trainer.summary()["val_tokens"] == 48  # but on a glance at least
    monkeypatch.setattr(train, "FINAL_TOKENS", 64)
    trainer.step = 4
    assert trainer.summary()["val_tokens"] == 64


def test_short_runs_look_seldom():
    assert train.intervals(3) == train.intervals(50) == {"eval_every": 10, "checkpoint_every": 10}
    assert train.intervals(2200) == {"eval_every": 275, "checkpoint_every": 440}


def test_without_spikes_there_is_no_sparsity():
    found = evaluate(new_model(replace(CONFIG, spike=())), DATA.val)
    assert found["sparsity"] is None and found["val_loss_spike"] == found["val_loss"]


def test_window_sparsity_counts_empty_bits():
    count = np.array([[0, 1, -1, 2, 3], [-4, 5, 7, -7, 8]], np.float32)  # 0 1 1 1 2, 1 2 3 3 3 (clipped)
    assert window_sparsity(Backend(), count) == pytest.approx(1 - 17 / 30)
    assert window_sparsity(Backend(), np.zeros((2, 3))) == 1
    assert window_sparsity(Backend(), np.full((2, 3), -900.0)) == 0


# --- bits


def test_threads_do_not_change_a_bit(tmp_path):
    config = replace(CONFIG, width=64, heads=4, kv_heads=2, head_dim=16, ffn=160, window=32, seq_len=96, batch_size=3,
                     steps=4)  # fmt: skip
    if "linear" not in CpuBackend(1).modules:
        pytest.skip("not run: the natives are not compiled, and NumPy's own BLAS promises no equal bits")
    runs = [begin(tmp_path / str(n), config, be=CpuBackend(n)) for n in (1, 2, 4)]
    for trainer in runs:
        trainer.run()
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert records(tmp_path / "1") == records(tmp_path / "2") == records(tmp_path / "4")
