"""Bad input to train_small.py: one clear line on stderr, exit code 2, never a traceback."""

import json
import math
import sys

import pytest
import tiny_run

from minisb import checkpoint, cli, train
from minisb.config import Config
from minisb.model import SpikingBrain

sys.path.insert(0, str(tiny_run.ROOT))
import train_small  # noqa: E402

TINY = ["--preset", "tiny", "--data", "text", "--native", "none", "--steps", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a cache, and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("home")
    tiny_run.write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert cli.run(train_small.main, [*TINY, "--out", "run"]) == 0
    return folder


@pytest.fixture
def fails(home, monkeypatch, capsys):
    """fails(flags, words): the script ends with one line that holds all the words."""
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)

    def check(flags, *words):
        capsys.readouterr()
        assert cli.run(train_small.main, list(map(str, flags))) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in words:
            assert word in lines[0], lines[0]

    return check


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "huge"], ["unknown preset 'huge'", "nano", "7b-mini"]),
        (["--preset", "nanno"], ["unknown preset 'nanno', did you mean nano?", "7b-mini"]),
        (["--preset", "7B"], ["unknown preset '7B', did you mean 7b?"]),
        (["--device", "cuda"], ["GPU", "--device cpu"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--dtype", "bfloat16"], ["bfloat16", "GPU"]),
        (["--dtype", "int3"], ["int3"]),
        (["--graph", "on", "--native", "none"], ["--graph", "GPU"]),
        (["--native", "gla,fast"], ["unknown native 'fast'"]),
        (["--spike", "q,knee"], ["'knee'", "gate"]),
        (["--spike-k", "0"], ["spike_k"]),
        (["--spike-from", "2"], ["spike_from"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--batch-size", "0"], ["batch_size"]),
        (["--seq-len", "-1"], ["seq_len"]),
        (["--lr", "0"], ["lr"]),
        (["--lr", "nan"], ["lr"]),
        ([*TINY, "--lr", "inf"], ["learning rate"]),
        (["--seed", "-1"], ["seed"]),
        (["--accumulate", "0"], ["accumulate"]),
        (["--eval-every", "0"], ["eval_every"]),
        (["--checkpoint-every", "0"], ["checkpoint_every"]),
        (["--threads", "0"], ["threads"]),
        (["--frobnicate"], ["--frobnicate"]),
        ([*TINY, "--seq-len", "5000"], ["too few", "--seq-len"]),
        ([*TINY, "--data", "nowhere"], ["nowhere"]),
        ([*TINY, "--out", "run"], ["already holds a run", "--resume run"]),
        ([*TINY, "--out", "text/0.txt"], ["text/0.txt"]),
        (["--resume", "nowhere"], ["no run in nowhere"]),
        (["--resume", "run", "--lr", "1"], ["--lr", "cannot change"]),
        (["--resume", "run", "--steps", "8"], ["--steps", "cannot change", "--preset tiny --steps 8"]),
        (["--resume", "run", "--data", "stdlib"], ["--data", "cannot change"]),
        (["--resume", "run", "--out", "other"], ["--out", "cannot change"]),
    ],
)
def test_flags(fails, flags, words):
    fails(flags, *words)


@pytest.mark.parametrize("name, data", [("empty", b""), ("binary", bytes(range(256)) * 40), ("short", b"x")])
def test_data(fails, home, name, data):
    (home / name).write_bytes(data)
    fails([*TINY, "--data", name, "--out", f"of-{name}"], name)
    assert not (home / f"of-{name}").exists()


def test_folder_without_text(fails, home):
    (home / "nothing" / "below").mkdir(parents=True)
    fails([*TINY, "--data", "nothing"], "nothing")


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.CONFIG, checkpoint.TOKENIZER])
def test_damaged_or_missing_file_of_a_run(fails, home, name):
    path = home / "run" / name
    whole = path.read_bytes()
    try:
        for damage in (whole[: len(whole) // 2], b""):
            path.write_bytes(damage)
            fails(["--resume", "run"], name)
        path.unlink()
        fails(["--resume", "run"], name)
    finally:
        path.write_bytes(whole)


def test_checkpoint_that_does_not_fit_its_config(fails, home):
    path = home / "run" / checkpoint.CONFIG
    whole = path.read_text()
    try:
        for change, words in (
            ({"ffn": 32}, [checkpoint.STATE, "does not fit"]),
            ({"width": 15}, ["config.json", "width 15 is not divisible by 2 heads"]),
        ):
            values = json.loads(whole)
            values["model"] |= change
            path.write_text(json.dumps(values))
            fails(["--resume", "run"], *words)
    finally:
        path.write_text(whole)


def test_width_that_heads_do_not_divide(capsys):
    assert cli.run(lambda argv: Config(width=100, heads=3, kv_heads=1)) == 2
    assert capsys.readouterr().err == "error: width 100 is not divisible by 3 heads.\n"


def test_loss_that_is_not_a_number(fails, home, monkeypatch):
    original, calls = SpikingBrain.loss_and_backward, []

    def breaks(self, *args):
        calls.append(args)
        return original(self, *args) if len(calls) < 4 else math.nan

    monkeypatch.setattr(SpikingBrain, "loss_and_backward", breaks)
    every = ["--checkpoint-every", "2", "--eval-every", "1"]
    fails([*TINY, "--out", "nan", *every], "the loss became nan", "--lr", "of step 2")
    assert checkpoint.read_log("nan")[-1]["step"] == 3


def test_learning_rate_that_ruins_the_weights(fails):
    fails([*TINY, "--out", "wild", "--steps", "40", "--lr", "1e37"], "training stopped", "--lr", "checkpoint")


def test_out_of_memory(fails, monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SpikingBrain, "loss_and_backward", no_memory)
        fails([*TINY, "--out", "full"], "out of memory", "--batch-size")
    with monkeypatch.context() as patch:
        patch.setattr(train, "ParamStore", no_memory)
        fails([*TINY, "--out", "fuller"], "out of memory")


def test_model_larger_than_the_machine(fails, monkeypatch):
    monkeypatch.setattr(train, "memory", lambda: 16_000_000_000)
    fails(["--preset", "7b"], "out of memory", "7b takes 121.9 GB", "16.0 GB")


def test_full_disk(fails, monkeypatch):
    def full(path, data, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "write_bytes", full)
    fails([*TINY, "--out", "disk"], "cannot write", "No space left on device")


def test_a_second_run_takes_the_next_free_name(home, monkeypatch, capsys):
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    for name in ("runs/tiny", "runs/tiny-2", "runs/tiny-3"):
        assert cli.run(train_small.main, TINY) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == name
        assert checkpoint.is_run(name)


def test_a_finished_run_resumes_to_the_same_result(home, monkeypatch, capsys):
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    before = checkpoint.read_log("run")
    assert cli.run(train_small.main, ["--resume", "run", "--preset", "tiny", "--data", "text", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4
    assert checkpoint.read_log("run") == before


def test_changed_text_is_noted_on_resume(home, monkeypatch, capsys):
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    path = home / "text" / "0.txt"
    whole = path.read_text()
    try:
        path.write_text(whole + "\nand one more line")
        assert cli.run(train_small.main, ["--resume", "run"]) == 0
    finally:
        path.write_text(whole)
    assert capsys.readouterr().err.startswith("note: the text is not the one this run began with")


def test_exit_codes(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.run(interrupted, []) == 130
    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(lambda argv: 7, []) == 7
    assert "Traceback" not in capsys.readouterr().err
