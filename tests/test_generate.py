"""Sampling, generation and sample.py."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minisb
import sample as sample_script
from minisb.backend import Backend
from minisb.config import Config, preset
from minisb.errors import MinisbError
from minisb.generate import PIECE, generate, read_prompt, sample_token
from minisb.model import SpikingBrain

ROOT = Path(__file__).parent.parent
TINY = Config(
    vocab=300, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=16, window=8, gate_rank=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = SpikingBrain(TINY, Backend(threads=2))
    model.store.initialise(3)
    model.store.flat_p *= 3  # sharper than at the start of training, so that greedy is well defined
    return model


def draws(logits, count=4000, seed=0, **settings):
    rng = np.random.default_rng(seed)
    ids = [sample_token(np.asarray(logits), rng, **settings) for _ in range(count)]
    return np.bincount(ids, minlength=len(logits)) / count


# --- one token


def test_greedy_is_argmax():
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.standard_normal(50).astype(np.float32)
        assert sample_token(logits, None, temperature=0) == logits.argmax()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_narrow_settings_are_greedy(settings):
    logits = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    assert draws(logits, 20, **settings)[logits.argmax()] == 1


def test_distribution_is_the_softmax():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -np.inf])
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature)
        expected /= expected.sum()
        assert np.abs(draws(logits, temperature=temperature) - expected).max() < 0.03


def test_top_k_keeps_the_k_most_likely_in_proportion():
    found = draws([0.0, 3.0, 2.0, -1.0, 1.0], temperature=1, top_k=2)
    share = 1 / (1 + np.exp(-1))
    assert found[[0, 3, 4]].tolist() == [0, 0, 0] and abs(found[1] - share) < 0.03


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = np.log([0.1, 0.5, 0.1, 0.3])
    assert (draws(logits, temperature=1, top_p=0.5) > 0).tolist() == [False, True, False, False]
    found = draws(logits, temperature=1, top_p=0.7)
    assert (found > 0).tolist() == [False, True, False, True] and abs(found[1] - 0.625) < 0.03
    assert (draws(logits, temperature=1, top_p=1.0) > 0).all()


def test_top_p_counts_within_top_k():
    """After top-k the share is of what is left: 0.5 and 0.3 of 0.8, of which 0.6 needs only the first."""
    found = draws(np.log([0.1, 0.5, 0.1, 0.3]), temperature=1, top_k=2, top_p=0.6)
    assert (found > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1 - 1e-12])
def test_top_p_is_as_if_everything_were_sorted(top_k, top_p):
    """Equal logits too, and distributions from flat to sharp."""
    rng = np.random.default_rng(0)
    for n in range(40):
        logits = np.round(rng.standard_normal(300) * (0.1, 1, 3, 9)[n % 4], n % 3)
        order = np.argsort(-logits, kind="stable")[:top_k]
        p = np.exp((logits[order] - logits.max()) / 0.8)
        kept = order[np.cumsum(p) - p < top_p * p.sum()]
        drawn = {sample_token(logits, rng, 0.8, top_k, top_p) for _ in range(60)}
        assert logits[list(drawn)].min() >= logits[kept[-1]]
        if top_k is None:  # of equal logits the first come first; argpartition keeps no order
            assert drawn <= set(kept.tolist())
            q = p[: len(kept)] / p[: len(kept)].sum()
            place = np.random.default_rng(n)
            want = kept[np.searchsorted(np.cumsum(q), place.random(), side="right")]
            assert sample_token(logits, np.random.default_rng(n), 0.8, top_k, top_p) == want


def test_a_long_tail_keeps_its_share():
    """50,000 tokens of probability e^-11 each hold nearly half of all probability."""
    logits = np.full(50_000, -11.0, np.float32)
    logits[0] = 0
    assert abs(draws(logits, 300, temperature=1)[0] - 1 / (1 + 49_999 * np.exp(-11))) < 0.1


def test_logits_are_left_alone():
    logits = np.random.default_rng(2).standard_normal(50)
    kept = logits.copy()
    sample_token(logits, np.random.default_rng(0), 0.7, 5, 0.9)
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_reported(bad):
    with pytest.raises(MinisbError, match="not finite"):
        sample_token(np.array([0.0, bad, 1.0]), np.random.default_rng(0))


# --- a text


def test_greedy_follows_the_full_pass(model):
    prompt = [5, 9, 2]
    found = list(generate(model, prompt, 30, temperature=0))
    ids = prompt + found
    logits = model.forward(np.array([ids]))[0]
    assert found == logits[2:-1].argmax(-1).tolist()


def test_seeds(model):
    def text(**settings):
        return list(generate(model, [1, 2], 40, **{"temperature": 1.5, **settings}))

    assert text(seed=4) == text(seed=4)
    assert text(seed=4) != text(seed=5)
    assert all(0 <= token < TINY.vocab for token in text())


def test_long_prompts_are_read_in_pieces(model):
    prompt = np.random.default_rng(0).integers(0, TINY.vocab, 2 * PIECE + 37)
    lengths = []
    prefill = model.prefill
    model.prefill = lambda tokens, *rest: lengths.append(tokens.shape[1]) or prefill(tokens, *rest)
    try:
        logits = read_prompt(model, prompt, model.new_state())
    finally:
        del model.prefill
    assert lengths == [PIECE, PIECE, 37]
    np.testing.assert_allclose(logits, model.forward(prompt[None])[0, -1], atol=1e-4)


def test_empty_prompt_starts_from_the_end_of_text(model):
    assert list(generate(model, [], 8, seed=1, stop=299)) == list(generate(model, [299], 8, seed=1, stop=299))
    with pytest.raises(MinisbError, match="empty prompt"):
        generate(model, [], 8)


def test_stop_ends_the_text_and_is_not_handed_out(model):
    found = list(generate(model, [5, 9, 2], 30, temperature=0))
    stop = found[3]
    assert list(generate(model, [5, 9, 2], 30, temperature=0, stop=stop)) == found[: found.index(stop)]


def test_a_state_carries_a_text_on(model):
    whole = list(generate(model, [5, 9, 2], 12, temperature=0))
    state = model.new_state()
    size = state.nbytes
    first = list(generate(model, [5, 9, 2], 5, temperature=0, state=state))
    assert state.position == 3 + 4
    assert first + list(generate(model, first[-1:], 7, temperature=0, state=state)) == whole
    assert state.nbytes == size


def test_tokens_come_one_at_a_time(model):
    state = model.new_state()
    ids = generate(model, [1, 2, 3], 10, state=state)
    assert state.position == 0
    next(ids)
    assert state.position == 3
    next(ids)
    assert state.position == 4


def test_no_tokens_asked_for(model):
    assert list(generate(model, [1], 0)) == []


def test_spiking_generation_runs(model):
    assert len(list(generate(model, [1, 2], 5, spike=True))) == 5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"prompt_ids": [1, 300]}, "300 is outside"),
        ({"prompt_ids": [-1]}, "-1 is outside"),
        ({"prompt_ids": [0.5]}, "whole numbers"),
        ({"prompt_ids": [[1, 2]]}, "whole numbers"),
        ({"tokens": -1}, "number of tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
    ],
)
def test_bad_arguments_are_named_at_once(model, settings, words):
    with pytest.raises(MinisbError, match=words):
        generate(model, **{"prompt_ids": [1], "tokens": 3, **settings})


# --- sample.py


def sample(*arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=env, **options)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An untrained run: the smallest one that sample.py can read."""
    from minisb import checkpoint, data
    from minisb.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.load(data.PACKAGED)
    config = Config(vocab=tokenizer.vocab_size, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=16, window=8)
    model = SpikingBrain(config, Backend(threads=1))
    model.store.initialise(0)
    checkpoint.save_config(folder, config, {}, tokenizer, {})
    tokenizer.save(folder / checkpoint.TOKENIZER)
    checkpoint.save_weights(folder, model.store, 0)
    return folder


def test_sample_streams_text_and_reports(run_folder):
    done = sample(run_folder, "--prompt", "def é(", "--tokens", 12, "--temperature", 1, "--seed", 3)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")  # strict: no half characters
    assert text.startswith("def é(") and len(text) > len("def é(\n")
    line = done.stderr.decode().strip()
    # 1 state matrix of 8 x 8 and a ring of 8 keys and values of 8, fp32
    assert "\n" not in line and line.startswith("12 tokens") and "768 bytes (constant)" in line
    again = sample(run_folder, "--prompt", "def é(", "--tokens", 12, "--temperature", 1, "--seed", 3)
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--quantized"], "python -m minisb quantize"),
        (["--top-p", "2"], "top-p"),
        (["--tokens", "-3"], "tokens"),
        (["--device", "cuda"], "GPU"),
        (["--tokens", "many"], "--tokens"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_sample_refuses_in_one_line(run_folder, arguments, words):
    done = sample(run_folder, *arguments)
    error = done.stderr.decode().strip()
    assert done.returncode == 2 and words in error and "\n" not in error and not done.stdout


def test_sample_says_when_the_text_ends_at_once(monkeypatch, capsys):
    """A reader who sees nothing should know why."""
    tokenizer = SimpleNamespace(encode=lambda text: [], stream=lambda ids: map(str, ids), eot=0)
    model = SimpleNamespace(tokenizer=tokenizer, new_state=lambda: SimpleNamespace(nbytes=1), config=preset("nano"))
    monkeypatch.setattr(minisb, "load", lambda *_, **__: model)
    monkeypatch.setattr(sample_script, "generate", lambda *_, **__: iter(()))
    assert sample_script.main(["run"]) == 0
    assert "ended the text at once" in capsys.readouterr().err


def test_sample_without_a_run(tmp_path):
    done = sample(tmp_path / "nothing")
    error = done.stderr.decode().strip()
    assert done.returncode == 2 and "nothing" in error and "\n" not in error


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_sample_is_quiet_when_its_reader_leaves(run_folder):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "sample.py"), str(run_folder), "--prompt", "x", "--tokens", "50"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert done.stderr == b"" and done.returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_sample_ends_cleanly_on_interrupt(run_folder):
    import signal

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "sample.py"), str(run_folder), "--prompt", "ab", "--tokens", "1000000"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests run in the background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, preexec_fn=listen)
    assert process.stdout.read(2) == b"ab"  # it is past its imports and writing
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in error and b"decode state" in error
