"""The 76B's kernels against the reference, and the whole layout on the CUDA backend: on a GPU and in emulation."""

import numpy as np
import pytest
from conftest import backends
from emulator import here, there
from moe_cases import CASES
from test_gpu_ops import assert_close, doubled, make, run

from minisb import gradcheck
from minisb.backend import CudaBackend

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def plain(cuda):
    """The reference, on arrays of the same kind."""
    return CudaBackend(cuda.device, "none")


# --- every operation, as test_gpu_ops.py has them


def test_every_operation_has_a_kernel(cuda):
    assert {name for case in CASES for name in case.natives} <= set(cuda.natives)


@every_case
@pytest.mark.parametrize("T", [1, 9, 65])
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_kernels_equal_the_reference(case, T, dtype, limit, cuda):
    """float32 is measured against the reference in float64, from the same rounded inputs."""
    x, upstream, grads = make(case, T, dtype)
    expected = run(case, *2 * [backends()["numpy"]], *doubled(x, upstream, grads))
    assert_close(run(case, cuda, cuda, x, upstream, grads), expected, limit, dtype)


@every_case
@pytest.mark.parametrize("forward_by_kernels", [True, False], ids=["kernels-reference", "reference-kernels"])
def test_what_is_saved_belongs_to_the_operation(case, forward_by_kernels, cuda, plain):
    x, upstream, grads = make(case, 33, np.float64)
    pair = (cuda, plain) if forward_by_kernels else (plain, cuda)
    expected = run(case, *2 * [backends()["numpy"]], x, upstream, grads)
    assert_close(run(case, *pair, x, upstream, grads), expected, 1e-12, np.float64)


@every_case
@pytest.mark.parametrize("T", [1, 33])
def test_gradient_along_a_random_direction(case, T, cuda):
    x, upstream, before = make(case, T, np.float64)
    _, after = run(case, cuda, cuda, x, upstream, before)
    grads = {name: g - before.get(name, 0) for name, g in after.items()}

    def loss():
        outputs = here(case.forward(cuda, there(cuda, x))[0])
        return sum(float((u * outputs[name]).sum()) for name, u in upstream.items())

    assert gradcheck.directional(loss, {name: x[name] for name in grads}, grads) < gradcheck.LIMIT


@every_case
def test_all_memory_is_written_and_bits_repeat(case, cuda, monkeypatch):
    """Fresh memory holds NaN: what is not written shows.  And a second run gives the first one's bits."""
    x, upstream, grads = make(case, 33, np.float32)
    clean = run(case, cuda, cuda, x, upstream, grads)
    for function in (cuda.xp.empty, cuda.xp.empty_like):

        def poisoned(*args, function=function, **kwargs):
            made = function(*args, **kwargs)
            made.fill(np.nan if made.dtype.kind == "f" else 99)
            return made

        monkeypatch.setattr(cuda.xp, function.__name__, poisoned)
    for got, want in zip(run(case, cuda, cuda, x, upstream, grads), clean, strict=True):
        for key in want:
            assert got[key].tobytes() == want[key].tobytes(), key
