"""The low-rank gate on tensor cores against float64, from inputs rounded as they are: on a GPU, and in emulation."""

import numpy as np
import pytest
from emulator import here, there
from test_gpu_fast import half, poisoned, relative

from minisb.backend import Backend
from minisb.launchers import dense
from minisb.ops.gate import low_rank_gate_backward, low_rank_gate_forward

LOW_RANK = dense.LOW_RANK
CASES = [  # rows, R, J, columns before x in its array
    (1, 16, 128, 0), (70, 16, 128, 3), (33, 16, 512, 8), (37, 12, 100, 1), (19, 7, 33, 0), (50, 32, 64, 8),
    (17, 25, 256, 5), (16, 1, 5, 0), (150, 16, 300, 8),
]  # fmt: skip
LARGE = [(32_768, 16, 128, 640), (5_000, 16, 256, 8), (9_001, 32, 256, 0), (4_100, 16, 512, 8)]


def draw(element, rows, R, J, before):
    """x, w, b, dlog_g, and what dx (with columns before it), dw and db hold already."""
    dtype, rng = half(element), np.random.default_rng([rows, R, J])
    x = rng.standard_normal((1, rows, before + R)).astype(dtype)
    w, b = (rng.standard_normal(s).astype(dtype) for s in ((J, R), (J,)))
    dlog_g = rng.standard_normal((1, rows, J)).astype(np.float32)
    dw, db = (rng.standard_normal(s).astype(np.float32) for s in ((J, R), (J,)))
    return x, w, b, dlog_g, np.full_like(x, 7), dw, db


def exactly(x):
    return here(x).astype(np.float64)


def launched(be, monkeypatch) -> list:
    """Names of kernels, as they are launched."""
    names, launch = [], be.launch
    monkeypatch.setattr(be, "launch", lambda name, *rest, **how: (names.append(name), launch(name, *rest, **how)))
    return names


@pytest.mark.parametrize("rows, R, J, before", CASES + LARGE)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_the_gate_on_tensor_cores(cuda, monkeypatch, element, rows, R, J, before):
    """Forward and every gradient, from arrays full of NaN, twice; x and dx are columns of something wider."""
    if cuda.xp is np:
        if rows > 150 or (element == "float16" and (rows, J) != (70, 128)):
            pytest.skip("takes too long in emulation")
        monkeypatch.setattr(dense, "MULTIPROCESSORS", 1)  # few blocks, so that each goes round several times
    given = draw(element, rows, R, J, before)
    wide, be = [a.astype(np.float64) for a in given], Backend()
    exact, saved = low_rank_gate_forward(be, wide[0][..., before:], *wide[1:3], 16.0)
    dx, dw, db = wide[4:]
    low_rank_gate_backward(be, wide[3], saved, dx[..., before:], dw, db)

    names, found = launched(cuda, monkeypatch), []
    for _ in range(2):
        x, w, b, dlog_g, *gradients = there(cuda, list(given))
        with poisoned(cuda):
            log_g, saved = low_rank_gate_forward(cuda, x[..., before:], w, b, 16.0)
            low_rank_gate_backward(cuda, dlog_g, saved, gradients[0][..., before:], *gradients[1:])
        found.append([log_g, *gradients])
    width = 16 if R <= 16 else 32
    assert names == 2 * [f"low_rank_gate_forward_{width}", f"low_rank_gate_backward_{width}", "add_slices"]
    assert (log_g < 0).all() and saved[-1] is None
    assert (gradients[0][..., :before] == 7).all()
    rounding = 2**-8 if element == "bfloat16" else 2**-11
    assert relative(log_g, exact) < 1e-6
    errors = [relative(got, want) for got, want in zip(gradients, (dx, dw, db), strict=True)]
    assert max(errors[:2]) < 1.5 * rounding and errors[2] < 1e-5, errors
    for one, two in zip(*found, strict=True):
        assert (one.view("uint8") == two.view("uint8")).all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_far_out_gates_keep_their_digits(cuda):
    """x chooses one weight, so z is known exactly."""
    z = np.array([-3e4, -90, -20, -1e-3, 0, 1e-3, 15, 30, 80, 2e4, np.nan])
    x, w = np.zeros((len(z), 16)), np.zeros((32, 16))
    x[:, 3], w[:, 3] = z, 1
    given = [a.astype("float16") for a in (x, w, np.zeros(32))]
    log_g, saved = low_rank_gate_forward(cuda, *there(cuda, given), 2.0)
    exact = given[0][:, 3:4].astype(np.float64) * np.ones(32)
    np.testing.assert_allclose(exactly(log_g), -np.logaddexp(0, -exact) / 2, rtol=4e-6, atol=1e-30)
    dx, dw, db = (cuda.xp.zeros(s, t) for s, t in (((len(z), 16), "float16"), ((32, 16), "float32"), (32, "float32")))
    low_rank_gate_backward(cuda, cuda.xp.ones((len(z), 32), "float32"), saved, dx, dw, db)
    slope = 32 * np.exp(-np.logaddexp(0, exact[:, 0])) / 2
    np.testing.assert_allclose(exactly(dx)[:, 3], slope, rtol=2e-3, atol=1e-4)
    assert np.isnan(exactly(db)).all()


def test_what_forward_saved_fits_the_other_route(cuda, monkeypatch):
    """Forward by the fused kernel, backward by products, the other way round; and shapes that the kernel refuses."""
    *given, dlog_g, dx, dw, db = draw("float16", 40, 16, 64, 0)
    results = []
    for fast in ((True, True), (True, False), (False, True)):
        gradients = there(cuda, [dx, dw, db])
        monkeypatch.setattr(dense, "LOW_RANK", LOW_RANK if fast[0] else {})
        saved = low_rank_gate_forward(cuda, *there(cuda, given), 16.0)[1]
        assert (saved[-1] is None) == fast[0]
        monkeypatch.setattr(dense, "LOW_RANK", LOW_RANK if fast[1] else {})
        low_rank_gate_backward(cuda, there(cuda, dlog_g), saved, *gradients)
        results.append(gradients)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert relative(got, exactly(want)) < 2e-3
    names = launched(cuda, monkeypatch)
    for rows, R, J in ((5, 33, 32), (5, 20, 300), (5, 16, 520)):
        low_rank_gate_forward(cuda, *there(cuda, draw("float16", rows, R, J, 0)[:3]), 16.0)
    assert names and not any(name.startswith("low_rank") for name in names)
