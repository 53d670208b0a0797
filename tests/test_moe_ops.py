"""Routing, dispatch and the experts' products, the tied gate, and attention sinks, against plain definitions."""

import numpy as np
import pytest
from conftest import backend_of, backends

from minisb.backend import CpuBackend
from minisb.gradcheck import relative_rms
from minisb.ops import moe
from minisb.ops.attention import attention_forward
from minisb.ops.gate import tied_gate_backward, tied_gate_forward
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.sinks import sinks_forward
from minisb.ops.swiglu import swiglu_backward, swiglu_forward

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])


# --- router


@every_name
def test_of_equal_experts_the_first_is_chosen(name):
    be = backend_of(name, "router_forward")
    logits = np.array([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [3, 1, 1, 1, 1]])
    _, experts, *_ = moe.router_forward(be, logits, 3)
    assert experts.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]


@every_name
def test_gates_are_probabilities(name):
    be = backend_of(name, "router_forward")
    logits = 30 * np.random.default_rng(0).standard_normal((40, 6))
    gates, experts, p, lse, _ = moe.router_forward(be, logits, 2)
    want = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(p, want / want.sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(1)), rtol=1e-12)
    assert (gates[:, 0] == p.max(1)).all() and (gates[:, 1] == np.sort(p, axis=1)[:, -2]).all()
    assert (np.take_along_axis(p, experts, 1) == gates).all()


def test_losses_of_the_router_by_differences():
    be, rng = backends()["numpy"], np.random.default_rng(0)
    logits = rng.standard_normal((30, 5))
    counts = np.array([3, 0, 20, 5, 2])

    def losses(logits):
        _, _, p, lse, saved = moe.router_forward(be, logits, 1)
        return moe.balance_loss(be, p, counts), moe.z_loss(be, lse), saved

    (_, dp), (_, dlse), saved = losses(logits)
    dlogits = moe.router_backward(be, np.zeros((30, 1)), 0.7 * dp, 0.2 * dlse, saved)
    direction = rng.standard_normal(logits.shape)

    def total(step):
        (balance, _), (z, _), _ = losses(logits + step * direction)
        return 0.7 * balance + 0.2 * z

    assert abs((total(1e-5) - total(-1e-5)) / 2e-5 / (dlogits * direction).sum() - 1) < 1e-6


def test_the_balance_loss_is_one_when_all_are_equal_and_e_when_one_takes_all():
    be, E = backends()["numpy"], 4
    even = np.full((8, E), 1 / E)
    one = np.tile([1.0, 0, 0, 0], (8, 1))
    assert moe.balance_loss(be, even, np.full(E, 2))[0] == pytest.approx(1)
    assert moe.balance_loss(be, one, np.array([8, 0, 0, 0]))[0] == pytest.approx(E)


# --- dispatch


@every_name
@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("capacity", [None, 3])
def test_plan(name, tile, capacity):
    """Every slot has a row of its own in its expert's piece, in order; past the capacity it has none."""
    be = backend_of(name, "dispatch_plan")
    E = 5
    experts = np.random.default_rng(0).choice([0, 2, 3, 4], (23, 2))  # nobody chooses 1
    experts[:, 1] = (experts[:, 0] + 1 + experts[:, 1] % 2) % E
    experts[experts == 1] = 0
    plan = moe.dispatch_plan(be, experts, E, tile, capacity)
    assert len(plan.token) == 46 + E * (tile - 1) and (plan.offsets % tile == 0).all()
    seen = []
    for e in range(E):
        slots = np.argwhere(experts == e)[:capacity]
        rows = plan.row[tuple(slots.T)]
        assert rows.tolist() == list(range(plan.offsets[e], plan.offsets[e] + len(slots)))
        assert plan.token[rows].tolist() == slots[:, 0].tolist()
        assert plan.offsets[e + 1] - plan.offsets[e] == -(-len(slots) // tile) * tile
        seen += rows.tolist()
    assert len(set(seen)) == len(seen) == (plan.row >= 0).sum() == (plan.token >= 0).sum()
    assert moe.load(be, experts, E).tolist() == [(experts == e).sum() for e in range(E)]
    if capacity:
        assert (plan.row < 0).sum() == sum(max(0, (experts == e).sum() - capacity) for e in range(E)) > 0
    else:
        assert (plan.row >= 0).all()


def experts_of(be, x, dy, experts, gates, w, E, capacity=None, tile=1):
    """The routed experts forward and backward: w = gate, up (E,F,C), down (E,C,F) -> y, dx, dgates, dw."""
    gate, up, down = w
    F = gate.shape[1]
    dw = [np.zeros_like(a) for a in w]
    plan = moe.dispatch_plan(be, experts, E, tile, capacity)
    rows = moe.dispatch_forward(be, x, plan)
    gate_up = np.full((len(rows), 2 * F), np.nan, x.dtype)
    moe.grouped_forward(be, rows, gate, plan.offsets, gate_up[:, :F])
    moe.grouped_forward(be, rows, up, plan.offsets, gate_up[:, F:])
    h, s_swiglu = swiglu_forward(be, gate_up)
    y, s_combine = moe.combine_forward(be, moe.grouped_forward(be, h, down, plan.offsets), gates, plan)
    drows, dgates = moe.combine_backward(be, dy, s_combine)
    dgate_up = swiglu_backward(be, moe.grouped_backward(be, drows, h, down, plan.offsets, dw[2]), s_swiglu)
    drows = moe.grouped_backward(be, dgate_up[:, :F], rows, gate, plan.offsets, dw[0])
    moe.grouped_backward(be, dgate_up[:, F:], rows, up, plan.offsets, dw[1], drows)
    return y, moe.dispatch_backward(be, drows, plan), dgates, dw


def expert_inputs(N, C, F, E, K, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((N, C)).astype(dtype) for _ in range(2))
    w = [rng.standard_normal(shape).astype(dtype) for shape in ((E, F, C), (E, F, C), (E, C, F))]
    experts = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    return x, dy, experts, rng.random((N, K)).astype(dtype), w, E


@every_name
@pytest.mark.parametrize("tile", [1, 5])
@pytest.mark.parametrize("N, E, K", [(1, 3, 1), (63, 16, 1), (130, 4, 3)])
def test_experts_equal_a_loop_over_tokens(name, N, E, K, tile):
    be = backend_of(name, "grouped_forward")
    x, dy, experts, gates, w, E = inputs = expert_inputs(N, 6, 9, E, K)
    y, dx, dgates, dw = experts_of(be, *inputs, tile=tile)
    plain = backends()["numpy"]
    want = [np.zeros_like(a) for a in (y, dx, dgates, *w)]
    for n in range(N):
        for k, e in enumerate(experts[n]):
            w_in = np.concatenate([w[0][e], w[1][e]])
            dw_in = np.zeros_like(w_in)
            h, saved = swiglu_forward(plain, linear_forward(plain, x[n : n + 1], w_in))
            out = linear_forward(plain, h, w[2][e])
            want[0][n] += gates[n, k] * out[0]
            want[2][n, k] = dy[n] @ out[0]
            dh = linear_backward(plain, gates[n, k] * dy[n : n + 1], h, w[2][e], want[5][e])
            want[1][n] += linear_backward(plain, swiglu_backward(plain, dh, saved), x[n : n + 1], w_in, dw_in)[0]
            want[3][e] += dw_in[:9]
            want[4][e] += dw_in[9:]
    for got, expected in zip((y, dx, dgates, *dw), want, strict=True):
        assert relative_rms(got, expected) < 1e-12


@every_name
def test_one_expert_is_the_dense_network(name):
    """Softmax over one logit is 1, so nothing but the order of rows could differ."""
    be = backend_of(name, "grouped_forward")
    x, dy, _, _, w, _ = expert_inputs(70, 6, 9, 1, 1)
    gates, experts, *_ = moe.router_forward(be, np.random.default_rng(1).standard_normal((70, 1)), 1)
    assert (gates == 1).all() and (experts == 0).all()
    y, dx, _, dw = experts_of(be, x, dy, experts, gates, w, 1)
    w_in = np.concatenate([w[0][0], w[1][0]])
    dw_in, dw_out = np.zeros_like(w_in), np.zeros_like(w[2][0])
    h, saved = swiglu_forward(be, linear_forward(be, x, w_in))
    assert relative_rms(y, linear_forward(be, h, w[2][0])) < 1e-14
    dh = linear_backward(be, dy, h, w[2][0], dw_out)
    assert relative_rms(dx, linear_backward(be, swiglu_backward(be, dh, saved), x, w_in, dw_in)) < 1e-14
    assert relative_rms(np.concatenate([dw[0][0], dw[1][0]]), dw_in) < 1e-14
    assert relative_rms(dw[2][0], dw_out) < 1e-14


@every_name
def test_what_is_dropped_adds_nothing_and_gets_no_gradient(name):
    be = backend_of(name, "grouped_forward")
    x, dy, _, gates, w, E = expert_inputs(20, 6, 9, 4, 1)
    experts = np.zeros((20, 1), int)
    y, dx, dgates, dw = experts_of(be, x, dy, experts, gates, w, E, capacity=7)
    assert not y[7:].any() and not dx[7:].any() and not dgates[7:].any()
    few = experts_of(be, x[:7], dy[:7], experts[:7], gates[:7], w, E)
    for got, want in zip((y[:7], dx[:7], dgates[:7], *dw), (*few[:3], *few[3]), strict=True):
        assert relative_rms(got, want) < 1e-14


def test_bits_of_a_large_mixture_do_not_depend_on_threads():
    backend_of("cpu", "grouped_forward")
    inputs = expert_inputs(700, 70, 130, 5, 2, np.float32)
    first, *others = (experts_of(CpuBackend(threads), *inputs) for threads in (1, 2, 4))
    for other in others:
        for a, b in zip((*first[:3], *first[3]), (*other[:3], *other[3]), strict=True):
            assert a.tobytes() == b.tobytes()


# --- the tied gate


@every_name
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-6), (np.float64, 1e-14)], ids=["32", "64"])
def test_tied_gate_at_the_ends(name, dtype, limit):
    be = backend_of(name, "tied_gate_forward")
    z = np.array([-50, -17, -1, 0, 1, 17, 50], dtype)
    k, log_g, saved = tied_gate_forward(be, z)
    exact = z.astype(np.longdouble)
    np.testing.assert_allclose(k, (1 / (1 + np.exp(-exact))).astype(float), rtol=limit)
    np.testing.assert_allclose(log_g, -np.logaddexp(0, exact).astype(float), rtol=limit)
    assert (log_g <= 0).all() and log_g[-1] == -50
    dz = tied_gate_backward(be, np.ones_like(z), np.ones_like(z), saved)
    assert np.isfinite(dz).all() and dz.dtype == dtype
    assert dz[-1] == -1  # at z = 50 the logarithm falls in a line


# --- sinks


def naive(q, k, v, sink_k, sink_v, window):
    """Every score of every head at once: S sinks that all see, then the window."""
    T, R, S = q.shape[1], q.shape[2] // k.shape[2], len(sink_k)
    k, v = (np.concatenate([np.broadcast_to(s, (len(q), *s.shape)), x], 1) for s, x in ((sink_k, k), (sink_v, v)))
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, R, axis=2)) * q.shape[-1] ** -0.5
    at, key = np.arange(T)[:, None], np.arange(-S, T)
    visible = (key < 0) | ((key <= at) & (at - key < window))
    p = np.exp(np.where(visible, scores, -np.inf))
    return np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), np.repeat(v, R, axis=2)), np.log(p.sum(-1))


@every_name
@pytest.mark.parametrize("T, S, window", [(1, 1, 4), (70, 7, 5), (65, 20, 65)])
def test_a_token_sees_all_sinks_and_its_window(name, T, S, window):
    be = backend_of(name, "sinks_forward")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, T, heads, 6)) for heads in (6, 2, 2))
    sink_k, sink_v = (3 * rng.standard_normal((S, 2, 6)) for _ in range(2))
    o, (*_, lse, _, _) = attention_forward(be, q, k, v, window)
    kept = o.copy(), lse.copy()
    got, got_lse = sinks_forward(be, q, sink_k, sink_v, o, lse)
    want, want_lse = naive(q, k, v, sink_k, sink_v, window)
    assert relative_rms(got, want) < 1e-13 and relative_rms(got_lse, want_lse.swapaxes(1, 2)) < 1e-13
    assert (o == kept[0]).all() and (lse == kept[1]).all()


@every_name
def test_sinks_alone_are_plain_attention_without_a_mask(name):
    be = backend_of(name, "sinks_forward")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, heads, 6)) for heads in (4, 1, 1))
    got, _ = sinks_forward(be, q, k[0], v[0])
    scores = np.einsum("bthd,bsd->bhts", q, k[:, :, 0]) * 6**-0.5
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert relative_rms(got, np.einsum("bhts,bsd->bthd", p, v[:, :, 0])) < 1e-13


@every_name
def test_scores_far_apart_do_not_overflow(name):
    be = backend_of(name, "sinks_forward")
    q, k = np.full((1, 1, 1, 2), 40, np.float32), np.full((1, 1, 2), 40, np.float32)
    before, lse = np.ones((1, 1, 1, 2), np.float32), np.full((1, 1, 1), -3000, np.float32)
    o, total = sinks_forward(be, q, k, 0 * k + 5, before, lse)
    assert (o == 5).all() and np.isfinite(total).all()
    o, total = sinks_forward(be, -q, k, 0 * k + 5, before, -lse)
    assert (o == 1).all() and total == 3000
