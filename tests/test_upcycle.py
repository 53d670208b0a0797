"""Upcycling: copies that add up to the dense network, the command, and a run that goes on."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from minisb import checkpoint
from minisb.__main__ import main
from minisb.backend import Backend
from minisb.errors import MinisbError
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain, specs
from minisb.params import ParamStore
from minisb.upcycle import mismatch, scales, upcycled_config, upcycled_store

found = importlib.util.spec_from_file_location("upcycle_bench", Path(__file__).parents[1] / "bench" / "upcycle.py")
bench = importlib.util.module_from_spec(found)
found.loader.exec_module(bench)

TINY = replace(tiny_run.Tiny(), vocab=61)


def dense_model(config=TINY):
    model = SpikingBrain(config, Backend(threads=1), ParamStore(specs(config)))
    model.store.initialise(0)
    model.store.flat_p += 0.1 * np.random.default_rng(1).standard_normal(model.store.size).astype(np.float32)
    return model


def upcycled(model, exact, experts=16, **changes):
    config = upcycled_config(model.config, experts, **changes)
    return SpikingBrain(config, model.be, upcycled_store(model, config, exact, seed=3))


def test_alpha_of_the_report():
    config = upcycled_config(TINY, 16)
    assert (
        scales(config, False)["gate_proj"]
        == pytest.approx((1 / (1 + 1 / 16)) ** (1 / 3))
        == pytest.approx(0.98, abs=1e-3)
    )
    assert scales(config, True) == pytest.approx(
        {"gate_proj": 1, "up_proj": (16 / 17) ** 0.5, "down_proj": (16 / 17) ** 0.5}
    )


@pytest.mark.parametrize("changes", [{}, {"top_k": 2}, {"shared": 2}], ids=str)
def test_copies_add_up_to_the_dense_network(changes):
    """Exactly, but for the router, which is near zero and not zero; the report's way within a few percent."""
    dense, tokens = dense_model(), np.arange(40) % TINY.vocab
    exact = mismatch(dense, upcycled(dense, True, **changes), tokens)
    assert len(exact) == TINY.layers and max(exact) < 2e-3
    unscaled = abs(changes.get("shared", 1) + changes.get("top_k", 1) / 16 - 1)
    assert max(exact) < max(mismatch(dense, upcycled(dense, False, **changes), tokens)) < unscaled / 2


def test_a_router_of_zeros_makes_it_exact():
    dense, tokens = dense_model(), np.random.default_rng(0).integers(0, TINY.vocab, (2, 30))
    model = upcycled(dense, True)
    for name, p in model.store.p.items():
        if "router" in name:
            p[...] = 0
    assert relative_rms(model.forward(tokens), dense.forward(tokens)) < 1e-5


def test_layers_may_stay_dense():
    dense = dense_model()
    model = upcycled(dense, True, dense=(0,))
    assert model.config.ffns == ("dense", "moe") and "layers.0.mlp.gate_proj.weight" in model.store.p
    assert len(mismatch(dense, model, np.arange(20))) == 1


@pytest.mark.parametrize(
    "changes, words",
    [({"dense": (0, 1)}, "nothing is left"), ({"dense": (7,)}, "no layer 7"), ({"top_k": 17}, "top_k")],
)
def test_bad_settings_are_one_sentence(changes, words):
    with pytest.raises(MinisbError, match=words):
        upcycled_config(TINY, 16, **changes)


def test_the_command_makes_a_run_that_goes_on(tmp_path, capsys):
    """Dense run -> upcycle -> resume: the loss starts where it was, and experts are logged."""
    text = tiny_run.write_text(tmp_path / "text")

    def train(*flags):
        command = [sys.executable, tiny_run.__file__, "kill", "0", *flags, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tiny_run.ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    train("--preset", "tiny", "--data", str(text), "--out", str(tmp_path / "dense"), "--steps", "30")
    arguments = ["upcycle", str(tmp_path / "dense"), "--experts", "4", "--out", str(tmp_path / "moe"), "--steps", "12"]
    assert main([*arguments, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert "differs from the dense one's by" in out and f"--resume {tmp_path / 'moe'}" in out
    assert found["val_loss_upcycled"] == pytest.approx(found["val_loss"], rel=0.01)
    assert f"differs from the dense one's by {np.mean(found['mismatch']):.2%}" in out
    with pytest.raises(MinisbError, match="already holds a run"):
        main(arguments)
    assert main([*arguments[:5], str(tmp_path / "exact"), "--exact"]) == 0
    exact = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exact["scale"]["gate_proj"] == 1 != found["scale"]["gate_proj"]
    assert max(exact["mismatch"]) < min(found["mismatch"]) and len(exact["mismatch"]) == 2

    result = train("--resume", str(tmp_path / "moe"))
    assert result["steps"] == 12 and result["params"] == found["params_upcycled"]
    log = checkpoint.read_log(tmp_path / "moe")
    assert set(log[0]["expert_load"]) == {"0", "1"} and len(log[0]["expert_load"]["0"]) == 4
    assert sum(log[-1]["expert_load"]["1"]) == pytest.approx(1, abs=1e-3)
    assert 0 < log[-1]["router_entropy"] <= np.log(4) + 1e-6 and log[-1]["dropped"] == 0
    with pytest.raises(MinisbError, match="experts already"):
        main(["upcycle", str(tmp_path / "moe"), "--experts", "4", "--out", str(tmp_path / "again")])


# --- bench/upcycle.py


def test_pairs_are_compared_pair_by_pair():
    found = bench.compared({"dense": [4.0, 4.2, 4.4], "upcycled": [3.9, 4.1, 4.3]})
    assert found["last"]["dense"]["mean"] == pytest.approx(4.2)
    assert [found["last"][side]["spread"] for side in bench.SIDES] == pytest.approx([0.2, 0.2])
    assert found["difference"]["mean"] == pytest.approx(-0.1)
    assert found["difference"]["spread"] == pytest.approx(0, abs=1e-9)
    assert bench.compared({"dense": [4.0], "upcycled": [3.9]})["difference"]["spread"] is None


def test_the_experiment_runs_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    text, out = tiny_run.write_text(tmp_path / "text"), tmp_path / "out"
    arguments = ["--preset", "tiny", "--data", str(text), "--base-steps", "20", "--steps", "4", "--seeds", "2"]
    arguments += ["--experts", "4", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(bench, "PRESETS", ("tiny",))
    assert bench.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["first"]["upcycled"] == pytest.approx(found["first"]["dense"], rel=0.01)
    assert found["first"]["dense"][0] == found["first"]["dense"][1] > found["last"]["dense"]["mean"]
    assert found["last"]["dense"]["seeds"][0] != found["last"]["dense"]["seeds"][1]
    assert len(found["mismatch"]) == len(found["expert_load_min"]) == 2
    stored = json.loads((out / "upcycle.json").read_text())
    assert [len(stored["curves"][side]) for side in bench.SIDES] == [2, 2]
    assert (out / "upcycle.png").read_bytes().startswith(b"\x89PNG")

    assert bench.main(arguments) == 0  # nothing is trained again, and timing has changed no weight
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {**again, "tok_per_s": 0} == {**found, "tok_per_s": 0}
