"""The matrix product in all its forms, and the projection made of it."""

import numpy as np
import pytest
from conftest import backend_of

from minisb.backend import CpuBackend
from minisb.gradcheck import relative_rms
from minisb.ops.ffn import ffn_backward, ffn_forward
from minisb.ops.linear import linear_backward, linear_forward

every_name = pytest.mark.parametrize("name", ["numpy", "cpu"])
every_dtype = pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-13)], ids=["32", "64"])


@every_name
@every_dtype
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (7, 11, 5), (1, 300, 33), (300, 1, 33), (65, 3, 129), (600, 33, 70), (70, 520, 40)]
)
def test_gemm(name, dtype, limit, ta, tb, m, n, k):
    be = backend_of(name, "linear")
    rng = np.random.default_rng(0)
    a = rng.standard_normal((k, m) if ta else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if tb else (k, n)).astype(dtype)
    want = (a.T if ta else a).astype(np.float64) @ (b.T if tb else b).astype(np.float64)
    assert relative_rms(be.gemm(a, b, ta=ta, tb=tb), want) < limit
    start = rng.standard_normal((m, n)).astype(dtype)
    out = np.full((m, n), np.nan, dtype)
    assert be.gemm(a, b, out=out, ta=ta, tb=tb) is out
    assert relative_rms(out, want) < limit
    out = start.copy()
    be.gemm(a, b, out=out, ta=ta, tb=tb, accumulate=True)
    assert relative_rms(out, want + start) < limit


@every_name
@every_dtype
def test_gemm_into_columns_of_a_wider_array(name, dtype, limit):
    be = backend_of(name, "linear")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((600, 33), (33, 20)))
    wide = np.full((600, 50), 7, dtype)
    be.gemm(a, b, out=wide[:, 10:30])
    assert relative_rms(wide[:, 10:30], a.astype(np.float64) @ b) < limit
    assert (wide[:, :10] == 7).all() and (wide[:, 30:] == 7).all()
    wide_a, wide_b = np.zeros((600, 40), dtype), np.zeros((33, 31), dtype)
    wide_a[:, 3:36], wide_b[:, 11:] = a, b
    be.gemm(wide_a[:, 3:36], wide_b[:, 11:], out=wide[:, :20], accumulate=True)
    want = a.astype(np.float64) @ b
    want[:, :10] += 7
    want[:, 10:] += wide[:, 20:30] * 0 + (a.astype(np.float64) @ b)[:, :10]
    assert relative_rms(wide[:, :20], want) < limit


def test_gemm_bits_do_not_depend_on_threads():
    backend_of("cpu", "linear")
    rng = np.random.default_rng(0)
    for m, n, k in ((1000, 33, 70), (33, 700, 70), (128, 128, 2000), (5, 5, 5)):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n)))
        first, *others = (CpuBackend(threads).gemm(a, b).tobytes() for threads in (1, 2, 4))
        assert all(other == first for other in others)


@every_name
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gemm_keeps_nan(name):
    be = backend_of(name, "linear")
    a, b = np.ones((40, 30), np.float32), np.ones((30, 20), np.float32)
    a[3, 4] = np.nan
    found = np.isnan(be.gemm(a, b))
    assert found[3].all() and found.sum() == 20


@every_name
@every_dtype
@pytest.mark.parametrize("T", [1, 63, 700])
def test_projection_with_a_bias_over_fewer_outputs(name, dtype, limit, T):
    be = backend_of(name, "linear")
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((2, T, 7), (11, 7), (4,)))
    want = np.einsum("bti,oi->bto", x.astype(np.float64), w)
    assert relative_rms(linear_forward(be, x, w), want) < limit
    want[..., :4] += b
    out = np.full((2, T, 11), np.nan, dtype)
    assert linear_forward(be, x, w, b, out=out) is out
    assert relative_rms(out, want) < limit

    dy = rng.standard_normal((2, T, 11)).astype(dtype)
    dw, db, dx = (rng.standard_normal(a.shape).astype(dtype) for a in (w, b, x))
    before = dw.copy(), db.copy(), dx.copy()
    fresh = linear_backward(be, dy, x, w, dw, db)
    again = linear_backward(be, dy, x, w, np.zeros_like(dw), dx=dx)
    assert again is dx
    want_dx = np.einsum("bto,oi->bti", dy.astype(np.float64), w)
    assert relative_rms(fresh, want_dx) < limit
    assert relative_rms(dx, want_dx + before[2]) < limit
    assert relative_rms(dw, np.einsum("bto,bti->oi", dy.astype(np.float64), x) + before[0]) < limit
    assert relative_rms(db, dy[..., :4].astype(np.float64).sum((0, 1)) + before[1]) < limit


@pytest.mark.parametrize("N", [240, 1100])
def test_feed_forward_over_many_rows(N):
    """Gradients of weights are brought up to date every 960 rows, 240 of which are packed together."""
    rng, C, F = np.random.default_rng(0), 40, 55
    x, dy, w_in, w_out = (rng.standard_normal(s) for s in ((N, C), (N, C), (2 * F, C), (C, F)))
    results = []
    for name in ("numpy", "cpu"):
        be = backend_of(name, "ffn_forward", "ffn_backward")
        dw_in, dw_out = np.ones_like(w_in), np.ones_like(w_out)
        y, saved = ffn_forward(be, x, w_in, w_out)
        results.append((y, ffn_backward(be, dy, saved, w_in, w_out, dw_in, dw_out), dw_in, dw_out))
    for want, got in zip(*results, strict=True):
        assert relative_rms(got, want) < 1e-13
