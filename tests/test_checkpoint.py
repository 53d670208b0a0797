"""Runs on disk: whole or not at all, at any moment, and what is damaged is refused in a sentence."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

import minisb
from minisb import checkpoint
from minisb.backend import Backend
from minisb.config import Config
from minisb.errors import MinisbError
from minisb.model import SpikingBrain, specs
from minisb.params import ParamStore
from minisb.tokenizer import Tokenizer

FILES = {"config.json", "log.jsonl", "model.safetensors", "tokenizer.tiktoken", "train_state.safetensors"}
CONFIG = tiny_run.Tiny(vocab=257)


def filled_store(config=CONFIG, seed=0):
    """Weights and moments that differ everywhere, and a padding that does not."""
    store = ParamStore(specs(config), optimizer=True)
    rng = np.random.default_rng(seed)
    for flat in (store.flat_p, store.flat_m, store.flat_v):
        for view in store.named(flat).values():
            view[...] = rng.standard_normal(view.shape)
    return store


def empty_store(config=CONFIG):
    return ParamStore(specs(config), optimizer=True)


@pytest.fixture
def run_folder(tmp_path):
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save(tmp_path / checkpoint.TOKENIZER)
    checkpoint.save_state(tmp_path, filled_store(), 7)
    checkpoint.save_config(tmp_path, CONFIG, {"seed": 3}, tokenizer, {})
    return tmp_path


def test_state_returns_bit_for_bit(run_folder):
    store, want = empty_store(), filled_store()
    assert checkpoint.load_state(run_folder, store) == 7
    for name in ("flat_p", "flat_m", "flat_v"):
        assert np.array_equal(getattr(store, name), getattr(want, name)), name


def test_load_gives_the_model_and_its_tokenizer(run_folder):
    model = minisb.load(run_folder, native="none")
    want = SpikingBrain(CONFIG, Backend(), filled_store())
    tokens = np.array([model.tokenizer.encode("spike")])
    assert np.array_equal(model.forward(tokens), want.forward(tokens))
    assert {type(value) for value in (model.config, checkpoint.load_config(run_folder)["model"])} == {Config}
    assert model.config == Config.from_dict(CONFIG.to_dict())
    assert len(list(minisb.generate(model, tokens[0], 3))) == 3


def test_version_is_the_packages():
    text = (tiny_run.ROOT / "pyproject.toml").read_text()
    assert f'version = "{minisb.__version__}"' in text


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.WEIGHTS])
def test_any_flipped_bit_or_missing_end_is_noticed(run_folder, name):
    """A damaged file is refused, by name, and leaves the store as it was."""
    load = checkpoint.load_state if name == checkpoint.STATE else checkpoint.load_weights
    path, rng = run_folder / name, random.Random(5)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = [rng.randrange(header * 8) for _ in range(60)] + [rng.randrange(len(whole) * 8) for _ in range(30)]
    damaged = [whole[:cut] for cut in (0, 4, header - 9, header + 5, len(whole) - 1)]
    damaged += [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in flips]
    want, refused = filled_store(), 0
    for data in damaged:
        path.write_bytes(data)
        store = empty_store()
        try:
            step = load(run_folder, store)
        except MinisbError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
            assert not store.flat_p.any()
        else:  # only a blank that pads the header can change without meaning
            assert step == 7 and np.array_equal(store.flat_p, want.flat_p)
    assert refused > 0.95 * len(damaged)


def test_a_changed_step_is_noticed(run_folder):
    path = run_folder / checkpoint.STATE
    whole = path.read_bytes()
    for changed in (b'"step":"8"', b'"stop":"7"', b'"step":"x"'):
        path.write_bytes(whole.replace(b'"step":"7"', changed, 1))
        assert path.read_bytes() != whole
        with pytest.raises(MinisbError, match="damaged"):
            checkpoint.load_state(run_folder, empty_store())


def test_a_checkpoint_of_another_shape_is_refused(run_folder):
    with pytest.raises(MinisbError, match=r"train_state.safetensors does not fit config.json: .*ffn|mlp"):
        checkpoint.load_state(run_folder, empty_store(tiny_run.Tiny(vocab=257, ffn=32)))
    with pytest.raises(MinisbError, match="layers.2.* missing"):
        checkpoint.load_state(run_folder, empty_store(tiny_run.Tiny(vocab=257, layers=3)))


@pytest.mark.parametrize("name", sorted(FILES - {"log.jsonl"}))
def test_missing_and_damaged_files_are_named(run_folder, name):
    def read():
        settings = checkpoint.load_config(run_folder)
        checkpoint.load_tokenizer(run_folder, settings["tokenizer"])
        checkpoint.load_state(run_folder, empty_store())
        minisb.load(run_folder, native="none")

    for damage in (b"", b"\x00\xff half a file", b"{}", b"[1]", b'{"model": {}, "training": {}}'):
        (run_folder / name).write_bytes(damage)
        with pytest.raises(MinisbError, match=name):
            read()
    (run_folder / name).unlink()
    with pytest.raises(MinisbError, match=name):
        read()


def test_config_of_a_newer_version_or_with_a_bad_width_is_refused(run_folder):
    path = run_folder / checkpoint.CONFIG
    values = json.loads(path.read_text())
    for change, message in (
        ({"format": 99}, "format 99"),
        ({"model": {**values["model"], "width": 15}}, "width 15 is not divisible by 2 heads"),
        ({"model": {**values["model"], "warp": 1}}, "warp"),
        ({"model": {**values["model"], "width": "wide"}}, "damaged"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(MinisbError, match=message):
            checkpoint.load_config(run_folder)


def test_log_is_trimmed_to_the_step_and_forgives_half_a_line(tmp_path):
    for step in (1, 5, 10, 15):
        checkpoint.append_log(tmp_path, {"step": step, "loss": 1 / 3})
    with open(tmp_path / checkpoint.LOG, "a") as file:
        file.write('{"step": 20, "lo')
    assert [r["step"] for r in checkpoint.read_log(tmp_path)] == [1, 5, 10, 15]
    checkpoint.trim_log(tmp_path, 10)
    checkpoint.append_log(tmp_path, {"step": 11})
    assert [r["step"] for r in checkpoint.read_log(tmp_path)] == [1, 5, 10, 11]
    assert checkpoint.read_log(tmp_path)[0]["loss"] == 1 / 3


# --- killed at random moments


def train(*args, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(tiny_run.__file__)), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def fresh_flags(root: Path, run: Path) -> list:
    return ["--preset", "tiny", "--data", root / "text", "--native", "none", "--out", run,
            "--eval-every", 4, "--checkpoint-every", 3, "--spike-from", 0.5]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """-> the folder that holds text and run, and how many moments of a run one can die at."""
    root = tmp_path_factory.mktemp("runs")
    tiny_run.write_text(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISB_CACHE", str(root / "cache"))
        for run in ("warm", "whole"):  # the first also fills the cache, whose moments are not a run's
            done = train("kill", 0, *fresh_flags(root, root / run), cwd=root)
            assert done.returncode == 0, done.stderr
        yield root, int(done.stderr.split()[-1])


def log_without_speed(run: Path) -> list:
    return [{k: v for k, v in r.items() if k != "tok_per_s"} for r in checkpoint.read_log(run)]


def state(run: Path):
    config = checkpoint.load_config(run)["model"]
    store = empty_store(config)
    step = checkpoint.load_state(run, store)
    return step, store.flat_p, store.flat_m, store.flat_v


def assert_same_run(run: Path, whole: Path):
    for mine, theirs in zip(state(run), state(whole), strict=True):
        assert np.array_equal(mine, theirs)
    assert log_without_speed(run) == log_without_speed(whole)
    assert {path.name for path in run.iterdir()} - {"loss.png"} == FILES  # the picture needs matplotlib
    weights = minisb.load(run, native="none").store.flat_p
    assert np.array_equal(weights, state(run)[1])


def test_two_runs_are_bit_equal(uninterrupted):
    root, moments = uninterrupted
    assert moments > 60
    assert_same_run(root / "warm", root / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_then_resumed_is_bit_equal(uninterrupted, seed):
    """Each run is killed twice, at random moments, before it may finish."""
    root, moments = uninterrupted
    run, rng = root / f"killed-{seed}", random.Random(seed)
    for moment in (rng.randrange(1, moments), rng.randrange(1, moments // 2), 0):
        begun = checkpoint.is_run(run)
        flags = ["--resume", run] if begun else fresh_flags(root, run)
        done = train("kill", moment, *flags, cwd=root)
        assert done.returncode in ((-signal.SIGKILL, 0) if moment else (0,)), done.stderr
        if checkpoint.is_run(run):  # whatever the moment, the last checkpoint is whole
            state(run)
            minisb.load(run, native="none")
        else:
            assert moment
    assert_same_run(run, root / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_moment_of_a_checkpoint(tmp_path):
    """save_state in a child that dies at its first moment, then at its second, and so on."""
    old, new = filled_store(), filled_store(seed=1)
    found = []
    for moment in range(1, 100):
        checkpoint.save_state(tmp_path, old, 7)
        child = os.fork()
        if child == 0:
            tiny_run.watch_everything(moment)
            checkpoint.save_state(tmp_path, new, 8)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        store = empty_store()
        found.append(checkpoint.load_state(tmp_path, store))
        want = {7: old, 8: new}[found[-1]]
        for name in ("flat_p", "flat_m", "flat_v"):
            assert np.array_equal(getattr(store, name), getattr(want, name))
        assert checkpoint.load_weights(tmp_path, empty_store()) in (7, found[-1])
        if not os.WIFSIGNALED(status):
            break
    assert not status and len(found) > 8
    assert found == sorted(found) and set(found) == {7, 8}
    checkpoint.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.STATE, checkpoint.WEIGHTS}
