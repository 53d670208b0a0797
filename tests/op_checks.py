"""What every operation's kernels are asked, on a GPU and in emulation; the cases are those of two files, *_cases.py."""

import numpy as np
from conftest import backends
from emulator import here, there

from minisb import gradcheck
from minisb.backend import CudaBackend


def make(case, T, dtype):
    """Inputs, a random gradient for each output, and parameter gradients that already hold something."""
    rng = np.random.default_rng([0, T])
    x = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in case.inputs(rng, T).items()}
    outputs, _ = case.forward(backends()["numpy"], x)
    upstream = {name: rng.standard_normal(a.shape).astype(dtype) for name, a in outputs.items()}
    return x, upstream, {name: rng.standard_normal(x[name].shape).astype(dtype) for name in case.params}


def run(case, forward_be, backward_be, x, upstream, grads):
    """Outputs and gradients on the host; inputs are taken to the backend and stay as they are."""
    x, upstream, grads = (there(forward_be, d) for d in (x, upstream, grads))
    outputs, saved = case.forward(forward_be, x)
    found = case.backward(backward_be, upstream, saved, x, grads)
    return here(outputs), here({**found, **grads})


def doubled(*dicts):
    return [{k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in d.items()} for d in dicts]


def assert_close(results, expected, limit, dtype):
    for got, want in zip(results, expected, strict=True):
        assert got.keys() == want.keys()
        for key in want:
            assert got[key].dtype == dtype and got[key].shape == want[key].shape, key
            size = max(np.linalg.norm(want[key]), 0.1 * want[key].size ** 0.5)
            assert np.linalg.norm(got[key] - want[key]) < limit * size, key


def equals_the_reference(case, T, dtype, limit, cuda):
    """float32 is measured against the reference in float64, from the same rounded inputs."""
    x, upstream, grads = make(case, T, dtype)
    expected = run(case, *2 * [backends()["numpy"]], *doubled(x, upstream, grads))
    assert_close(run(case, cuda, cuda, x, upstream, grads), expected, limit, dtype)


def what_is_saved_belongs_to_the_operation(case, T, cuda, forward_by_kernels):
    """Kernels on one side and the reference, on arrays of the same kind, on the other."""
    x, upstream, grads = make(case, T, np.float64)
    plain = CudaBackend(cuda.device, "none")
    pair = (cuda, plain) if forward_by_kernels else (plain, cuda)
    expected = run(case, *2 * [backends()["numpy"]], x, upstream, grads)
    assert_close(run(case, *pair, x, upstream, grads), expected, 1e-12, np.float64)


def gradient_along_a_random_direction(case, T, cuda):
    x, upstream, before = make(case, T, np.float64)
    _, after = run(case, cuda, cuda, x, upstream, before)
    grads = {name: g - before.get(name, 0) for name, g in after.items()}

    def loss():
        outputs = here(case.forward(cuda, there(cuda, x))[0])
        return sum(float((u * outputs[name]).sum()) for name, u in upstream.items())

    assert gradcheck.directional(loss, {name: x[name] for name in grads}, grads) < gradcheck.LIMIT


def all_memory_is_written_and_bits_repeat(case, T, cuda, monkeypatch, others):
    """Fresh memory holds NaN, integers `others`: what is not written shows.  And a second run gives the first one's
    bits."""
    x, upstream, grads = make(case, T, np.float32)
    clean = run(case, cuda, cuda, x, upstream, grads)
    for function in (cuda.xp.empty, cuda.xp.empty_like):

        def poisoned(*args, function=function, **kwargs):
            made = function(*args, **kwargs)
            made.fill(np.nan if made.dtype.kind == "f" else others)
            return made

        monkeypatch.setattr(cuda.xp, function.__name__, poisoned)
    for got, want in zip(run(case, cuda, cuda, x, upstream, grads), clean, strict=True):
        for key in want:
            assert got[key].tobytes() == want[key].tobytes(), key
