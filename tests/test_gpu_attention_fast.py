"""Softmax attention on tensor cores against float64, from inputs rounded as they are: on a GPU, and in emulation.

The limit is twice the error of `rounded`, the reference rounded where the kernel rounds.
"""

import re

import emulator
import numpy as np
import pytest
from emulator import here, there

from minisb import kernels
from minisb.backend import Backend
from minisb.launchers import attention as twins
from minisb.ops.attention import attention_backward, attention_forward

CASES = [  # B, T, S, H, G, D, window
    (2, 1, 1, 3, 1, 64, 5), (1, 63, 63, 3, 3, 64, 64), (1, 65, 65, 3, 1, 64, 1), (2, 129, 129, 2, 1, 64, 100),
    (1, 200, 200, 3, 1, 64, 5), (1, 200, 200, 3, 1, 64, 64), (1, 200, 200, 1, 1, 64, 1000), (1, 65, 65, 6, 3, 64, 100),
    (1, 70, 201, 3, 1, 64, 100), (1, 3, 300, 1, 1, 64, 40), (1, 129, 129, 3, 1, 128, 64), (1, 65, 65, 1, 1, 128, 1),
    (1, 63, 130, 2, 2, 128, 130),
    # one key of a chunk is seen
    (1, 130, 130, 1, 1, 64, 66), (1, 130, 130, 1, 1, 128, 66),
    # where a GPU takes microseconds
    (2, 1000, 1000, 6, 2, 64, 256), (1, 1000, 1000, 7, 1, 128, 300), (3, 512, 700, 4, 4, 128, 700),
    (2, 640, 640, 8, 1, 64, 640),
]  # fmt: skip
BOTH = [(1, 65, 65, 3, 1, 64, 1), (1, 65, 65, 1, 1, 128, 1)]  # in bfloat16 too where it is emulated
ELEMENTS = ["bfloat16", "float16"]


def half(element: str):
    if element == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(element)


class Poisoned:
    """NaN wherever `empty` was asked for: what a kernel forgets to write is seen."""

    def __init__(self, xp):
        self.xp = xp

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def empty(self, shape, dtype):
        return self.xp.full(shape, np.nan, dtype)

    def empty_like(self, x):
        return self.empty(x.shape, x.dtype)


@pytest.fixture
def poisoned(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "xp", Poisoned(cuda.xp))
    return cuda


@pytest.fixture
def launched(monkeypatch, cuda):
    """The names of the kernels that ran."""
    names, launch = [], cuda.device.launch
    monkeypatch.setattr(cuda.device, "launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k)))
    return names


@pytest.fixture(params=[False, True], ids=["mma", "wgmma"])
def hopper(request, monkeypatch, cuda):
    """Whether the kernels of attention_hopper*.cu are taken."""
    if request.param and cuda.device.target != "sm_90a":
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(twins, "HOPPER", dict.fromkeys(twins.HOPPER_STAGES, 1) if request.param else {})
    return request.param


def draw(case, dtype, seed=0):
    B, T, S, H, G, D, _ = case
    rng = np.random.default_rng([seed, T, S])
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def rounded(q, k, v, do, window, dtype):
    """-> o, dq, dk, dv as the kernel rounds, else in float64: p before it meets v or do, ds, and the results."""

    def cut(x):
        return x.astype(dtype).astype(np.float64)

    B, T, H, D = q.shape
    S, R = k.shape[1], H // k.shape[2]
    position, key = np.arange(S - T, S)[:, None], np.arange(S)
    seen = (key <= position) & (key > position - window)
    kh, vh = (np.repeat(x, R, 2) for x in (k, v))
    s = np.where(seen, np.einsum("bthd,bshd->bhts", q, kh) * D**-0.5, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    o = cut(np.einsum("bhts,bshd->bthd", cut(p), vh) / total[..., 0].swapaxes(1, 2)[..., None])
    p = p / total
    delta = (do * o).sum(-1).swapaxes(1, 2)[..., None]
    ds = cut(p * (np.einsum("bthd,bshd->bhts", do, vh) - delta))
    dq = cut(np.einsum("bhts,bshd->bthd", ds, kh) * D**-0.5)
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q) * D**-0.5, np.einsum("bhts,bthd->bshd", cut(p), do)
    return o, dq, *(cut(x.reshape(B, S, -1, R, D).sum(3)) for x in (dk, dv))


def distance(x, exact) -> float:
    """Relative, but of a gradient that is nearly zero by nature the size of a rounding."""
    return float(
        np.linalg.norm(here(x).astype(np.float64) - exact) / max(np.linalg.norm(exact), 0.01 * exact.size**0.5)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
def test_attention_on_tensor_cores(poisoned, launched, hopper, element, case):
    dtype, window = half(element), case[-1]
    if poisoned.device.xp is np and (case[1] > 500 or (element == "bfloat16" and case not in BOTH)):
        pytest.skip("takes too long in emulation")
    inputs = draw(case, dtype)
    wide = [x.astype(np.float64) for x in inputs]
    o, saved = attention_forward(Backend(), *wide[:3], window)
    exact = dict(zip(("o", "dq", "dk", "dv"), (o, *attention_backward(Backend(), wide[3], saved)), strict=True))
    limits = {name: distance(x, exact[name]) for name, x in zip(exact, rounded(*wide, window, dtype), strict=True)}

    def both():
        q, k, v, do = there(poisoned, inputs)
        found, kept = attention_forward(poisoned, q, k, v, window)
        return dict(zip(exact, (found, *attention_backward(poisoned, do, kept)), strict=True)), here(kept[4])

    found, lse = both()
    again, _ = both()
    assert all(name.startswith(("attention_fast", "attention_hopper")) for name in launched) and len(launched) == 6
    assert sum("hopper" in name for name in launched) == 6 * hopper
    assert np.abs(lse - saved[4]).max() < 1e-5 * max(1, np.abs(saved[4]).max())
    for name, want in exact.items():
        assert here(found[name]).dtype == dtype
        error = distance(found[name], want)
        assert error <= min(2 * limits[name] + 5e-5, 1e-2), (name, error, limits[name])
        assert (here(found[name]).view("uint16") == here(again[name]).view("uint16")).all(), name


@pytest.mark.parametrize("first_fast", [True, False])
def test_what_is_saved_fits_the_plain_kernels(cuda, launched, monkeypatch, first_fast):
    case, dtype = (1, 90, 90, 3, 1, 64, 40), np.dtype("float16")
    inputs = draw(case, dtype)
    q, k, v, do = there(cuda, inputs)
    wide = [x.astype(np.float64) for x in inputs]
    exact = attention_backward(Backend(), wide[3], attention_forward(Backend(), *wide[:3], 40)[1])
    fast = twins.tensor_cores
    if not first_fast:
        monkeypatch.setattr(twins, "tensor_cores", lambda *_: False)
    _, saved = attention_forward(cuda, q, k, v, 40)
    monkeypatch.setattr(twins, "tensor_cores", (lambda *_: False) if first_fast else fast)
    found = attention_backward(cuda, do, saved)
    on_tensor_cores = [name.startswith(("attention_fast", "attention_hopper")) for name in launched]
    assert any(on_tensor_cores) and not all(on_tensor_cores)
    for x, want in zip(found, exact, strict=True):
        assert distance(x, want) < 1e-2


@pytest.mark.parametrize("element", ELEMENTS)
def test_large_scores_and_a_maximum_that_climbs(cuda, hopper, element):
    """Each key is larger than the one before it, so that the softmax's shift must follow; scores reach hundreds."""
    dtype = half(element)
    T = 300  # three tiles of the Hopper kernel
    q, k, v, _ = draw((1, T, T, 1, 1, 64, T), dtype)
    q = np.abs(q)
    k = (np.abs(k).astype(np.float32) * np.linspace(-20, 20, T, dtype=np.float32)[None, :, None, None]).astype(dtype)
    exact, saved = attention_forward(Backend(), *(x.astype(np.float64) for x in (q, k, v)), T)
    o, kept = attention_forward(cuda, *there(cuda, [q, k, v]), T)
    assert np.abs(saved[4]).max() > 100
    assert distance(o, exact) < (4e-3 if element == "bfloat16" else 1e-3)
    assert np.abs(here(kept[4]) - saved[4]).max() < 1e-5 * np.abs(saved[4]).max()


@pytest.mark.parametrize("scale", [0.3, -0.1])
def test_another_scale(cuda, launched, scale):
    """A negative one is left to the plain kernels."""
    inputs = draw((1, 70, 70, 2, 1, 64, 33), np.dtype("float16"))
    wide = [x.astype(np.float64) for x in inputs]
    o, saved = attention_forward(Backend(), *wide[:3], 33, scale)
    q, k, v, do = there(cuda, inputs)
    found, kept = attention_forward(cuda, q, k, v, 33, scale)
    pairs = zip(
        (found, *attention_backward(cuda, do, kept)), (o, *attention_backward(Backend(), wide[3], saved)), strict=True
    )
    assert all(distance(x, want) < 5e-3 for x, want in pairs)
    assert ("attention_fast_forward_64" in launched) == (scale > 0)


def test_how_warps_are_shared_out():
    """Whole groups where they fit, one head where R is prime and large; always whole stages of queries."""
    for (name, D), tiling in twins.TILINGS.items():
        for R in (1, 2, 3, 4, 7, 12):
            heads, tiles = tiling.queries(R)
            assert R % heads == 0 and tiles * tiling.rows % twins.STAGE == 0, (name, D, R)
            assert heads * tiles <= max(tiling.warps, twins.STAGE // tiling.rows)
    assert twins.Tiling(32, 6, 3).queries(3) == (3, 2) and twins.Tiling(32, 8, 2).queries(7) == (1, 8)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_block_takes_tile_after_tile(poisoned, monkeypatch, blocks):
    """Stages and barriers go on from one tile to the next; tiles have one to four tiles of keys."""
    if poisoned.device.target != "sm_90a":
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(twins, "HOPPER", {("forward", 64): 1})
    q, k, v, do = there(poisoned, draw((2, 350, 350, 2, 1, 64, 333), np.dtype("float16")))

    def found():
        o, saved = attention_forward(poisoned, q, k, v, 333)
        dq, lse2, delta = poisoned.xp.empty_like(q), *(poisoned.xp.empty((2, 2, 384), "float32") for _ in range(2))
        twins._backward_q_hopper(poisoned, do, q, k, v, o, saved[4], dq, lse2, delta, 333, 0.1)
        return [here(x) for x in (o, saved[4], dq, lse2, delta)]

    once = found()
    monkeypatch.setattr(twins, "MULTIPROCESSORS", blocks)
    for x, again in zip(once, found(), strict=True):
        assert np.isfinite(x).all() and (x == again).all()
    assert (once[3][..., 350:] == 0).all() and (once[4][..., 350:] == 0).all()


@pytest.mark.parametrize("kernel", twins.HOPPER_STAGES, ids=str)
def test_the_launcher_asks_for_the_shared_memory_that_the_hopper_kernels_lay_out(kernel):
    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    (name, D), (rows, stages) = kernel, twins.HOPPER_STAGES[kernel]
    stem = "attention_hopper" if name == "forward" else f"attention_hopper_{name}"
    arguments = f"{D}, {rows}, {stages}" if name == "forward" else f"{D}, {stages}"
    assert re.search(rf" {name}<{arguments}[,>]", kernels.assembled(stem))
    claim = f"static_assert(Memory<{arguments}>::BYTES == {twins._hopper_bytes(name, D)});\n"
    assert emulator.complaints(stem, "bfloat16", claim) == ""
