"""The tensor-core kernels against float64, from inputs rounded as they are: on a GPU, and in emulation."""

import numpy as np
import pytest
from emulator import here, there

from minisb.backend import Backend
from minisb.ops.gla import gla_backward, gla_forward, gla_recurrent_forward


def half(element: str):
    if element == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(element)


def relative(x, exact) -> float:
    return float(np.linalg.norm(here(x).astype(np.float64) - exact) / np.linalg.norm(exact))


CASES = [  # B, T, H, G, D, strongest gate
    (2, 1, 2, 1, 64, 1.0), (2, 63, 3, 3, 64, 0.1), (2, 65, 6, 2, 64, 0.1), (1, 1000, 6, 2, 64, 0.5),
    (1, 520, 1, 1, 64, 0.5), (2, 129, 4, 2, 128, 1.2), (2, 200, 6, 2, 64, 5.0),
    (1, 300, 7, 1, 128, 20.0), (1, 1000, 7, 1, 128, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, H, G, D, strongest", CASES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_linear_attention_on_tensor_cores(cuda, element, B, T, H, G, D, strongest):
    """With a first state, in one piece and in several, with gates for the products and for the walk."""
    if cuda.xp is np and B * T * H * D > 160_000:
        pytest.skip("takes minutes in emulation")
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
