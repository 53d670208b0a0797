"""A recorded decoding step gives model.step's bits: from a CUDA graph, in emulation from a list of launches."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_quantize
import test_quantize_76b
from conftest import backends
from emulator import here, there
from test_decode import MIXED

from minisb import quantize
from minisb.backend import CudaBackend
from minisb.generate import generate
from minisb.gradcheck import relative_rms
from minisb.model import TABLE, SpikingBrain, specs
from minisb.ops.attention import attention_step, store_token
from minisb.ops.linear import linear_forward
from minisb.ops.w8aspike import attention_step_int8, store_token_int8
from minisb.params import ParamStore
from minisb.quantized import store_of
from minisb.recorded_step import RecordedStep, can_record

W = 4
HYBRID = replace(test_quantize_76b.C, window=W)
CONFIGS = {
    "7b": replace(MIXED, window=W),
    "biases": replace(MIXED, window=W, qkv_bias=True, mixers=("window",), layers=1),
    "76b": HYBRID,
    "shared, low-rank gate": replace(test_quantize_76b.LAYOUTS["shared, low-rank gate"], window=W),
    "two experts a token": replace(test_quantize_76b.LAYOUTS["two experts a token"], window=W),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config, be, dtype=np.float32):
    model = SpikingBrain(config, be, ParamStore(specs(config), be.xp, dtype))
    model.store.initialise(1)
    noise = np.random.default_rng(1).standard_normal(model.store.size)
    model.store.flat_p += be.xp.asarray((0.1 * noise).astype(dtype))
    return model


def int8_model(config, be, embedding=False):
    tensors, section, _ = quantize.quantize(
        test_quantize.float_model(config), test_quantize.texts_of(config), 128, embedding
    )
    return SpikingBrain(config, be, store_of(dict(tensors), section["k"], be.xp))


def compare(model, tokens, spike, start, again):
    """tokens (B,T): a prefill up to `start`, then steps, but for the slice `again`, which is a second prefill."""
    be, batch, T = model.be, *tokens.shape
    want, got = model.new_state(batch), model.new_state(batch)
    recorded = RecordedStep(model, got, spike, batch)
    on_device = there(be, tokens.astype(np.int32))
    if start:
        for state in (want, got):
            model.prefill(on_device[:, :start], state, spike)
    t = start
    while t < T:
        if t == again.start:
            for state in (want, got):
                model.prefill(on_device[:, again], state, spike)
            t = again.stop
        expected = here(model.step(on_device[:, t], want, spike))
        found = recorded(tokens[:, t])
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8), err_msg=f"token {t}")
        t += 1
    assert got.position == want.position == T
    assert [cache.seen for cache in got.caches()] == [cache.seen for cache in want.caches()]
    for a, b in zip(here(got.arrays()), here(want.arrays()), strict=True):
        np.testing.assert_array_equal(a, b)


def tokens_of(config, batch, length):
    return np.random.default_rng(2).integers(0, config.vocab, (batch, length))


@every_config
@pytest.mark.parametrize("spike", [False, True, ("k", "up")], ids=str)
def test_a_recorded_step_has_the_bits_of_a_step(cuda, config, spike):
    """Three windows, and a prefill in between, which leaves other arrays in the state."""
    if cuda.xp is np and spike is not (config is not CONFIGS["two experts a token"]):
        pytest.skip("in emulation each layout one way: with spikes, the last one without")
    model = model_of(config, cuda)
    assert can_record(model)
    compare(model, tokens_of(config, 1, 3 * W + 3), spike, 2, slice(8, 11))


@every_config
def test_of_an_int8_model(cuda, config):
    if cuda.xp is np and config not in (CONFIGS["7b"], CONFIGS["76b"]):
        pytest.skip("takes too long in emulation")
    if config.mixers == ("window",):
        config = replace(config, qkv_bias=False)
    compare(int8_model(config, cuda), tokens_of(config, 1, 2 * W), False, 2, slice(5, 7))


def test_of_a_batch_without_a_prompt(cuda):
    """Sinks are read with the first token; a cache of all tokens grows at 64."""
    compare(model_of(HYBRID, cuda), tokens_of(HYBRID, 3, 5), False, 0, slice(-1, -1))
    config = replace(MIXED, mixers=("full",), layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=4, vocab=9)
    compare(model_of(config, cuda, np.float64), tokens_of(config, 2, 67), False, 61, slice(-1, -1))


def test_the_table_of_angles_is_changed_in_time(cuda):
    config = replace(MIXED, window=W, mixers=("window",), layers=1)
    model, tokens = model_of(config, cuda), tokens_of(config, 1, 4)
    want, got = model.new_state(), model.new_state()
    want.position = got.position = 3 * TABLE - 2
    recorded = RecordedStep(model, got)
    for t in range(4):
        found, expected = recorded(tokens[:, t]), here(model.step(there(cuda, tokens[:, t]), want))
        np.testing.assert_array_equal(found, expected)


def test_a_text_is_decoded_with_it(cuda, monkeypatch):
    """Greedy, beside the same model on the CPU; and the plain step where the kernels were not asked for."""
    config, calls = CONFIGS["7b"], []
    call = RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", lambda self, tokens: calls.append(tokens) or call(self, tokens))
    want = list(generate(model_of(config, backends()["numpy"]), [1, 2, 3], 9, temperature=0))
    assert not calls
    assert list(generate(model_of(config, cuda), [1, 2, 3], 9, temperature=0)) == want
    assert calls == [[token] for token in want[:-1]]
    plain = model_of(config, CudaBackend(cuda.device, "none"))
    assert not can_record(plain) and list(generate(plain, [1, 2, 3], 9, temperature=0)) == want
    assert len(calls) == 8


def test_heads_too_large_for_the_kernels_are_not_recorded(cuda):
    config = replace(MIXED, head_dim=258, layers=1, mixers=("full",))
    assert not can_record(SpikingBrain(config, cuda))
    assert not can_record(SpikingBrain(replace(MIXED, width=64, heads=64, kv_heads=1, head_dim=128), cuda))
    assert can_record(SpikingBrain(replace(MIXED, head_dim=128), cuda))


# --- the kernels that read their numbers from the device


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_token_goes_to_its_slot(cuda, dtype, on_device):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 1, 3, 20)).astype(dtype) for _ in range(2))
    keys, values = (rng.standard_normal((2, 9, 3, 20)).astype(dtype) for _ in range(2))
    place = there(cuda, np.array([4, 5], np.int32))
    on_gpu = there(cuda, [keys, values, k, v])
    store_token(cuda, *on_gpu, place[:1] if on_device else 4)
    keys[:, 4], values[:, 4] = k[:, 0], v[:, 0]
    for got, want in zip(here(on_gpu[:2]), (keys, values), strict=True):
        np.testing.assert_array_equal(got, want)
    q = rng.standard_normal((2, 1, 6, 20)).astype(dtype)
    found = [here(attention_step(cuda, there(cuda, q), *on_gpu[:2], count)) for count in (place[1:], 5)]
    np.testing.assert_array_equal(*found)
    wanted = attention_step(backends()["numpy"], *(x.astype("float64") for x in (q, keys, values)), 5)
    np.testing.assert_allclose(found[0], wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_coded_token_goes_to_its_slot(cuda, on_device):
    rng = np.random.default_rng(0)
    B, S, G, D = 2, 9, 3, 20

    def coded(slots):
        x8 = rng.integers(-127, 128, (B, slots, G, D)).astype(np.int8)
        return [x8, rng.random((B, slots, G)).astype(np.float32)]

    cache, new = coded(S) + coded(S), coded(1) + coded(1)
    place = there(cuda, np.array([8, 9], np.int32))
    on_gpu = there(cuda, cache)
    store_token_int8(cuda, *on_gpu, *there(cuda, new), place[:1] if on_device else 8)
    for x, got, its in zip(cache, on_gpu, new, strict=True):
        x[:, 8] = its[:, 0]
        np.testing.assert_array_equal(here(got), x)
    q16, qv = rng.integers(-99, 99, (B, 1, 6, D)).astype(np.int16), rng.random((B, 1, 6)).astype(np.float32)
    found = [here(attention_step_int8(cuda, *there(cuda, [q16, qv]), *on_gpu, count)) for count in (place[1:], 9)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(
        found[0], attention_step_int8(backends()["numpy"], q16, qv, *cache, 9), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("O, I", [(1, 1), (70, 40), (9, 3), (5, 1100), (2050, 300)])
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-6), ("float64", 1e-14), ("float16", 2e-3)])
def test_one_tokens_product(cuda, O, I, dtype, limit):
    """With a bias of some of the columns, without one, and into some of the columns of a row."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in ((1, 1, I), (O, I), -(-O // 2)))
    want = w.astype("float64") @ x[0, 0].astype("float64")
    on_gpu = there(cuda, [x, w, b])
    assert relative_rms(here(linear_forward(cuda, *on_gpu[:2])).astype("float64"), want[None, None]) < limit
    row = there(cuda, np.full((1, 1, O + 7), 9, dtype))
    linear_forward(cuda, *on_gpu, out=row[..., 3 : 3 + O])
    want[: b.size] += b
    assert relative_rms(here(row)[0, 0, 3 : 3 + O].astype("float64"), want) < limit
    assert (here(row)[..., :3] == 9).all() and (here(row)[..., 3 + O :] == 9).all()


def test_the_bench_of_decoding(cuda, monkeypatch):
    """Same bits, and the bytes of a float model and of the same in int8."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    bench = importlib.import_module("gpu_decode")
    monkeypatch.setattr(bench, "PLAIN", 2)
    monkeypatch.setattr(bench, "RECORDED", 2)
    if cuda.xp is np:
        monkeypatch.setattr(bench, "replay", lambda recorded: 1.0)
    config = replace(test_quantize.C, window=W)
    floats = bench.float_model(config, cuda)
    found = [bench.measure(floats, False), bench.measure(floats, True)]
    found += [bench.measure(bench.int8_model(config, cuda, embedding), False) for embedding in (False, True)]
    assert all(row["same_bits"] and row["recorded_tok_s"] > 0 for row in found)
    assert found[0]["bytes"] == found[1]["bytes"] > found[2]["bytes"] > found[3]["bytes"]
