"""The tensor-core kernels against float64, from inputs rounded as they are: on a GPU, and in emulation."""

import contextlib

import emulator
import numpy as np
import pytest
from emulator import here, there

from minisb.backend import Backend
from minisb.launchers import linear_attention
from minisb.ops.gla import gla_backward, gla_forward, gla_recurrent_backward, gla_recurrent_forward


def half(element: str):
    if element == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(element)


def relative(x, exact) -> float:
    return float(np.linalg.norm(here(x).astype(np.float64) - exact) / np.linalg.norm(exact))


SMALL = {"float16": 40_000, "bfloat16": 9_000}  # numbers of q that emulation does in seconds; one type for most

CASES = [  # B, T, H, G, D, strongest gate
    (2, 1, 2, 1, 64, 1.0), (2, 63, 3, 3, 64, 0.1), (2, 65, 6, 2, 64, 0.1), (1, 1000, 6, 2, 64, 0.5),
    (1, 520, 1, 1, 64, 0.5), (2, 129, 4, 2, 128, 1.2), (2, 200, 6, 2, 64, 5.0),
    (1, 300, 7, 1, 128, 20.0), (1, 1000, 7, 1, 128, 3.0), (1, 70, 3, 1, 128, 1.2), (1, 70, 2, 1, 64, 5.0),
]  # fmt: skip


@pytest.mark.parametrize("by_chunks", [False, True])
@pytest.mark.parametrize("B, T, H, G, D, strongest", CASES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_linear_attention_on_tensor_cores(cuda, element, B, T, H, G, D, strongest, by_chunks, monkeypatch):
    """With a first state, walked and by chunks, with gates weak and too strong for products."""
    monkeypatch.setattr(linear_attention, "MANY", 1000 if by_chunks else 1)
    if cuda.xp is np and SMALL[element] < B * T * H * D:
        pytest.skip("takes too long in emulation")
    dtype = half(element)
    rng = np.random.default_rng(T)
    q, k = (np.maximum(rng.standard_normal((B, T, n, D)), 0).astype(dtype) for n in (H, G))
    v = rng.standard_normal((B, T, G, D)).astype(dtype)
    log_g = (-strongest * rng.random((B, T, G, D))).astype(np.float32)
    first = rng.standard_normal((B, G, D, D)).astype(np.float32)
    exact, last, every = gla_recurrent_forward(Backend(), *(x.astype(np.float64) for x in (q, k, v, log_g, first)))

    inputs = there(cuda, [q, k, v, log_g, first])
    o, final, saved = gla_forward(cuda, *inputs)
    again = gla_forward(cuda, *inputs)[0]
    assert saved[5] == 64, "this is not the fast kernel"
    assert relative(o, exact) < 6e-3
    assert relative(final, last) < 4e-3
    assert relative(saved[-1], every[:-1:64].swapaxes(0, 1)) < 4e-3
    assert (here(o).view("uint16") == here(again).view("uint16")).all()


def draw(element, B, T, H, G, D, strongest):
    """q, k, v, log_g, first, do, dstate, as the kernels get them."""
    dtype, rng = half(element), np.random.default_rng(T)
    q, k = (np.maximum(rng.standard_normal((B, T, n, D)), 0).astype(dtype) for n in (H, G))
    v, do = (rng.standard_normal((B, T, n, D)).astype(dtype) for n in (G, H))
    log_g = (-strongest * rng.random((B, T, G, D))).astype(np.float32)
    first, dstate = (rng.standard_normal((B, G, D, D)).astype(np.float32) for _ in range(2))
    return q, k, v, log_g, first, do, dstate


def exact_backward(q, k, v, log_g, first, do, dstate):
    be = Backend()
    _, _, every = gla_recurrent_forward(be, q, k, v, log_g, first)
    return gla_recurrent_backward(be, do, dstate, q, k, v, log_g, every)


def rounded_backward(element, q, k, v, log_g, first, do, dstate):
    """The chunked backward in float64, rounded to `element` where the kernel rounds, from exact states (B,N,G,D,D).

    One key head and moderate gates: decays through the middle of each chunk, as in cuda/gla_backward_fast.cu.
    """
    T, H, scale = q.shape[1], q.shape[2], q.shape[3] ** -0.5
    states = gla_recurrent_forward(Backend(), q, k, v, log_g, first)[2]

    def rounded(x):
        return x.astype(half(element)).astype(np.float64)

    dq, dk, dv, dlog_g, dS = np.empty_like(q), np.empty_like(k), np.empty_like(v), np.empty_like(k), dstate
    for start in reversed(range(0, T, 64)):
        at = slice(start, min(start + 64, T))
        b = log_g[:, at, 0].cumsum(1)
        middle, end = b[:, :32][:, -1:], b[:, -1:]
        reader, writer = np.exp(b - middle), np.exp(middle - b)
        S = states[start][:, 0]
        S_in = rounded(np.exp(middle).swapaxes(1, 2) * S)
        dS_in = rounded(np.exp(end - middle).swapaxes(1, 2) * dS[:, 0])
        key, value = rounded(k[:, at, 0] * writer), v[:, at, 0]
        d_key, d_value = value @ dS_in.swapaxes(1, 2), key @ dS_in
        gate = np.exp(end) * (S * dS[:, 0]).sum(2)[:, None] + np.cumsum(key * d_key, 1) - key * d_key
        net = 0
        dS = np.exp(end).swapaxes(1, 2)[:, None] * dS
        for h in range(H):
            query, d_o = rounded(q[:, at, h] * reader), do[:, at, h]
            P = rounded(scale * np.tril(query @ key.swapaxes(1, 2)))
            dP = scale * np.tril(d_o @ value.swapaxes(1, 2))
            own = np.diagonal(dP, axis1=1, axis2=2)[..., None]
            dP = rounded(np.tril(dP, -1))
            d_query, pairs = scale * d_o @ S_in.swapaxes(1, 2) + dP @ key, dP.swapaxes(1, 2) @ query
            dq[:, at, h] = rounded(reader * (d_query + own * key))
            d_key, d_value = d_key + pairs + own * query, d_value + P.swapaxes(1, 2) @ d_o
            net = net + query * d_query - key * pairs
            from_start = rounded(q[:, at, h] * np.exp(b - b[:, :1]))
            dS = dS + (scale * np.exp(b[:, :1]).swapaxes(1, 2) * (from_start.swapaxes(1, 2) @ d_o))[:, None]
        dk[:, at, 0], dv[:, at, 0] = rounded(writer * d_key), rounded(d_value)
        dlog_g[:, at, 0] = gate + net[:, ::-1].cumsum(1)[:, ::-1]
    return dq, dk, dv, dlog_g, dS


NAMES = ("dq", "dk", "dv", "dlog_g", "dfirst")
BACKWARD_CASES = [  # B, T, H, G, D, strongest gate
    (2, 1, 1, 1, 64, 0.1), (1, 1, 3, 1, 64, 20.0), (1, 63, 3, 1, 64, 0.1), (1, 63, 2, 2, 64, 20.0),
    (1, 65, 3, 1, 64, 1.0), (1, 65, 1, 1, 64, 5.0), (2, 129, 1, 1, 64, 1.0), (1, 129, 3, 1, 64, 20.0),
    (1, 200, 3, 1, 64, 0.1), (1, 200, 6, 2, 64, 5.0),
    (1, 65, 1, 1, 128, 1.0), (1, 65, 3, 1, 128, 5.0), (1, 130, 2, 1, 128, 0.1), (2, 1000, 12, 4, 64, 1.0),
    (1, 1000, 7, 1, 128, 1.0), (1, 1000, 7, 1, 128, 20.0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, H, G, D, strongest", BACKWARD_CASES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_linear_attention_backward_on_tensor_cores(cuda, element, B, T, H, G, D, strongest):
    """With a first state and a gradient of the final one: every gradient, from outputs full of NaN, twice."""
    if cuda.xp is np and SMALL[element] < B * T * H * D:
        pytest.skip("takes too long in emulation")
    given = draw(element, B, T, H, G, D, strongest)
    wide = [x.astype(np.float64) for x in given]
    exact = exact_backward(*wide)
    q, k, v, log_g, first, do, dstate = there(cuda, list(given))
    saved = gla_forward(cuda, q, k, v, log_g, first)[2]
    with poisoned(cuda):
        found = gla_backward(cuda, do, dstate, saved)
        again = gla_backward(cuda, do, dstate, saved)
    moderate = G == 1 and strongest * min(T, 32) / 2 < (6 if element == "float16" else 30)
    rounded = rounded_backward(element, *wide) if moderate else [None] * 5
    for name, got, twin, want, model in zip(NAMES, found, again, exact, rounded, strict=True):
        error = relative(got, want)
        assert error < 1e-2, name
        assert model is None or error < 2 * relative(model, want) + 1e-5, name
        assert (here(got).view("uint8") == here(twin).view("uint8")).all(), name


def test_gates_that_leave_nothing_give_finite_gradients(cuda):
    given = draw("bfloat16", 1, 70, 1, 1, 64, 1.0)
    for log_g in (-20, -1000, -np.inf):
        q, k, v, gates, first, do, dstate = there(cuda, list(given))
        gates[:] = log_g
        found = gla_backward(cuda, do, dstate, gla_forward(cuda, q, k, v, gates, first)[2])
        for name, x in zip(NAMES, found, strict=True):
            assert np.isfinite(here(x).astype(np.float64)).all(), name


@contextlib.contextmanager
def poisoned(be):
    """Every array that a launcher asks for is full of NaN."""
    xp = be.xp

    class Poisoned:
        def __getattr__(self, name):
            return getattr(xp, name)

        def empty(self, *args, **kwargs):
            return fill(xp.empty(*args, **kwargs))

        def empty_like(self, *args, **kwargs):
            return fill(xp.empty_like(*args, **kwargs))

    def fill(x):
        x.view("uint8")[...] = 255
        return x

    be.xp = Poisoned()
    try:
        yield
    finally:
        be.xp = xp


def test_backward_takes_what_the_fast_forward_saved(cuda):
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal((1, 130, n, 64)).astype(np.float16) for n in (2, 1, 1)]
    log_g = -rng.random((1, 130, 1, 64)).astype(np.float32)
    do = rng.standard_normal(draw[0].shape).astype(np.float16)
    found = gla_backward(cuda, there(cuda, do), None, gla_forward(cuda, *there(cuda, [*draw, log_g]))[2])
    be, wide = Backend(), [x.astype(np.float64) for x in (*draw, log_g)]
    exact = gla_backward(be, do.astype(np.float64), None, gla_forward(be, *wide)[2])
    for got, want in zip(found, exact, strict=True):
        assert relative(got, want) < 1e-2


@pytest.mark.parametrize("stem", ["gla_fast", "gla_states_fast", "gla_backward_fast", "gla_outputs_fast"])
def test_the_launcher_asks_for_the_shared_memory_that_a_kernel_lays_out(stem):
    """Too little would be written over silently."""
    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    size = {
        "gla_fast": linear_attention._fast_bytes,
        "gla_states_fast": linear_attention._added_bytes,
        "gla_backward_fast": linear_attention._backward_bytes,
        "gla_outputs_fast": linear_attention._outputs_bytes,
    }[stem]
    claims = "".join(f"static_assert(sizeof(Shared<{D}>) == {size(D)});\n" for D in (64, 128))
    assert emulator.complaints(stem, "bfloat16", claims) == ""
