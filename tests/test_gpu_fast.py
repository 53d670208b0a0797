"""The tensor-core kernels against float64, from inputs rounded as they are."""

import numpy as np
import pytest

from minisb.backend import Backend, choose
from minisb.ops.gla import gla_backward, gla_forward, gla_recurrent_forward

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu():
    return choose("cuda")[0]


def relative(x, exact) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


CASES = [  # B, T, H, G, D, strongest gate
    (2, 1, 2, 1, 64, 1.0), (2, 63, 3, 3, 64, 0.1), (2, 65, 6, 2, 64, 0.1), (1, 1000, 6, 2, 64, 0.5),
    (2, 129, 4, 2, 128, 1.2), (2, 200, 6, 2, 64, 5.0), (1, 300, 7, 1, 128, 20.0), (1, 1000, 7, 1, 128, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("B, T, H, G, D, strongest", CASES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_linear_attention_on_tensor_cores(gpu, element, B, T, H, G, D, strongest):
    """With a first state, in one piece and in several, with gates for the products and for the walk."""
    import cupy
    import ml_dtypes

    dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[element])
    rng = np.random.default_rng(T)
    q, k = (np.maximum(rng.standard_normal((B, T, n, D)), 0).astype(dtype) for n in (H, G))
    v = rng.standard_normal((B, T, G, D)).astype(dtype)
    log_g = (-strongest * rng.random((B, T, G, D))).astype(np.float32)
    first = rng.standard_normal((B, G, D, D)).astype(np.float32)
    exact, last, every = gla_recurrent_forward(Backend(), *(x.astype(np.float64) for x in (q, k, v, log_g, first)))

    device = [cupy.asarray(x) for x in (q, k, v, log_g, first)]
    o, final, saved = gla_forward(gpu, *device)
    again = gla_forward(gpu, *device)[0]
    assert saved[5] == 64, "this is not the fast kernel"
    assert relative(o.get().astype(np.float64), exact) < 6e-3
    assert relative(final.get(), last) < 4e-3
    assert relative(saved[-1].get(), every[:-1:64].swapaxes(0, 1)) < 4e-3
    assert (o.view("uint16") == again.view("uint16")).all()


def test_backward_takes_what_the_fast_forward_saved(gpu):
    import cupy

    rng = np.random.default_rng(0)
    draw = [rng.standard_normal((1, 130, n, 64)).astype(np.float16) for n in (2, 1, 1)]
    log_g = -rng.random((1, 130, 1, 64)).astype(np.float32)
    do = rng.standard_normal(draw[0].shape).astype(np.float16)
    device = [cupy.asarray(x) for x in (*draw, log_g)]
    found = gla_backward(gpu, cupy.asarray(do), None, gla_forward(gpu, *device)[2])
    be, wide = Backend(), [x.astype(np.float64) for x in (*draw, log_g)]
    exact = gla_backward(be, do.astype(np.float64), None, gla_forward(be, *wide)[2])
    for got, want in zip(found, exact, strict=True):
        assert relative(got.get().astype(np.float64), want) < 1e-2
