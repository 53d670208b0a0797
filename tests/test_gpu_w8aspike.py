"""W8ASpike's kernels: the CPU's bits, on a GPU and in emulation."""

import numpy as np
import pytest
import test_quantize
import test_quantize_76b
from conftest import backends
from emulator import here, there
from test_w8aspike import SIZES, assert_same_bits, heads, heavy, normal

from minisb import quantize
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain
from minisb.ops import w8aspike as ops
from minisb.params import ParamStore
from minisb.quantized import store_of

NUMPY = backends()["numpy"]


@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("N", [1, 6, 70])
def test_the_product_has_the_cpus_bits(cuda, N, group):
    """Odd widths, counts far beyond int8, a bias; few tokens and many."""
    for seed, (O, I) in enumerate(SIZES):
        if cuda.xp is np and N * O * I > 1 << 19:
            continue
        w8, scales = ops.quantize_weight(normal(seed, O, I), group)
        x, b = heavy(seed + 50, N, I), normal(seed, O) if seed % 2 else None
        got = ops.w8aspike_linear(cuda, *there(cuda, [x, w8, scales]), 3.0, None if b is None else there(cuda, b))
        assert_same_bits(here(got), ops.w8aspike_linear(NUMPY, x, w8, scales, 3.0, b))


@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("counts, R", [((0, 3, 0, 5, 1), 12), ((70, 0, 2), 80), ((0,), 3)])
def test_one_product_per_expert_has_the_cpus_bits(cuda, counts, R, group):
    E, O, I, offsets = len(counts), 70, 144, np.cumsum([0, *counts])
    matrices = [ops.quantize_weight(normal(e, O, I), group) for e in range(E)]
    w8, scales = (np.stack(parts) for parts in zip(*matrices, strict=True))
    x = heavy(9, R, I)
    got = ops.w8aspike_grouped(cuda, *there(cuda, [x, w8, scales]), 3.0, there(cuda, offsets))
    assert_same_bits(here(got), ops.w8aspike_grouped(NUMPY, x, w8, scales, 3.0, offsets))


def test_counts_and_what_int8_cannot_hold(cuda):
    x = np.concatenate([heavy(2, 9, 300), np.zeros((1, 300), np.float32), np.full((1, 300), 3e38, np.float32)])
    x[3, 5], x[4, 7] = np.nan, np.inf
    got, want = ops.spike_int8(cuda, there(cuda, x), 3.0), ops.spike_int8(NUMPY, x, 3.0)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
        assert_same_bits(here(a), b)
    for a, b in zip(ops.count_spikes(cuda, there(cuda, x), 2.5), ops.count_spikes(NUMPY, x, 2.5), strict=True):
        assert_same_bits(here(a), b)


def test_extreme_integers(cuda):
    w8, scales = np.full((3, 512), -127, np.int8), np.ones((3, 4), np.float32)
    w8[1] = 127
    for top in (126, 1e5):  # the second: every count far beyond int8
        x = np.full((1, 512), top, np.float32)
        x[0, ::7] = -top
        got = ops.w8aspike_linear(cuda, *there(cuda, [x, w8, scales]), min(top, 1e5))
        assert_same_bits(here(got), ops.w8aspike_linear(NUMPY, x, w8, scales, min(top, 1e5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_shows_and_spoils_no_other(cuda, bad):
    w8, scales = ops.quantize_weight(normal(0, 5, 130))
    x = normal(1, 3, 130)
    clean = ops.w8aspike_linear(NUMPY, x, w8, scales, 3.0)
    x[1, 7] = bad
    y = here(ops.w8aspike_linear(cuda, *there(cuda, [x, w8, scales]), 3.0))
    assert np.isnan(y[1]).all()
    assert_same_bits(y[[0, 2]], clean[[0, 2]])


def test_no_tokens(cuda):
    w8, scales = there(cuda, list(ops.quantize_weight(normal(0, 5, 130))))
    assert ops.w8aspike_linear(cuda, cuda.xp.empty((2, 0, 130), "float32"), w8, scales, 3.0).shape == (2, 0, 5)


@pytest.mark.parametrize("name", ["numpy", "cuda"])
def test_each_token_of_an_int8_table_has_its_own_scale(cuda, name):
    be = cuda if name == "cuda" else NUMPY
    w = normal(0, 11, 7) * np.logspace(-3, 3, 11, dtype=np.float32)[:, None]
    w8, scales = ops.quantize_weight(w, None)
    tokens = np.array([[1, 2, 10], [0, 0, 5]])
    got = here(ops.embedding_int8(be, *there(be, [tokens, w8, scales])))
    assert_same_bits(got, w8[tokens] * scales[tokens])
    assert relative_rms(got[0, 0], w[1]) < 0.01 and relative_rms(got[0, 2], w[10]) < 0.01


def test_heads_have_the_cpus_bits(cuda):
    for D in (2, 20, 96):
        q, k, v = heads(3, T=4, D=D)
        k[0, 0, 0], v[0, 1, 1, 0], q[0, 2, 1, 1] = 0, np.nan, np.inf
        got = ops.code_heads(cuda, *there(cuda, [q, k, v]), 2.5)
        for a, b in zip(got, ops.code_heads(NUMPY, q, k, v, 2.5), strict=True):
            assert_same_bits(here(a), b)


@pytest.mark.parametrize("count, D", [(1, 20), (7, 64), (41, 6), (50, 130)])
def test_a_decoding_step(cuda, count, D):
    q, k, v = heads(4, T=50, D=D)
    coded = ops.code_heads(NUMPY, q, k, v, 3.0)
    arguments = coded[0][:, :1].copy(), coded[1][:, :1].copy(), *coded[2:]
    got = ops.attention_step_int8(cuda, *there(cuda, list(arguments)), count)
    assert relative_rms(here(got), ops.attention_step_int8(NUMPY, *arguments, count)) < 1e-6


# --- a quantised model --------------------------------------------------------------------------

LAYOUTS = {
    "7b": test_quantize.C,
    "76b": test_quantize_76b.C,
    "shared, low-rank gate": test_quantize_76b.LAYOUTS["shared, low-rank gate"],
}


@pytest.mark.parametrize(
    "layout, embedding", [("7b", True), ("7b", False), ("76b", False), ("shared, low-rank gate", True)]
)
def test_a_quantised_model(cuda, layout, embedding):
    """As the CPU's but for sums of floats, which at a tie become a spike; and its steps follow its full pass."""
    if cuda.xp is np and layout == "shared, low-rank gate":
        pytest.skip("takes too long in emulation")
    config = LAYOUTS[layout]
    model = test_quantize.float_model(config)
    tensors, section, _ = quantize.quantize(model, test_quantize.texts_of(config), 128, embedding)
    want = SpikingBrain(config, NUMPY, store_of(dict(tensors), section["k"]))
    got = SpikingBrain(config, cuda, store_of(dict(tensors), section["k"], cuda.xp))
    tokens = np.random.default_rng(2).integers(0, config.vocab, (2, 14))
    on_device, counts = there(cuda, tokens), {}
    full = here(got.forward(on_device, tap=lambda name, x: counts.setdefault(name, x)))
    assert relative_rms(full, want.forward(tokens)) < 0.05
    loss = float(want.loss(tokens[:, :-1], tokens[:, 1:]))
    assert float(got.loss(on_device[:, :-1], on_device[:, 1:])) == pytest.approx(loss, rel=2e-3)
    assert any(name.endswith("down.count") and here(x).any() for name, x in counts.items())
    state = got.new_state(2)
    got.prefill(on_device[:, :9], state)
    for t in range(9, 14):
        assert relative_rms(here(got.step(on_device[:, t], state)), full[:, t]) < 0.1, t


@pytest.mark.parametrize("layout", ["7b", "76b"])
def test_quantising_where_the_model_computes(cuda, layout):
    """Sums of floats differ in their last bits, and so may the choice between two shares that serve a row alike."""
    if cuda.xp is np and layout == "76b":
        pytest.skip("takes too long in emulation")
    config = LAYOUTS[layout]
    texts = test_quantize.texts_of(config, 2)
    host = test_quantize.float_model(config)
    model = SpikingBrain(config, cuda, ParamStore(host.specs, cuda.xp))
    for name, x in host.store.p.items():
        model.store.p[name][...] = cuda.xp.asarray(x)
    (want, wanted, _), (got, section, _) = (quantize.quantize(m, texts, 128) for m in (host, model))
    assert set(section["k"]) == set(wanted["k"]) and all(isinstance(x, np.ndarray) for x in got.values())
    for name in want:
        if name.endswith(".int8"):
            scales = name.removesuffix(".int8") + ".scales"
            a, b = (x[scales].astype(np.float64) for x in (want, got))
            assert (np.abs(a / b - 1) < 1e-5).mean() > 0.9, name
            same = np.broadcast_to(np.abs(a / b - 1).max(-1, keepdims=True) < 1e-5, want[name].shape)
            assert (want[name] == got[name])[same].mean() > 0.99, name
        elif not name.endswith(".scales"):
            np.testing.assert_array_equal(got[name], want[name])
