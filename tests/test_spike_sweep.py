"""The sweep over thresholds, tiny: it resumes, its branches differ, its broken backwards are broken."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from conftest import backend_of
from test_model import TINY, batch, model_of

from minisb import cli
from minisb.backend import Backend, CpuBackend
from minisb.checkpoint import load_weights
from minisb.config import Config
from minisb.data import default_tokenizer, load_tokens
from minisb.gradcheck import relative_rms
from minisb.model import specs
from minisb.params import ParamStore
from minisb.train import TrainSettings, start

spec = importlib.util.spec_from_file_location("spike_sweep", Path(__file__).parents[1] / "bench" / "spike_sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweep, "KS", (0.5, 3.0))
    text = tiny_run.write_text(tmp_path / "text", files=12)

    def run(*flags):
        capsys.readouterr()
        out = tmp_path / "out"
        code = cli.run(sweep.main, ["--preset", "tiny", "--data", str(text), "--out", str(out), *flags])
        return code, capsys.readouterr()

    return run


def test_the_sweep_finishes_and_skips_what_is_finished(run, tmp_path, monkeypatch):
    code, printed = run("--steps", "10")
    assert code == 0 and "zero gradient" in printed.out, printed.err
    result = json.loads(printed.out.splitlines()[-1])
    assert result["branch_at"] == 8 and [row["k"] for row in result["by_k"]] == [0.5, 3.0]
    coarse, fine = result["by_k"]
    assert coarse["sparsity"] > fine["sparsity"] and coarse["loss"] != coarse["untrained"]
    for row in [*result["by_k"], *result["broken"]]:
        assert row["cost"] == pytest.approx(row["loss"] / result["float"] - 1)
        gap = row["untrained"] - result["float"]
        assert row["recovered"] == pytest.approx((row["untrained"] - row["loss"]) / gap)
    assert len({row["loss"] for row in [coarse, *result["broken"]]}) == 3
    assert len({row["untrained"] for row in [coarse, *result["broken"]]}) == 1
    target = result["at_report_sparsity"]
    assert 0.5 < target["k"] < 3 and target["sparsity"] == pytest.approx(0.6915, abs=0.1)

    assert_float_twin_is_an_ordinary_run(tmp_path)
    monkeypatch.setattr(sweep.Trainer, "gradients", None)  # nothing is trained again
    assert json.loads(run("--steps", "10")[1].out.splitlines()[-1]) == result
    assert (tmp_path / "out" / "zero_gradient.json").exists()
    code, printed = run("--steps", "11")
    assert code == 2 and "other settings" in printed.err


def assert_float_twin_is_an_ordinary_run(tmp_path):
    """Branching changes nothing: float phase and float branch are one training, bit for bit."""
    described = json.loads((tmp_path / "out" / "sweep.json").read_text())
    config = Config.from_dict(described["model"])
    settings = replace(TrainSettings(**described["training"]), spike_from=1.0)
    tokenizer = default_tokenizer(settings.data, config.vocab)
    data = load_tokens(settings.data, tokenizer)
    trainer = start(tmp_path / "plain", config, settings, CpuBackend(), tokenizer, data)
    trainer.run()
    stores = [ParamStore(specs(config), np), trainer.model.store]
    load_weights(tmp_path / "out" / "float_twin", stores[0])
    assert np.array_equal(stores[0].flat_p, stores[1].flat_p)


@pytest.mark.parametrize("name", ["numpy", "cpu"])
def test_broken_backwards(name):
    """No gradient passes a spike, or the weights' gradient is that of unrounded inputs; the loss is the same."""
    backend_of(name)  # skips without natives
    make = {"numpy": Backend, "cpu": CpuBackend}[name]
    grads, losses = {}, {}
    for kind in (None, *sweep.BROKEN):
        be = make(2)
        if kind:
            sweep.break_backward(be, kind)
        model = model_of(TINY, be, np.float64, noise=0.1)
        losses[kind] = model.loss_and_backward(*batch(TINY), spike=True)
        grads[kind] = dict(model.store.g)
    assert losses[None] == losses["zero gradient"] == losses["dW with x"]
    right, zero, with_x = (grads[kind] for kind in (None, *sweep.BROKEN))
    assert all((zero[f"layers.{i}.mlp.up_proj.weight"] == 0).all() for i in range(TINY.layers))
    assert all((zero[f"layers.{i}.attn.q_proj.weight"] == 0).all() for i in range(TINY.layers))
    down = f"layers.{TINY.layers - 1}.mlp.down_proj.weight"  # nothing but the head is between it and the loss
    assert relative_rms(zero[down], right[down]) < 1e-12 < 1e-2 < relative_rms(with_x[down], right[down])
    last_norm = "norm.weight"
    assert relative_rms(with_x[last_norm], right[last_norm]) < 1e-12


def test_the_mean_of_seeds():
    one = {"float": 1.0, "by_k": [{"k": 0.5, "recovered": 0.2, "name": "k0.5"}], "at": None, "steps": 7}
    two = {"float": 2.0, "by_k": [{"k": 0.5, "recovered": 0.6, "name": "k0.5"}], "at": {"k": 1.0}, "steps": 7}
    found = sweep.mean([one, two])
    assert found["float"] == 1.5 and found["steps"] == 7
    assert found["by_k"] == [{"k": 0.5, "recovered": 0.4, "name": "k0.5", "recovered_by_seed": [0.2, 0.6]}]


def test_where_the_sparsity_is_the_reports():
    assert sweep._crossing([0.9, 0.7, 0.6], (1.0, 2.0, 3.0), 0.65) == 2.5
    assert sweep._crossing([0.6, 0.5], (1.0, 2.0), 0.65) is None
