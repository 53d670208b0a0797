"""The token cache, batches and the bigram baseline."""

import math
import os
import sys

import numpy as np
import pytest
from corpora import clear_error, write_tree

from minisb import cache, data
from minisb.corpus import load_corpus
from minisb.data import batch, bigram_loss, default_tokenizer, eval_batches, load_tokens
from minisb.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENIZER = Tokenizer([bytes([value]) for value in range(256)])  # a byte a token: ids can be read off


# --- the cache


def test_cache_folder_by_platform(monkeypatch, tmp_path):
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MINISB_CACHE")
    monkeypatch.setattr(cache.Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    expected = {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}
    for platform, folder in expected.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert cache.cache_folder() == tmp_path / folder / "minisb"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "minisb"


def test_atomic_write_leaves_the_old_file_on_any_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), cache.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    text = write_tree(tmp_path, {"text.txt": "abc " * 100}) / "text.txt"
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "file"))
    with clear_error("cannot make the folder"):
        load_tokens(text, TOKENIZER)
    with clear_error("cannot make the folder"):
        load_corpus("shakespeare")


# --- tokens


def test_tokens_and_bytes(tmp_path):
    root = write_tree(tmp_path / "folder", {"a": "é", "b": "yz"})
    loaded = load_tokens(root, TOKENIZER)
    splits = sorted([loaded.train.tolist(), loaded.val.tolist()])
    assert splits == [[*b"yz", 256], [*"é".encode(), 256]]
    assert loaded.train_bytes == loaded.val_bytes == 2  # the eot token is no text
    assert isinstance(loaded.train, np.memmap) and loaded.train.dtype == np.uint16


def test_text_that_names_the_special_token_is_plain_text(tmp_path):
    (tmp_path / "t").write_text("<|endoftext|>" * 20)
    assert list(load_tokens(tmp_path / "t", TOKENIZER).train).count(TOKENIZER.eot) == 1


def test_large_vocabularies_take_uint32(tmp_path, monkeypatch):
    (tmp_path / "t").write_text("abc" * 20)
    monkeypatch.setattr(Tokenizer, "vocab_size", 70_000)
    assert load_tokens(tmp_path / "t", TOKENIZER).train.dtype == np.uint32


def test_text_is_encoded_once(tmp_path, monkeypatch, own_cache):
    (tmp_path / "t").write_text("abc" * 20)
    first = load_tokens(tmp_path / "t", TOKENIZER)
    assert len(os.listdir(own_cache / "tokens")) == 2  # and no temporary file
    monkeypatch.setattr(data, "_encode_documents", None)
    np.testing.assert_array_equal(load_tokens(tmp_path / "t", TOKENIZER).train, first.train)


def test_cache_knows_text_and_tokenizer(tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_text("abab" * 20)
    before = load_tokens(path, TOKENIZER)
    merged = load_tokens(path, Tokenizer([*TOKENIZER.tokens, b"ab"]))
    assert len(merged.train) < len(before.train)
    path.write_text("abac" * 20)
    assert load_tokens(path, TOKENIZER).train[3] == ord("c")
    monkeypatch.setattr(data, "CACHE_FORMAT", data.CACHE_FORMAT + 1)
    monkeypatch.setattr(data, "_encode_documents", lambda *_: np.zeros(7, np.uint16))
    assert len(load_tokens(path, TOKENIZER).train) == 7


def test_interrupted_encoding_leaves_nothing(tmp_path, monkeypatch, own_cache):
    (tmp_path / "t").write_text("abc" * 20)

    def dies(file, ids):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", dies)
        load_tokens(tmp_path / "t", TOKENIZER)
    assert os.listdir(own_cache / "tokens") == []
    assert len(load_tokens(tmp_path / "t", TOKENIZER).train) == 58


def test_damaged_token_file(tmp_path, own_cache):
    (tmp_path / "t").write_text("abc" * 20)
    load_tokens(tmp_path / "t", TOKENIZER)
    for path in (own_cache / "tokens").iterdir():
        path.write_bytes(b"junk")
    with clear_error("delete that file"):
        load_tokens(tmp_path / "t", TOKENIZER)


def test_own_tokenizer_is_learnt_once_from_the_training_split(tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_text("one two " * 95 + "six ten " * 5)
    learnt = default_tokenizer(path, 270)
    assert learnt.vocab_size <= 270 and b" two" in learnt.tokens
    assert not any(b"x" in token for token in learnt.tokens[256:])  # validation text taught nothing
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_bpe", None)
        assert default_tokenizer(path, 270).digest == learnt.digest
    assert default_tokenizer(path, 259).vocab_size == 259
    path.write_text("new text " * 100)
    assert default_tokenizer(path, 270).digest != learnt.digest


def test_vocabulary_too_small(tmp_path):
    (tmp_path / "t").write_text("abc" * 20)
    with clear_error("257"):
        default_tokenizer(tmp_path / "t", 100)


# --- batches


def epoch_windows(tokens, batch_size, seq_len, seed, steps):
    rows = [batch(tokens, batch_size, seq_len, seed, step)[0] for step in steps]
    return np.concatenate(rows)


def test_batch_shapes_and_targets():
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = batch(tokens, 4, 10, 0, 3)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    np.testing.assert_array_equal(targets, (inputs + 1) % 1000)


def test_batch_depends_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    wanted = batch(tokens, 4, 10, 7, 60)[0]
    np.random.seed(1)
    for step in (0, 59, 500):
        batch(tokens, 4, 10, 7, step)
    data._epoch.cache_clear()
    np.testing.assert_array_equal(batch(tokens, 4, 10, 7, 60)[0], wanted)
    assert not np.array_equal(batch(tokens, 4, 10, 8, 60)[0], wanted)
    assert not np.array_equal(batch(tokens, 4, 10, 7, 61)[0], wanted)


@pytest.mark.parametrize("length", [120, 127])  # 120 is 12 whole windows of 10, 127 leaves 7 tokens over
def test_an_epoch_reads_every_token_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    for epoch in range(5):
        read = epoch_windows(tokens, 4, 10, 0, range(3 * epoch, 3 * epoch + 3)).ravel()
        assert len(set(read)) == len(read) == 120


def test_epochs_differ_in_order_and_in_cuts():
    tokens = np.arange(1200, dtype=np.uint16)
    first = epoch_windows(tokens, 4, 10, 0, range(30))
    second = epoch_windows(tokens, 4, 10, 0, range(30, 60))
    assert set(first[:, 0] % 10) != set(second[:, 0] % 10)
    assert not np.array_equal(np.argsort(first[:, 0]), np.argsort(second[:, 0]))


def test_a_batch_may_span_epochs():
    tokens = np.arange(120, dtype=np.uint16)
    read = epoch_windows(tokens, 5, 10, 0, range(12))  # 60 windows: 5 epochs of 12
    assert np.bincount(read.ravel()).tolist() == [5] * 120
    assert batch(tokens[:11], 64, 10, 0, 0)[0].shape == (64, 10)


def test_golden_batch():
    """Written down so that a change of NumPy, platform or code that moves the data is seen."""
    inputs, _ = batch(np.arange(100, dtype=np.uint16), 4, 5, 1, 2)
    assert inputs[:, 0].tolist() == [58, 63, 8, 98]


def test_eval_batches_are_fixed_and_side_by_side():
    tokens = np.arange(75, dtype=np.uint16)
    pairs = list(eval_batches(tokens, 3, 10))
    assert [x.shape for x, _ in pairs] == [(3, 10), (3, 10), (1, 10)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in pairs]).ravel(), np.arange(70))
    np.testing.assert_array_equal(np.concatenate([y for _, y in pairs]).ravel(), np.arange(1, 71))
    assert len(list(eval_batches(tokens, 3, 10, limit=2))) == 2
    assert len(list(eval_batches(tokens[:71], 3, 10))) == 3
    assert sum(len(x) for x, _ in eval_batches(tokens[:70], 3, 10)) == 6  # the 70th has no target


@pytest.mark.parametrize("length, batch_size, seq_len", [(0, 1, 8), (8, 1, 8), (100, 0, 8), (100, 1, 0)])
def test_impossible_batches(length, batch_size, seq_len):
    tokens = np.zeros(length, np.uint16)
    with clear_error():
        batch(tokens, batch_size, seq_len, 0, 0)
    with clear_error():
        eval_batches(tokens, batch_size, seq_len)


def test_negative_seed():
    with clear_error("seed"):
        batch(np.zeros(100, np.uint16), 1, 8, -1, 0)


# --- the bigram baseline


def test_bigram_loss_by_hand():
    # training 0 1 0 1 2: c = 2 2 1 of 5; pairs 01 x2, 10, 12; contexts 0: 2, 1: 2; 2 is never a context
    p0 = (2 - 0.75) / 5 + 0.75 * 3 / 4 / 5
    p1, p2, p3 = p0, (1 - 0.75) / 5 + 0.75 * 3 / 4 / 5, 0.75 * 3 / 4 / 5
    assert math.isclose(p0 + p1 + p2 + p3, 1)
    expected = [
        ((2 - 0.75) + 0.75 * 1 * p1) / 2,  # 0 -> 1, seen twice
        ((1 - 0.75) + 0.75 * 2 * p2) / 2,  # 1 -> 2, seen once
        p3,  # 2 -> 3: after an unseen context, unigrams alone, here of an unseen token
        p0,  # 3 -> 0
        (0.75 * 1 * p0) / 2,  # 0 -> 0, an unseen pair
    ]
    train, val = np.array([0, 1, 0, 1, 2], np.uint16), np.array([0, 1, 2, 3, 0, 0], np.uint16)
    assert math.isclose(bigram_loss(train, val, 4), -np.log(expected).mean(), rel_tol=1e-12)


def test_bigram_probabilities_sum_to_one():
    train = np.random.default_rng(0).integers(0, 9, 50).astype(np.uint16)
    for left in range(12):  # 9, 10 and 11 never occur
        total = sum(math.exp(-bigram_loss(train, np.array([left, right]), 12)) for right in range(12))
        assert math.isclose(total, 1, rel_tol=1e-12)


def test_bigram_loss_of_wide_vocabularies_and_tiny_data():
    generator = np.random.default_rng(0)
    wide = generator.integers(0, 50_000, 20_000).astype(np.uint16)
    assert math.isfinite(bigram_loss(wide, wide[::-1], 50_000))
    assert math.isfinite(bigram_loss(np.array([1], np.uint16), np.array([1, 0], np.uint16), 2))
    for train, val in (([], [0, 1]), ([0], [1])):
        with clear_error():
            bigram_loss(np.array(train, np.uint16), np.array(val, np.uint16), 2)
