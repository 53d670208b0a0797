"""What every operation owes: right gradients on every backend, natives equal to references, no
memory left unwritten, bits that do not depend on threads, NaN that is seen."""

import importlib
import inspect
import pkgutil

import moe_cases
import numpy as np
import op_cases
import pytest
from conftest import backend_of, backends

import minisb.ops
from minisb import gradcheck
from minisb.backend import CpuBackend

CASES = [*op_cases.CASES, *moe_cases.CASES]
LENGTHS = [1, 63, 65]
PAIRS = [("numpy", "numpy"), ("numpy", "cpu"), ("cpu", "numpy"), ("cpu", "cpu")]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_length = pytest.mark.parametrize("T", LENGTHS)


def make(case, T, dtype=np.float64, seed=0):
    """Inputs, a random gradient for each output, and parameter gradients that already hold something."""
    rng = np.random.default_rng([seed, T])
    x = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in case.inputs(rng, T).items()}
    outputs, _ = case.forward(backends()["numpy"], x)
    upstream = {name: rng.standard_normal(a.shape).astype(dtype) for name, a in outputs.items()}
    grads = {name: rng.standard_normal(x[name].shape).astype(dtype) for name in case.params}
    return x, upstream, grads


def run(case, forward_be, backward_be, x, upstream, grads):
    """Outputs and all gradients, those of parameters with what was there before."""
    grads = {name: g.copy() for name, g in grads.items()}
    outputs, saved = case.forward(forward_be, x)
    return outputs, {**case.backward(backward_be, upstream, saved, x, grads), **grads}


def check_gradients(case, forward_be, backward_be, T, check):
    x, upstream, before = make(case, T)
    _, after = run(case, forward_be, backward_be, x, upstream, before)
    grads = {name: g - before.get(name, 0) for name, g in after.items()}
    inputs = {name: x[name] for name in grads}

    def loss():
        outputs, _ = case.forward(forward_be, x)
        return sum(float((u * outputs[name]).sum()) for name, u in upstream.items())

    check(loss, inputs, grads)


@every_case
@every_length
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_gradient_along_a_random_direction(case, T, pair):
    def check(loss, inputs, grads):
        assert gradcheck.directional(loss, inputs, grads) < gradcheck.LIMIT

    check_gradients(case, *(backend_of(name, *case.natives) for name in pair), T, check)


@every_case
@pytest.mark.parametrize("name", ["numpy", "cpu"])
def test_gradient_entry_by_entry(case, name):
    def check(loss, inputs, grads):
        for key in (key for key in inputs if inputs[key].size <= 300):
            assert gradcheck.elementwise(loss, inputs[key], grads[key]) < gradcheck.LIMIT, key

    chosen = backend_of(name, *case.natives)
    check_gradients(case, chosen, chosen, 2, check)


@every_case
@every_length
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_native_equals_reference(case, T, dtype, limit):
    """float32 is measured against the reference in float64, from the same rounded inputs."""
    cpu = backend_of("cpu", *case.natives)
    x, upstream, grads = make(case, T, dtype)
    exact = [
        {k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in d.items()} for d in (x, upstream, grads)
    ]
    for got, want in zip(
        run(case, cpu, cpu, x, upstream, grads), run(case, *2 * [backends()["numpy"]], *exact), strict=True
    ):
        assert got.keys() == want.keys()
        for key in want:
            assert got[key].dtype == dtype and got[key].shape == want[key].shape, key
            # Inputs are of order 1: where the result should be 0, what is left of them may be rounding.
            size = max(np.linalg.norm(want[key]), 0.1 * want[key].size ** 0.5)
            assert np.linalg.norm(got[key] - want[key]) < limit * size, key


@every_case
@pytest.mark.parametrize("name", ["numpy", "cpu"])
def test_all_memory_is_written(case, name, monkeypatch):
    chosen = backend_of(name, *case.natives)
    x, upstream, grads = make(case, 65, np.float32)
    clean = run(case, chosen, chosen, x, upstream, grads)
    for function in (np.empty, np.empty_like):

        def poisoned(*args, function=function, **kwargs):
            made = function(*args, **kwargs)
            made.fill(np.nan if made.dtype.kind == "f" else 0)
            return made

        monkeypatch.setattr(np, function.__name__, poisoned)
    assert np.isnan(np.empty(3)).all()
    for got, want in zip(run(case, chosen, chosen, x, upstream, grads), clean, strict=True):
        for key in want:
            assert np.array_equal(got[key], want[key]), key


@every_case
def test_parameter_gradients_are_added_to(case, be):
    x, upstream, grads = make(case, 63)
    zero = {name: np.zeros_like(g) for name, g in grads.items()}
    _, fresh = run(case, be, be, x, upstream, zero)
    _, added = run(case, be, be, x, upstream, grads)
    for name in case.params:
        np.testing.assert_allclose(added[name], grads[name] + fresh[name], rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize("T", ["one", "many"])
def test_bits_do_not_depend_on_threads(case, T):
    backend_of("cpu", *case.natives)
    x, upstream, grads = make(case, case.many if T == "many" else 1, np.float32)
    first = None
    for threads in (1, 2, 4):
        cpu = CpuBackend(threads)
        results = run(case, cpu, cpu, x, upstream, grads)
        first = first or results
        for got, want in zip(results, first, strict=True):
            for key in want:
                assert got[key].tobytes() == want[key].tobytes(), (key, threads)


def assert_nan_alike(case, results, expected):
    """NaN exactly where the reference has it.  Where a product with zero carries it further in the
    reference than the mathematics asks for, somewhere in the outputs and somewhere in the gradients."""
    for got, want in zip(results, expected, strict=True):
        if case.local:
            for key in want:
                assert np.array_equal(np.isnan(got[key]), np.isnan(want[key])), key
        else:
            assert any(np.isnan(a).any() for a in got.values()) or not any(np.isnan(a).any() for a in want.values())


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_survives(case, dtype):
    cpu, reference = backend_of("cpu", *case.natives), backends()["numpy"]
    x, upstream, grads = make(case, 21, dtype)
    for arrays in (x, upstream):
        for key, a in arrays.items():
            if key == "T":
                continue
            # the last token, which some query sees whatever the window
            at = a.size // 2 if case.local else a.size - 1
            kept = a.flat[at]
            a.flat[at] = np.nan
            expected = run(case, reference, reference, x, upstream, grads)
            seen = any(np.isnan(value).any() for part in expected for value in part.values())
            assert seen or case.name in moe_cases.UNREAD
            assert_nan_alike(case, run(case, cpu, cpu, x, upstream, grads), expected)
            a.flat[at] = kept


def references():
    """operation name -> its readable function."""
    found = {}
    for module in pkgutil.iter_modules(minisb.ops.__path__):
        for name, function in vars(importlib.import_module(f"minisb.ops.{module.name}")).items():
            if hasattr(function, "reference"):
                found[name] = function.reference
    return found


def test_natives_take_what_the_references_take():
    natives, known = backend_of("cpu").natives, references()
    assert set(natives) <= set(known)
    for name, native in natives.items():
        ours, theirs = (inspect.signature(f).parameters.values() for f in (native, known[name]))
        assert [(p.name, p.default is p.empty) for p in ours] == [(p.name, p.default is p.empty) for p in theirs], name


def test_contiguous_or_not_is_all_the_same():
    """Inputs that are views of something larger, as a fused projection hands them out."""
    cpu = backend_of("cpu")
    for case in CASES:
        x, upstream, grads = make(case, 21)
        outputs, gradients = run(case, cpu, cpu, x, upstream, grads)
        strided = []
        for arrays in (x, upstream):
            wide = {k: np.repeat(a, 2, axis=0) if a.ndim > 1 else a for k, a in arrays.items()}
            strided.append({k: a[::2] if a.ndim > 1 else a for k, a in wide.items()})
        if "logits" in x:
            continue  # its gradient is written over a copy
        for got, want in zip(run(case, cpu, cpu, *strided, grads), (outputs, gradients), strict=True):
            for key in want:
                np.testing.assert_allclose(got[key], want[key], rtol=1e-12, atol=1e-12, err_msg=f"{case.name} {key}")
