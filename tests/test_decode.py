"""Decoding remembers little and forgets nothing: full pass, prefill in any pieces and steps agree."""

import numpy as np
import pytest

from minisb import native
from minisb.backend import Backend, CpuBackend
from minisb.config import Config
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain
from minisb.state import KeyValueCache

LIMIT = 1e-5
#: 3 windows reach over a chunk of linear attention and a block of queries (64 each).
MIXED = Config(
    vocab=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, ffn=40, window=24,
    mixers=("gla", "window", "full"), gate_rank=4,
)  # fmt: skip
CONSTANT = Config(
    vocab=31, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn=8, window=16, gate_rank=2, gate_divisor=1.0
)


def backends():
    yield pytest.param(Backend, id="numpy")
    compiled = any(reason == "" for reason in native.status().values())
    yield pytest.param(CpuBackend, id="cpu", marks=pytest.mark.skipif(not compiled, reason="natives are not compiled"))


@pytest.fixture(params=backends())
def be(request):
    return request.param(threads=2)


def model_of(config, be, seed=1):
    """A model whose biases and norms are not at their bland initial values either."""
    model = SpikingBrain(config, be)
    model.store.initialise(seed)
    noise = np.random.default_rng(seed).standard_normal(model.store.size)
    model.store.flat_p += (0.1 * noise).astype(np.float32)
    return model


def tokens_of(config, batch, length, seed=2):
    return np.random.default_rng(seed).integers(0, config.vocab, (batch, length))


def pieces_of(length, rng):
    """A random partition of `length`, single tokens and long pieces included."""
    sizes = []
    while sum(sizes) < length:
        most = length - sum(sizes)
        sizes.append(int(rng.integers(1, most + 1)) if rng.random() < 0.7 else 1)
    return sizes


def prefill_in(model, tokens, sizes, state=None, **kwargs):
    state = state or model.new_state(len(tokens))
    start = 0
    for size in sizes:
        logits = model.prefill(tokens[:, start : start + size], state, **kwargs)
        start += size
    return logits, state


def assert_same_state(one, other):
    assert one.position == other.position
    for a, b in zip(one.layers, other.layers, strict=True):
        if isinstance(a, KeyValueCache):
            for x, y in zip(a.past(), b.past(), strict=True):
                assert relative_rms(x, y) < LIMIT
        else:
            assert relative_rms(a.matrix, b.matrix) < LIMIT


def test_steps_equal_the_full_pass_at_every_length(be):
    model, tokens = model_of(MIXED, be), tokens_of(MIXED, 2, 3 * MIXED.window)
    full = model.forward(tokens)
    state = model.new_state(2)
    for t in range(tokens.shape[1]):
        assert relative_rms(model.step(tokens[:, t], state), full[:, t]) < LIMIT, t


@pytest.mark.parametrize("seed", range(6))
def test_prefill_in_any_pieces_equals_one_pass(be, seed):
    model, rng = model_of(MIXED, be), np.random.default_rng(seed)
    for length in {1, MIXED.window, 3 * MIXED.window, int(rng.integers(2, 3 * MIXED.window))}:
        tokens = tokens_of(MIXED, 2, length)
        whole, state = prefill_in(model, tokens, [length])
        cut, state_cut = prefill_in(model, tokens, pieces_of(length, rng))
        assert relative_rms(whole, model.forward(tokens)[:, -1]) < LIMIT
        assert relative_rms(cut, whole) < LIMIT
        assert_same_state(state_cut, state)
        after = tokens_of(MIXED, 2, 1, seed=9)[:, 0]
        assert relative_rms(model.step(after, state_cut), model.step(after, state)) < LIMIT


def test_every_length_by_prefill(be):
    model, tokens = model_of(MIXED, be), tokens_of(MIXED, 1, 3 * MIXED.window)
    full = model.forward(tokens)
    for length in range(1, tokens.shape[1] + 1):
        logits, _ = prefill_in(model, tokens[:, :length], [length])
        assert relative_rms(logits, full[:, length - 1]) < LIMIT, length


def test_a_batch_is_its_sequences(be):
    model, tokens = model_of(MIXED, be), tokens_of(MIXED, 3, 40)
    together, _ = prefill_in(model, tokens, [17, 1, 22])
    for i in range(3):
        alone, _ = prefill_in(model, tokens[i : i + 1], [40])
        assert relative_rms(together[i], alone[0]) < LIMIT


def test_numpy_and_natives_agree():
    cpu = CpuBackend(threads=2)
    if not cpu.modules:
        pytest.skip("natives are not compiled")
    tokens = tokens_of(MIXED, 2, 3 * MIXED.window)
    fast = model_of(MIXED, cpu).forward(tokens)
    assert relative_rms(fast, model_of(MIXED, Backend(threads=2)).forward(tokens)) < LIMIT


def test_state_is_as_large_after_64k_tokens_as_after_1k(be):
    model, state, sizes = model_of(CONSTANT, be), None, []
    empty = model.new_state().nbytes
    for length in (1024, 65536 - 1024):
        tokens = tokens_of(CONSTANT, 1, length)
        logits, state = prefill_in(model, tokens, [2048] * (length // 2048) + [1024], state)
        sizes.append(state.nbytes)
        assert np.isfinite(logits).all()
    assert state.position == 65536
    assert sizes == [empty, empty]


def test_a_million_tokens_in_rotary_angles_are_still_exact(be):
    """Only distances matter to a rotation, so a text read at position 1,000,000 reads the same."""
    model, tokens = model_of(MIXED, be), tokens_of(MIXED, 1, 60)
    state = model.new_state()
    state.position = 1_000_000
    logits, _ = prefill_in(model, tokens, [30, 1, 29], state)
    assert relative_rms(logits[0], model.forward(tokens)[0, -1]) < LIMIT


def test_a_copied_state_goes_its_own_way(be):
    model, tokens = model_of(MIXED, be), tokens_of(MIXED, 1, 30)
    _, state = prefill_in(model, tokens, [30])
    twin, kept = state.copy(), state.copy()
    for token in (1, 2, 3):
        model.step(np.array([token]), twin)
    model.prefill(tokens, twin)
    assert_same_state(state, kept)
    assert twin.position == 63 and state.position == 30
    a, b = (model.step(np.array([7]), s) for s in (state, kept))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [[1] * 11, [3, 1, 7], [11], [5, 6], [2, 20, 1], [4, 4, 4]])
def test_ring_wraps(sizes):
    """The ring holds the last W tokens; the next token may see W - 1 of them, oldest first."""
    config = Config(heads=1, kv_heads=1, head_dim=2, width=2, window=4)
    ring = KeyValueCache(Backend(), config, 1, np.float32, 4)
    number = np.arange(1, sum(sizes) + 1, dtype=np.float32)
    rows = np.broadcast_to(number[None, :, None, None], (1, len(number), 1, 2))
    start = 0
    for size in sizes:
        ring.append(rows[:, start : start + size], -rows[:, start : start + size])
        start += size
    k, v = ring.past()
    assert k[0, :, 0, 0].tolist() == number[-3:].tolist()
    assert v[0, :, 0, 0].tolist() == (-number[-3:]).tolist()
    assert sorted(ring.k[0, : ring.count, 0, 0]) == number[-4:].tolist()
    assert ring.k.shape[1] == 4 and ring.seen == len(number)


def test_full_attention_keeps_everything_and_grows():
    config = Config(heads=1, kv_heads=1, head_dim=2, width=2)
    cache = KeyValueCache(Backend(), config, 1, np.float32, None)
    k = np.random.default_rng(0).standard_normal((1, 200, 1, 2)).astype(np.float32)
    for part in (slice(0, 60), slice(60, 65), slice(65, 200)):
        cache.append(k[:, part], 2 * k[:, part])
    np.testing.assert_array_equal(cache.past()[0], k)
    np.testing.assert_array_equal(cache.past()[1], 2 * k)
    assert cache.k.shape[1] == 256


def test_spiking_decode_follows_the_spiking_pass():
    """With spikes a last-bit difference can become a whole spike, so only the loss is compared
    with a full pass; one pass in one piece is the same computation up to the head."""
    model, tokens = model_of(MIXED, Backend(threads=2)), tokens_of(MIXED, 2, 50)
    full = model.forward(tokens, spike=True)
    whole, _ = prefill_in(model, tokens, [50], spike=True)
    assert relative_rms(whole, full[:, -1]) < 0.1
    assert not np.allclose(full, model.forward(tokens))
