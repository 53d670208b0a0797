"""W8ASpike's arithmetic: what the integers stand for, and equal bits on every path."""

import numpy as np
import pytest
from conftest import backend_of, backends

from minisb.backend import Backend, CpuBackend
from minisb.gradcheck import relative_rms
from minisb.ops import w8aspike as ops
from minisb.ops.spike import spike_forward

SIZES = [(5, 576), (8, 112), (17, 592), (4, 1), (33, 1536), (64, 128), (2, 129), (65, 2048)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def heavy(seed, N, C):
    """Tokens of very different size, with a few activations far out: some counts leave int8."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (N, C)) * 10 ** rng.uniform(-1, 1, (N, 1))
    x[:, C // 2] *= 400
    return x.astype(np.float32)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


@pytest.fixture(params=["portable", "avx2", "avxvnni", "avx512vnni"])
def path(request):
    """Each set of instructions that this processor has, in turn."""
    backend_of("cpu", "w8aspike_linear")
    from minisb.cpu import w8aspike

    if request.param not in w8aspike.paths():
        pytest.skip(f"this processor has no {request.param}")
    w8aspike.use_path(request.param)
    yield request.param
    w8aspike.use_path(w8aspike.paths()[0])


# --- weights


@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("O, I", SIZES)
def test_no_weight_is_off_by_more_than_half_its_scale(O, I, group):
    w = normal(0, O, I) * np.logspace(-30, 3, I, dtype=np.float32)
    w[0] = 0
    w8, scales = ops.quantize_weight(w, group)
    assert w8.dtype == np.int8 and scales.dtype == np.float32 and w8.min() >= -127
    assert scales.shape == (O, 1 if group is None else -(-I // 128)) and (scales > 0).all()
    spread = np.repeat(scales, group or I, axis=1)[:, :I].astype(np.float64)
    error = np.abs(w8 * spread - w)
    assert (error <= spread / 2 * (1 + 1e-5)).all()  # the scale itself is rounded to fp32
    assert (np.abs(w8).max(1)[1:] == 127).all() and not w8[0].any()
    np.testing.assert_allclose(ops.dequantize_weight(w8, scales, group), w8 * spread, rtol=1e-6)


def test_the_last_group_may_be_shorter():
    w = np.ones((1, 130), np.float32)
    w[0, 128:] = 3
    _, scales = ops.quantize_weight(w)
    np.testing.assert_allclose(scales, [[1 / 127, 3 / 127]], rtol=1e-6)


def test_clipping_cuts_the_largest_and_rounds_the_rest_finer():
    w = normal(0, 3, 256)
    clip = np.array([[1.0], [0.9], [0.8]], np.float32)
    w8, scales = ops.quantize_weight(w, clip=clip)
    np.testing.assert_allclose(scales, ops.quantize_weight(w)[1] * clip, rtol=1e-6)
    assert np.abs(w8).max() == 127


# --- counts


def test_counts_are_those_of_spiking_where_no_tie_is_near():
    x = heavy(0, 40, 200)
    counts, vth = ops.row_counts(x, 3.0)
    x_hat, vth_spike = spike_forward.reference(Backend(2), x, 3.0)
    np.testing.assert_allclose(vth, vth_spike, rtol=1e-6)
    ratio = x / vth_spike
    clear = np.abs(np.abs(ratio - np.rint(ratio)) - 0.5) > 1e-4 * np.maximum(np.abs(ratio), 1)
    np.testing.assert_array_equal(counts[clear], np.rint(x_hat / vth_spike)[clear])


def test_the_sum_of_magnitudes_is_the_one_written_down():
    x = np.abs(heavy(1, 3, 300))
    for row, vth in zip(x, ops.row_threshold(x, 2.5)[:, 0], strict=True):
        lanes = np.zeros(32, np.float32)
        for c, value in enumerate(row):
            lanes[c % 32] += value
        for half in (16, 8, 4, 2, 1):
            for j in range(half):
                lanes[j] += lanes[j + half]
        assert vth == lanes[0] / np.float32(300) / np.float32(2.5)


def test_what_int8_cannot_hold_is_in_the_rest(be):
    x = heavy(2, 9, 300)
    s, vth, (token, channel, rest) = ops.spike_int8(be, x, 3.0)
    assert s.dtype == np.int8 and s.min() >= -127 and len(rest) >= 9
    whole = s.astype(np.int64)
    whole[token, channel] += rest
    np.testing.assert_array_equal(whole, np.rint(x / vth))
    assert (np.abs(whole[token, channel]) > 127).all() and (np.abs(s[token, channel]) == 127).all()


def test_thresholds_stay_in_their_range(be):
    x = np.array([[0.0, 0, 0], [1e-9, 0, 0], [3e38, 3e38, -3e38], [1e9, 1, 2]], np.float32)
    s, vth, (token, channel, rest) = ops.spike_int8(be, x, 3.0)
    assert vth[:2].tolist() == [[np.float32(1e-5)]] * 2 and vth[3] == 1e4
    assert not s[:2].any()
    assert s[3].tolist() == [127, 0, 0] and rest[token == 3].tolist() == [100_000 - 127]
    assert np.isnan(vth[2]) and not s[2].any()  # the sum is infinite, which no threshold fits


# --- the product


@pytest.mark.parametrize("group", [128, None])
def test_the_product_is_that_of_what_the_integers_stand_for(be, group):
    for seed, (O, I) in enumerate(SIZES):
        w8, scales = ops.quantize_weight(normal(seed, O, I), group)
        x, b = heavy(seed + 50, 4, I).reshape(2, 2, I), normal(seed + 90, O)
        y = ops.w8aspike_linear(be, x, w8, scales, 3.0, b)
        counts, vth = ops.row_counts(x.reshape(4, I), 3.0)
        exact = (counts * vth.astype(np.float64)) @ ops.dequantize_weight(w8, scales, group).astype(np.float64).T + b
        assert y.shape == (2, 2, O) and relative_rms(y.reshape(4, O), exact) < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_equal_bits_on_every_path(path, threads):
    native, numpy = CpuBackend(threads, "w8aspike"), Backend(2)
    for seed, (O, I) in enumerate(SIZES):
        for group in (128, None):
            w8, scales = ops.quantize_weight(normal(seed, O, I), group)
            for N in (1, 7):
                x, b = heavy(seed + 50, N, I), normal(seed, O) if seed % 2 else None
                assert_same_bits(
                    ops.w8aspike_linear(native, x, w8, scales, 3.0, b),
                    ops.w8aspike_linear(numpy, x, w8, scales, 3.0, b),
                )
                one, other = ops.spike_int8(native, x, 3.0), ops.spike_int8(numpy, x, 3.0)
                for a, b in zip((*one[:2], *one[2]), (*other[:2], *other[2]), strict=True):
                    assert_same_bits(a, b)


def test_extreme_integers_do_not_saturate(path):
    """Every product at its largest, with counts at the limits of the fast and the plain blocks."""
    for top in (31, 32, 126):
        w8 = np.full((3, 512), -127, np.int8)
        w8[1] = 127
        x = np.full((1, 512), top, np.float32)
        x[0, ::7] = -top
        k = np.float32(top)  # so that vth is 1
        scales = np.ones((3, 4), np.float32)
        y = ops.w8aspike_linear(CpuBackend(2, "w8aspike"), x, w8, scales, k)
        np.testing.assert_array_equal(y, np.rint(x) @ w8.T.astype(np.float32))


def test_one_token_equals_the_same_token_among_others(be):
    w8, scales = ops.quantize_weight(normal(0, 40, 300))
    x = heavy(3, 6, 300)
    many = ops.w8aspike_linear(be, x, w8, scales, 3.0)
    for t in range(6):
        assert_same_bits(ops.w8aspike_linear(be, x[t : t + 1], w8, scales, 3.0), many[t : t + 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_shows_and_spoils_no_other(be, bad):
    w8, scales = ops.quantize_weight(normal(0, 5, 130))
    x = normal(1, 3, 130)
    clean = ops.w8aspike_linear(be, x, w8, scales, 3.0)
    x[1, 7] = bad
    y = ops.w8aspike_linear(be, x, w8, scales, 3.0)
    assert np.isnan(y[1]).all()
    assert_same_bits(y[[0, 2]], clean[[0, 2]])


def test_no_tokens(be):
    w8, scales = ops.quantize_weight(normal(0, 5, 130))
    assert ops.w8aspike_linear(be, np.empty((2, 0, 130), np.float32), w8, scales, 3.0).shape == (2, 0, 5)


# --- attention


def heads(seed, T=1, H=6, G=2, D=20):
    return normal(seed, 2, T, H, D), normal(seed + 1, 2, T, G, D) * 5, normal(seed + 2, 2, T, G, D)


def test_heads_as_integers(be):
    q, k, v = heads(0, T=3)
    q[0, 0, 0, 0] = 1000  # a count beyond int8
    k[1, 2, 1] = 0
    q16, qv, k8, ku, v8, vu = ops.code_heads(be, q, k, v, 3.0)
    np.testing.assert_allclose(qv, np.abs(q).mean(-1) / 3, rtol=1e-6)
    assert (np.abs(ops.decode_heads(q16, qv) - q) <= qv[..., None] * 0.5001).all() and q16.max() > 50
    for x, x8, unit in ((k, k8, ku), (v, v8, vu)):
        assert x8.dtype == np.int8 and x8.min() >= -127
        largest = np.abs(x).max(-1)
        np.testing.assert_allclose(unit[largest > 0], largest[largest > 0] / 127, rtol=1e-6)
        assert (np.abs(ops.decode_heads(x8, unit) - x) <= unit[..., None] * 0.5001).all()
    assert not k8[1, 2, 1].any()


def test_coded_heads_have_equal_bits(path):
    for D in (2, 20, 64, 96):
        q, k, v = heads(3, T=4, D=D)
        native = ops.code_heads(CpuBackend(2, "w8aspike"), q, k, v, 2.5)
        for a, b in zip(native, ops.code_heads(Backend(2), q, k, v, 2.5), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("count, D", [(1, 20), (7, 64), (30, 6)])
def test_a_step_attends_to_what_the_integers_stand_for(be, count, D):
    _, k, v = heads(0, T=30, D=D)
    q, _, _ = heads(9, D=D)
    q16, qv, k8, ku, v8, vu = ops.code_heads(be, np.repeat(q, 30, 1), k, v, 3.0)
    o = ops.attention_step_int8(be, q16[:, :1], qv[:, :1], k8, ku, v8, vu, count)
    q, k, v = (ops.decode_heads(x, u).astype(np.float64) for x, u in ((q16[:, :1], qv[:, :1]), (k8, ku), (v8, vu)))
    k, v = (np.repeat(x[:, :count], 3, 2) for x in (k, v))
    s = np.einsum("bthd,bshd->bhs", q, k) * D**-0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    expected = np.einsum("bhs,bshd->bhd", p / p.sum(-1, keepdims=True), v)[:, None]
    assert relative_rms(o, expected) < 1e-5


def test_the_native_step_is_the_reference(path):
    q, k, v = heads(4, T=50, D=64)
    coded = ops.code_heads(Backend(2), q, k, v, 3.0)
    arguments = (coded[0][:, :1].copy(), coded[1][:, :1].copy(), *coded[2:], 41)
    native = ops.attention_step_int8(CpuBackend(2, "w8aspike"), *arguments)
    assert relative_rms(native, ops.attention_step_int8(Backend(2), *arguments)) < 1e-5
    for threads in (1, 4):
        assert_same_bits(native, ops.attention_step_int8(CpuBackend(threads, "w8aspike"), *arguments))


def test_an_unknown_path_is_refused():
    if "cpu" not in backends():
        pytest.skip("natives not compiled")
    from minisb.cpu import w8aspike
    from minisb.errors import MinisbError

    with pytest.raises(MinisbError, match="portable"):
        w8aspike.use_path("abacus")
