"""A run that stops: at a crash, by Ctrl-C or because something went wrong, and how it goes on."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from test_train import BYTES, CONFIG, DATA, SETTINGS, begin, records, same

from minisb import checkpoint, cli, train
from minisb.backend import Backend
from minisb.data import batch
from minisb.errors import MinisbError
from minisb.model import SpikingBrain
from minisb.optim import update
from minisb.train import TrainSettings, resume, start

sys.path.insert(0, str(tiny_run.ROOT))
import train_small  # noqa: E402


def test_resumed_from_any_checkpoint_is_bit_equal(tmp_path, monkeypatch):
    """Crash while reading batch n, before, at and after the step where spikes come on (6)."""
    whole = begin(tmp_path / "whole")
    whole.run()
    for crash in (1, 4, 7, 8, 12):
        folder, part = tmp_path / str(crash), begin(tmp_path / str(crash))

        def crashing(*args, crash=crash):
            if args[-1] == crash:
                raise RuntimeError
            return batch(*args)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(train, "batch", crashing)
            part.run() and crashing(12)  # 12: after the last step
        (folder / ".model.safetensors.1.tmp").write_bytes(b"half")
        again = resume(folder, CONFIG, SETTINGS, Backend(), DATA)
        assert not list(folder.glob(".*"))
        assert again.step == (crash if crash == 12 else (crash - 1) // 3 * 3)
        assert again.run()
        assert same(again, whole) and records(folder) == records(tmp_path / "whole")


def press_at(monkeypatch, *numbers):
    """Ctrl-C while the batches with these numbers are read."""
    calls = []

    def pressed(*args):
        calls.append(args)
        if len(calls) in numbers:
            signal.raise_signal(signal.SIGINT)
        return batch(*args)

    monkeypatch.setattr(train, "batch", pressed)


def test_ctrl_c_saves_a_whole_step(tmp_path, monkeypatch):
    whole = begin(tmp_path / "whole")
    whole.run()
    before = signal.getsignal(signal.SIGINT)
    press_at(monkeypatch, 6)
    stopped = begin(tmp_path / "stopped")
    assert stopped.run() is False
    assert stopped.step == stopped.saved == 5
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    again = resume(tmp_path / "stopped", CONFIG, SETTINGS, Backend(), DATA)
    assert again.step == 5 and again.run()
    assert same(again, whole) and records(tmp_path / "stopped") == records(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    trainer = begin(tmp_path)

    def twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "batch", twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert resume(tmp_path, CONFIG, SETTINGS, Backend(), DATA).step == 0


def test_script_says_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    tiny_run.write_text(tmp_path / "text")
    script = [sys.executable, str(Path(tiny_run.__file__)), "stop"]
    flags = ["--preset", "tiny", "--data", "text", "--native", "none", "--out", "run"]
    done = subprocess.run([*script, "4", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "stopped at step 3 of 12; go on with: python" in done.stderr
    assert done.stderr.rstrip().endswith("--resume run") and "Traceback" not in done.stderr
    done = subprocess.run([*script, "0", "--resume", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    promised = {"params", "steps", "tokens", "train_loss", "val_loss", "val_loss_spike", "bigram_loss", "sparsity",
                "tok_per_s", "wall_s", "device", "native"}  # fmt: skip
    assert promised <= set(result) and result["steps"] == 12


@pytest.mark.parametrize(
    "where, words",
    [
        ("load_tokens", "nothing was saved yet, so start again with the same command"),
        ("_introduce", "go on with: python {script} --resume run"),  # step 0 is on disk
        ("_conclude", "go on with: python {script} --resume run"),
    ],
)
def test_ctrl_c_outside_the_loop_says_how_to_go_on(tmp_path, monkeypatch, capsys, where, words):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_run.write_text(tmp_path / "text")

    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_small, where, pressed)
    flags = ["--preset", "tiny", "--data", "text", "--native", "none", "--out", "run", "--steps", "2"]
    assert cli.run(train_small.main, flags) == 130
    said = capsys.readouterr().err
    assert said.rstrip().endswith("stopped; " + words.format(script=tiny_run.ROOT / "train_small.py")), said
    monkeypatch.undo()
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.run(train_small.main, ["--resume", "run"] if "--resume" in words else flags) == 0


def test_ctrl_c_while_modules_load_is_a_sentence(tmp_path):
    """A module that train_small.py loads presses Ctrl-C in its first line."""
    (tmp_path / "tqdm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(tiny_run.ROOT / "train_small.py"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 130 and not done.stdout
    assert done.stderr.strip() == train_small.NOTHING_SAVED.strip()


# --- going wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, bad):
    original = SpikingBrain.loss_and_backward
    calls = []

    def breaks(self, *args):
        calls.append(args)
        return original(self, *args) if len(calls) < 8 else bad

    monkeypatch.setattr(SpikingBrain, "loss_and_backward", breaks)
    trainer = begin(tmp_path)
    with pytest.raises(MinisbError, match=f"loss became {bad} after step 7, .* last good checkpoint, of step 6"):
        trainer.run()
    assert resume(tmp_path, CONFIG, SETTINGS, Backend(), DATA).step == 6


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    trainer = begin(tmp_path)
    before = trainer.model.store.flat_p.copy()
    monkeypatch.setattr(train, "grad_norm", lambda be, g: math.inf)
    with pytest.raises(MinisbError, match="gradient became inf"):
        trainer.run()
    assert np.array_equal(trainer.model.store.flat_p, before) and not trainer.model.store.flat_m.any()


def test_weights_ruined_by_the_step_before_a_checkpoint_are_not_saved(tmp_path, monkeypatch):
    trainer = begin(tmp_path)

    def ruins(be, store, step, *args):
        update(be, store, step, *args)
        if step == 6:  # a checkpoint is due after this step
            store.flat_p[:] = np.nan

    monkeypatch.setattr(train, "update", ruins)
    with pytest.raises(MinisbError, match="of step 3"):
        trainer.run()
    assert np.isfinite(resume(tmp_path, CONFIG, SETTINGS, Backend(), DATA).model.store.flat_p).all()


def test_out_of_memory_is_one_sentence(tmp_path, monkeypatch):
    trainer = begin(tmp_path)
    monkeypatch.setattr(SpikingBrain, "loss_and_backward", lambda *a: np.empty(1 << 50))
    with pytest.raises(MinisbError, match="out of memory: .*batch-size.* checkpoint of step 0"):
        trainer.run()


def test_text_too_short_is_refused_before_the_first_step(tmp_path):
    for data in (replace(DATA, val=DATA.val[:16]), replace(DATA, train=DATA.train[:16])):
        with pytest.raises(MinisbError, match="text has 16 tokens, too few for a sequence length of 16"):
            start(tmp_path / "short", CONFIG, SETTINGS, Backend(), BYTES, data)
    assert not checkpoint.is_run(tmp_path / "short")


@pytest.mark.parametrize("change", [{"accumulate": 0}, {"spike_from": 1.5}, {"seed": -1}, {"eval_every": 0}])
def test_settings_outside_their_range(change):
    with pytest.raises(MinisbError, match=next(iter(change))):
        TrainSettings(**change)
