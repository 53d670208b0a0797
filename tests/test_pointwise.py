"""Spikes, the loss, AdamW, the embedding, norms and the polynomials: what is particular to each."""

import numpy as np
import pytest
from conftest import NO_NATIVES, backend_of

from minisb import gradcheck, native
from minisb.backend import CpuBackend
from minisb.gradcheck import relative_rms
from minisb.ops.adamw import adamw, grad_norm
from minisb.ops.cross_entropy import IGNORE, cross_entropy
from minisb.ops.embedding import embedding_backward, embedding_forward
from minisb.ops.gate import log_gate_backward, log_gate_forward
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.norm import rmsnorm_backward, rmsnorm_forward
from minisb.ops.rope import rope_forward, rope_table
from minisb.ops.spike import VTH_MAX, VTH_MIN, spike_count, spike_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["32", "64"])


# --- spikes -------------------------------------------------------------------------------------


def rows(T=65, C=33, seed=0, dtype=np.float64):
    """Tokens of very different sizes: a threshold taken over more than one of them would show."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, T, C)) * 10 ** rng.uniform(-1, 1, (2, T, 1))).astype(dtype)


@every_name
@every_dtype
@pytest.mark.parametrize("T, C", [(1, 7), (63, 33), (65, 128)])
@pytest.mark.parametrize("k", [0.5, 3, 4.0])
def test_each_token_has_its_threshold(name, dtype, T, C, k):
    be = backend_of(name, "spike_forward")
    x = rows(T, C, dtype=dtype)
    x_hat, vth = spike_forward(be, x, k)
    assert x_hat.dtype == vth.dtype == dtype and vth.shape == (2, T, 1)
    exact = np.abs(x.astype(np.float64)).mean(-1, keepdims=True) / k
    np.testing.assert_allclose(vth, exact, rtol=1e-6 if dtype == np.float32 else 1e-13)
    ratio = x.astype(np.float64) / exact
    tie = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-4
    assert np.array_equal(spike_count(be, x_hat, vth)[~tie], np.rint(ratio)[~tie])
    assert tie.mean() < 0.01
    np.testing.assert_allclose(x_hat, spike_count(be, x_hat, vth) * vth, rtol=1e-6)


@every_name
@every_dtype
def test_thresholds_are_clamped(name, dtype):
    be = backend_of(name, "spike_forward")
    x = np.ones((3, 8), dtype) * np.array([[1e-9], [1.0], [1e9]], dtype)
    x_hat, vth = spike_forward(be, x, 2)
    np.testing.assert_array_equal(vth[:, 0], np.array([VTH_MIN, 0.5, VTH_MAX], dtype))
    np.testing.assert_allclose(x_hat[:, 0], [0, 1, 1e9], rtol=1e-6)
    zeros, vth = spike_forward(be, np.zeros((2, 5), dtype), 3)
    assert (zeros == 0).all() and (vth == dtype(VTH_MIN)).all()


@every_name
@every_dtype
def test_ties_go_to_the_even_count(name, dtype):
    be = backend_of(name, "spike_forward")
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 3.5]], dtype)  # mean |x| is 2
    x_hat, vth = spike_forward(be, x, 2)
    assert vth[0, 0] == 1
    np.testing.assert_array_equal(x_hat[0], [0, 2, 2, 0, -2, -2, 4, 4])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_spikes_of_both_backends_agree():
    ref, cpu = backend_of("numpy"), backend_of("cpu", "spike_forward")
    x = rows(300, 128, dtype=np.float32)
    (want, vth), (got, got_vth) = spike_forward(ref, x, 3), spike_forward(cpu, x, 3)
    near_tie = np.abs(np.abs(x / vth) % 1 - 0.5) < 1e-4
    assert np.array_equal(np.rint(got / got_vth)[~near_tie], np.rint(want / vth)[~near_tie])
    many = [spike_forward(CpuBackend(threads), x, 3)[0].tobytes() for threads in (1, 2, 4)]
    assert many[0] == many[1] == many[2]
    for bad in (np.nan, np.inf):
        x[1, 7, 5] = bad
        for a, b in zip(spike_forward(cpu, x, 3), spike_forward(ref, x, 3), strict=True):
            assert np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(np.isinf(a), np.isinf(b))


@every_name
@pytest.mark.parametrize("T", [1, 63, 65])
def test_gradient_through_spikes(name, T):
    """Straight-through: with the remainder r = x_hat - x frozen, x + r is a smooth function of x."""
    be = backend_of(name, "spike_forward")
    rng = np.random.default_rng(1)
    x, w, b = rows(T, 7), rng.standard_normal((11, 7)), rng.standard_normal(5)
    x_hat, _ = spike_forward(be, x, 1.5)
    r, u = x_hat - x, rng.standard_normal((2, T, 11))
    assert np.abs(r).max() > 0.01
    dw, db = np.zeros_like(w), np.zeros_like(b)
    dx = linear_backward(be, u, x_hat, w, dw, db)

    def loss():
        return float((u * linear_forward(be, x + r, w, b)).sum())

    assert gradcheck.directional(loss, {"x": x, "w": w, "b": b}, {"x": dx, "w": dw, "b": db}) < gradcheck.LIMIT


# --- the loss -----------------------------------------------------------------------------------


def naive_loss(logits, targets):
    logits = logits.astype(np.float64)
    return np.array(
        [
            0 if t == IGNORE else np.log(np.exp(z - z.max()).sum()) + z.max() - z[t]
            for z, t in zip(logits, targets, strict=True)
        ]
    )


@every_name
@every_dtype
@pytest.mark.parametrize("N, V", [(1, 11), (65, 33), (20, 4096), (3, 1)])
def test_loss_and_its_gradient(name, dtype, N, V):
    be = backend_of(name, "cross_entropy")
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((N, V)) + 300).astype(dtype)
    targets = rng.integers(0, V, N)
    targets[2::3] = IGNORE
    kept, dloss = logits.copy(), rng.standard_normal(N).astype(dtype)
    limit = 1e-6 if dtype == np.float32 else 1e-12
    logits.flags.writeable = False
    losses = cross_entropy(be, logits, targets)
    np.testing.assert_allclose(losses, naive_loss(logits, targets), rtol=limit, atol=10 * limit)
    assert np.array_equal(logits, kept) and (losses[targets == IGNORE] == 0).all()

    logits.flags.writeable = True
    assert np.array_equal(cross_entropy(be, logits, targets, dloss), losses)
    z = kept.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(N), targets] -= 1
    np.testing.assert_allclose(logits, p * (dloss * (targets != IGNORE))[:, None], rtol=10 * limit, atol=limit)
    assert (logits[targets == IGNORE] == 0).all()


@every_name
def test_loss_of_masked_logits_and_strided_rows(name):
    be = backend_of(name, "cross_entropy")
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((6, 40))
    before = wide.copy()
    logits, targets = wide[:, 5:27], rng.integers(0, 20, 6)
    logits[:, 20:] = -np.inf
    want = naive_loss(logits, targets)
    np.testing.assert_allclose(cross_entropy(be, logits, targets, np.ones(6)), want, rtol=1e-12)
    assert (logits[:, 20:] == 0).all() and np.isfinite(logits).all()
    np.testing.assert_allclose(logits.sum(-1), 0, atol=1e-12)  # a softmax less a one-hot
    assert np.array_equal(wide[:, :5], before[:, :5]) and np.array_equal(wide[:, 27:], before[:, 27:])
    by_columns = np.asfortranarray(before[:, :22])
    cross_entropy(be, by_columns, targets, np.ones(6))
    np.testing.assert_allclose(by_columns.sum(-1), 0, atol=1e-12)


@every_name
def test_targets_outside_the_vocabulary(name):
    be = backend_of(name, "cross_entropy", "embedding_forward")
    with pytest.raises(IndexError):
        cross_entropy(be, np.zeros((2, 5)), np.array([0, 5]))
    with pytest.raises(IndexError):
        embedding_forward(be, np.array([[0, 5]]), np.zeros((5, 3)))


# --- embedding ----------------------------------------------------------------------------------


@every_name
@every_dtype
@pytest.mark.parametrize("C", [7, 40, 112])
def test_a_token_seen_often_gets_every_contribution(name, dtype, C):
    be = backend_of(name, "embedding_backward")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (3, 65)).astype(np.int32)
    tokens[0] = 2
    dx, dtable = rng.standard_normal((3, 65, C)).astype(dtype), rng.standard_normal((6, C)).astype(dtype)
    want = dtable.copy()
    for token, row in zip(tokens.ravel(), dx.reshape(-1, C), strict=True):
        want[token] += row
    embedding_backward(be, dx, tokens, dtable)
    assert np.array_equal(dtable, want)
    assert np.array_equal(embedding_forward(be, tokens, dtable), dtable[tokens])


# --- AdamW --------------------------------------------------------------------------------------


@every_name
@every_dtype
@pytest.mark.parametrize("size, decayed", [(1, 0), (7, 7), (33, 20), (20_000, 9_001)])
def test_adamw_is_the_formula(name, dtype, size, decayed):
    be = backend_of(name, "adamw")
    rng = np.random.default_rng(0)
    p, m, g = (rng.standard_normal(size).astype(dtype) for _ in range(3))
    v = rng.random(size).astype(dtype)
    lr, beta1, beta2, eps, decay, step, scale = 0.01, 0.9, 0.95, 1e-8, 0.1, 3, 0.5
    P, M, V, g_kept = p.copy(), m.copy(), v.copy(), g.copy()
    assert adamw(be, p, g, m, v, decayed, lr, beta1, beta2, eps, decay, step, scale) is None
    G = g.astype(np.float64) * scale
    M = beta1 * M + (1 - beta1) * G
    V = beta2 * V + (1 - beta2) * G**2
    want = P * np.where(np.arange(size) < decayed, 1 - lr * decay, 1.0)
    want -= lr * (M / (1 - beta1**step)) / (np.sqrt(V / (1 - beta2**step)) + eps)
    limit = 1e-6 if dtype == np.float32 else 1e-13
    for got, exact in ((p, want), (m, M), (v, V)):
        assert relative_rms(got, exact) < limit
    assert np.array_equal(g, g_kept)


@every_name
@every_dtype
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_norm_is_summed_in_float64(name, dtype):
    be = backend_of(name, "grad_norm")
    g = np.random.default_rng(0).standard_normal(100_003).astype(dtype)
    norm = grad_norm(be, g)
    assert isinstance(norm, float)
    np.testing.assert_allclose(norm, np.linalg.norm(g.astype(np.float64)), rtol=1e-12)
    assert grad_norm(be, g[:0]) == 0
    assert grad_norm(be, np.full(3, 1e30, dtype)) == pytest.approx(3**0.5 * 1e30)  # its square is no float32
    for bad in (np.inf, np.nan):
        g[70_000] = bad
        assert not np.isfinite(grad_norm(be, g))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_adamw_bits_and_nan():
    backend_of("cpu", "adamw")
    results = []
    for threads in (1, 2, 4):
        be, rng = CpuBackend(threads), np.random.default_rng(0)
        p, g, m, v = (np.abs(rng.standard_normal(100_003)).astype(np.float32) for _ in range(4))
        norm = grad_norm(be, g)
        g[50_000] = np.nan
        adamw(be, p, g, m, v, 5001, 0.01, 0.9, 0.95, 1e-8, 0.1, 2, 1.0)
        results.append((norm, p.tobytes(), m.tobytes(), v.tobytes()))
        assert all(np.flatnonzero(np.isnan(x)).tolist() == [50_000] for x in (p, m, v))
    assert results[0] == results[1] == results[2]


# --- the rest -----------------------------------------------------------------------------------


@every_name
@every_dtype
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_gates_and_swiglu_far_out(name, dtype):
    """No overflow on either side, and no digits lost near zero."""
    be = backend_of(name, "log_gate_forward", "swiglu_forward")
    z = np.array([-500, -100, -30, -1e-3, 0, 1e-3, 15, 30, 80, 200], dtype)
    limit = 1e-6 if dtype == np.float32 else 1e-13
    log_g, saved = log_gate_forward(be, z, 2)
    wide = z.astype(np.float64)
    np.testing.assert_allclose(log_g[:9], (-np.logaddexp(0, -wide) / 2)[:9], rtol=limit)
    assert (log_g <= 0).all()
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    dz = log_gate_backward(be, np.ones_like(z), saved)
    np.testing.assert_allclose(dz, np.exp(-np.logaddexp(0, wide)) / 2, rtol=limit, atol=1e-30)
    gate_up = np.concatenate([z, np.full_like(z, 3)])[None]
    h, saved = swiglu_forward(be, gate_up)
    np.testing.assert_allclose(h[0], 3 * wide * sigmoid, rtol=limit, atol=1e-30)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    dgate_up = swiglu_backward(be, np.ones_like(h), saved)[0]
    np.testing.assert_allclose(
        dgate_up[: z.size], 3 * slope, rtol=4 * limit, atol=1e-6 if dtype == np.float32 else 1e-14
    )
    np.testing.assert_allclose(dgate_up[z.size :], wide * sigmoid, rtol=limit, atol=1e-30)


@every_name
def test_rope_turns_pairs_and_keeps_lengths(name):
    be = backend_of(name, "rope_forward")
    qkv = np.random.default_rng(0).standard_normal((2, 9, 5 * 6))
    cos, sin = rope_table(100, 9, 6, 50.0)
    q, k, v = rope_forward(be, qkv, cos, sin, 3, 1, 6)
    raw = qkv[..., :18].reshape(2, 9, 3, 6)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(raw, axis=-1), rtol=1e-12)
    pair = raw[..., 1] + 1j * raw[..., 4]  # channel 1 is paired with channel 1 + D/2
    turned = pair * np.exp(1j * np.arange(100, 109) * 50.0 ** (-2 / 6))[:, None]
    np.testing.assert_allclose(q[..., 1] + 1j * q[..., 4], turned, rtol=1e-11)
    np.testing.assert_array_equal(v, qkv[..., 24:].reshape(2, 9, 1, 6))
    shifted = rope_forward(be, qkv, *rope_table(3, 9, 6, 50.0), 3, 1, 6)  # only distances matter
    for t, s in ((8, 2), (5, 5)):
        np.testing.assert_allclose(
            (q[:, t] * k[:, s]).sum(-1), (shifted[0][:, t] * shifted[1][:, s]).sum(-1), rtol=1e-9
        )


@every_name
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7)])
def test_norm_of_any_number_of_axes(name, shape):
    be = backend_of(name, "rmsnorm_forward")
    x, w, dw = np.random.default_rng(0).standard_normal(shape), np.arange(1.0, 8.0), np.zeros(7)
    x.flags.writeable = False
    y, saved = rmsnorm_forward(be, x, w, 0.0)
    np.testing.assert_allclose(((y / w) ** 2).mean(-1), 1, rtol=1e-12)
    assert saved[2].shape == (*shape[:-1], 1)
    dx = rmsnorm_backward(be, np.ones_like(x), saved, dw)
    assert dx.shape == shape
    np.testing.assert_allclose((dx * x).sum(-1), 0, atol=1e-12)  # a longer x changes nothing


def compiled_elementary():
    module = native.load("gate").get("gate")
    if module is None:
        pytest.skip(NO_NATIVES)
    return module.elementary


def test_exp_in_float32_over_its_whole_range():
    elementary = compiled_elementary()
    bits = np.arange(0, 0x42B1721A, 977, dtype=np.uint32)  # 0 .. 88.723, every size of number
    x = np.concatenate([bits, bits + np.uint32(1 << 31)]).view(np.float32)
    x = np.concatenate([x, np.linspace(-87, 88.72, 300_001, dtype=np.float32)])
    exact = np.exp(x.astype(np.float64))
    got, normal = elementary(x)[0], x > -86.97
    assert (np.abs(got - exact)[normal] / exact[normal]).max() < 1.3e-7
    assert np.abs(got - exact)[~normal].max() < 1.9e-38
    special = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 88.7, 88.73, 1e30, -87.5, -95, -104, -1e30, 0, -0.0], np.float32
    )
    want = [np.nan, np.nan, np.inf, 0, np.exp(float(special[4])), np.inf, np.inf, 0, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(elementary(special)[0], want, rtol=1.3e-7)
    for length in (1, 3, 8, 9, 31):  # full vectors and what is left over take the same path
        np.testing.assert_array_equal(elementary(x[-length:].copy())[0], got[-length:])


def test_log1p_in_float32_from_0_to_1():
    elementary = compiled_elementary()
    x = np.concatenate([np.linspace(0, 1, 300_001), 10.0 ** -np.arange(1, 38)]).astype(np.float32)
    exact = np.log1p(x.astype(np.float64))
    np.testing.assert_allclose(elementary(x)[1], exact, rtol=2.5e-7)
    assert np.isnan(elementary(np.array([np.nan], np.float32))[1])


def test_float64_keeps_its_digits():
    elementary = compiled_elementary()
    x = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(elementary(x), [np.exp(x), np.log1p(x)], rtol=1e-15)
