"""Products by cuBLASLt: our calls, made out by a stand-in that multiplies as the documentation says; and on a GPU."""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import backend_of
from emulator import here

from minisb import cublaslt, tuned
from minisb.cublas import WORKSPACE, Cublas
from minisb.cublaslt import CublasLt
from minisb.gradcheck import relative_rms
from minisb.kernels import element
from minisb.ops.linear import linear_backward, linear_forward

HALVES = ["float16", "bfloat16"]
CODES = {0: "float32", 2: "float16", 14: "bfloat16"}
EPILOGUES = {1: "plain", 4: "bias"}


def half(name: str):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return element(name)


class Array(np.ndarray):
    """A NumPy array that says where it lies as CuPy's do."""

    @property
    def data(self):
        place = SimpleNamespace(ptr=self.ctypes.data)
        place.copy_from_device_async = lambda source, size: ctypes.memmove(place.ptr, source.ptr, size)
        return place


def array(x, dtype=None):
    return np.array(x, dtype).view(Array)


class Library:
    """cuBLASLt for arrays of the host: matrices by columns, D = op(A) op(B) + beta D, sums in float32.

    calls: what was called.  found: how many algorithms the heuristic returns.  status: what a product returns.
    """

    def __init__(self, found: int = 3, status: int = 0):
        self.calls, self.things, self.found, self.status = [], {}, found, status
        self.preferences, self.launched = [], []

        def method(name):
            def call(*args):
                self.calls.append(name)
                return getattr(self, "_" + name)(*args)

            return call

        for name in ("DescCreate", "PreferenceCreate", "PreferenceDestroy", "AlgoGetHeuristic"):
            setattr(self, f"cublasLtMatmul{name}", method(name))
        for name in ("Desc", "Preference"):
            setattr(self, f"cublasLtMatmul{name}SetAttribute", method("SetAttribute"))
        self.cublasLtMatrixLayoutCreate, self.cublasLtMatmul = method("LayoutCreate"), method("Matmul")
        self.cublasLtGetVersion = lambda: 130000
        self.cublasLtGetVersion.restype = None

    def _made(self, place, thing):
        place._obj.value = 1000 + len(self.things)
        self.things[place._obj.value] = thing
        return 0

    def _DescCreate(self, place, compute, scale):
        assert (compute, scale) == (68, 0)  # sums and factors in float32
        return self._made(place, {})

    def _PreferenceCreate(self, place):
        self.preferences.append({})
        return self._made(place, self.preferences[-1])

    def _PreferenceDestroy(self, preference):
        del self.things[preference.value]
        return 0

    def _LayoutCreate(self, place, code, rows, columns, leading):
        assert leading >= rows
        return self._made(place, (element(CODES[code]), rows, columns, leading))

    def _SetAttribute(self, thing, attribute, place, size):
        assert (
            ctypes.sizeof(place._obj)
            == size
            == (8 if isinstance(place._obj, (ctypes.c_void_p, ctypes.c_uint64)) else 4)
        )
        self.things[thing.value][attribute] = place._obj.value
        return 0

    def _AlgoGetHeuristic(self, handle, description, a, b, c, d, preference, most, answers, found):
        assert self.things[preference.value][1] == WORKSPACE and c.value == d.value
        found._obj.value = min(most, self.found)
        for i in range(found._obj.value):
            answers[i].algorithm[0], answers[i].status = 70 + i, 0
        return 0 if self.found else 15

    def _Matmul(self, handle, description, alpha, a, la, b, lb, beta, c, lc, d, ld, algorithm, space, size, stream):
        assert (c, lc.value, stream, space, size) == (d, ld.value, 7, 99, WORKSPACE) and alpha._obj.value == 1
        if self.status:
            return self.status
        how = self.things[description.value]
        self.launched.append(list(algorithm._obj)[0])
        A, B, D = self._columns(a, la), self._columns(b, lb), self._columns(d, ld)
        A, B = A.T if how[3] else A, B.T if how[4] else B
        total = A.astype(np.float32) @ B.astype(np.float32)
        if EPILOGUES[how[7]] == "bias":
            total += self._memory(how[8], D.dtype, len(D))[:, None]
        D[:] = total + beta._obj.value * D if beta._obj.value else total
        return 0

    def _columns(self, address, layout):
        dtype, rows, columns, leading = self.things[layout.value]
        flat = self._memory(address, dtype, leading * (columns - 1) + rows)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, leading * dtype.itemsize))

    @staticmethod
    def _memory(address, dtype, count):
        return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)


def stand_in(library, capturing=False):
    stream = SimpleNamespace(ptr=7, is_capturing=lambda: capturing)
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    cupy = SimpleNamespace(cuda=cuda, zeros=lambda n, dtype: array(np.zeros(n), dtype), empty=None)
    cublas = SimpleNamespace(cupy=cupy, handle=ctypes.c_void_p(5), workspace=SimpleNamespace(ptr=99), fell_back=[])
    cublas.rows = lambda x, transposed: Cublas.rows(cublas, x, transposed)
    return CublasLt(cublas, library)


def drawn(rng, rows, columns, dtype, gap=0, transposed=False):
    """A matrix whose rows may be apart, or the same memory seen by columns."""
    shape = (columns, rows) if transposed else (rows, columns)
    wide = array(rng.standard_normal((shape[0], shape[1] + gap)), dtype)
    found = wide[:, gap // 2 : gap // 2 + shape[1]]
    return found.T if transposed else found


def wanted(a, b, ta, tb):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return (a.T if ta else a) @ (b.T if tb else b)


pairings = pytest.mark.parametrize("ta, tb", [(False, False), (False, True), (True, False), (True, True)])
SHAPES = [(1, 1, 1), (7, 11, 5), (1, 30, 33), (65, 3, 12)]


@pytest.mark.parametrize("name", HALVES)
@pairings
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("gap", [0, 6])
def test_products(name, ta, tb, m, n, k, gap):
    rng, lt, dtype = np.random.default_rng(0), stand_in(Library()), half(name)
    a, b = drawn(rng, *((k, m) if ta else (m, k)), dtype, gap), drawn(rng, *((n, k) if tb else (k, n)), dtype, gap)
    want = wanted(a, b, ta, tb)
    wide = array(np.full((m, n + gap), 3), np.float32)
    out = wide[:, :n]
    assert lt.gemm_with(a, b, out, ta, tb)
    assert relative_rms(out, want) < 1e-5
    assert lt.gemm_with(a, b, out, ta, tb, accumulate=True)
    assert relative_rms(out, 2 * want) < 1e-5
    views = a.T, b.T  # whose columns have no gaps
    assert lt.gemm_with(*views, out, not ta, not tb)
    assert relative_rms(out, want) < 1e-5
    for count in {1, n // 2, n} - {0}:
        half_out, bias = array(np.empty((m, n)), dtype), array(rng.standard_normal(count), dtype)
        assert lt.gemm_with(a, b, half_out, ta, tb, bias=bias)
        biased = want.copy()
        biased[:, :count] += bias.astype(np.float64)
        assert relative_rms(half_out, biased) < (1e-3 if name == "float16" else 8e-3)
    assert (wide[:, n:] == 3).all()


def test_a_form_is_planned_once_and_each_bias_is_its_own():
    rng, library, dtype = np.random.default_rng(0), Library(), np.dtype("float16")
    lt, x, w = stand_in(library), drawn(rng, 6, 4, dtype), drawn(rng, 5, 4, dtype)
    together = array(np.arange(64), dtype)
    y = array(np.empty((6, 5)), dtype)
    for bias in (together[:5], together[32:37], together[:5]):
        assert lt.gemm_with(x, w, y, tb=True, bias=bias)
        assert relative_rms(y, wanted(x, w, False, True) + bias) < 1e-3
    assert library.calls.count("Matmul") == 3 and library.launched == [70, 70, 70]
    asked = library.calls.count("AlgoGetHeuristic")
    alignments = {cublaslt._alignment(bias.data.ptr) for bias in (together[:5], together[32:37])}
    assert asked == len(alignments)
    lt.gemm_with(x, w, y, tb=True)
    assert library.calls.count("AlgoGetHeuristic") == asked + 1


def test_the_heuristic_is_told_how_arrays_are_aligned():
    library, dtype = Library(), np.dtype("float16")
    lt, memory = stand_in(library), array(np.zeros(4096), dtype)
    first = (-memory.data.ptr % 512) // 2  # elements up to a round address
    a, b, out = (memory[first + at : first + at + 16].reshape(4, 4) for at in (0, 256 + 8, 512 + 4))
    assert lt.gemm_with(a, b, out)
    # A of cuBLASLt is our second matrix; C is D.
    assert [library.preferences[0][attribute] for attribute in (5, 6, 7, 8)] == [16, 256, 8, 8]


@pytest.mark.parametrize("library", [Library(found=0), Library(status=14)], ids=["no algorithm", "refused"])
def test_what_cannot_be_is_left_to_others(library):
    lt, dtype = stand_in(library), np.dtype("float16")
    a, out = array(np.ones((4, 4)), dtype), array(np.full((4, 4), 7), dtype)
    for _ in range(2):
        assert lt.gemm_with(a, a, out, bias=a[0]) is False
    assert (out == 7).all() and library.calls.count("AlgoGetHeuristic") == 1
    lt.cublas.gemm = lambda *args: args[2].fill(9)
    assert (lt.gemm(a, a, out) == 9).all()


def test_other_types_and_shapes_are_left_to_others():
    library = Library()
    lt, a, wide = stand_in(library), array(np.ones((4, 4)), "float16"), array(np.ones((4, 4)), "float32")
    assert not lt.gemm_with(wide, wide, wide)
    assert not lt.gemm_with(a, a, a.copy(), bias=wide[0])  # a bias of another type than what is written
    assert not lt.gemm_with(a, a[:, :3], a.copy())
    assert not lt.gemm_with(a, a[:3], a.copy())
    assert not lt.gemm_with(a, a[:, :0], a[:, :0])
    assert "Matmul" not in library.calls


def test_projections_use_it_and_do_without(monkeypatch, cuda):
    """linear_forward's twin with a product that takes a bias, and with one that refuses."""
    rng, asked = np.random.default_rng(0), []
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 7), (11, 7), (4,)))
    want = linear_forward(backend_of("numpy"), x, w, b)
    for able in (True, False):

        def gemm_with(a, b, out, ta=False, tb=False, accumulate=False, bias=None, able=able):
            asked.append(bias.shape)
            if able:
                cuda.gemm(a, b, out=out, ta=ta, tb=tb, accumulate=accumulate)
                out[:, : bias.size] += bias
            return able

        monkeypatch.setattr(cuda, "gemm_with", gemm_with)
        assert relative_rms(here(linear_forward(cuda, *map(cuda.xp.asarray, (x, w, b)))), want) < 1e-5
    assert asked == [b.shape] * 2


# --- measured choices


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """make(times, **how) -> CublasLt whose algorithms 70, 71, ... take `times`, and its library."""
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path))

    def make(times, capturing=False):
        library = Library(found=len(times))
        lt = stand_in(library, capturing)
        lt.cupy.cuda.Memory = lambda size: SimpleNamespace(ptr=1)
        lt.cupy.cuda.memory = SimpleNamespace(OutOfMemoryError=MemoryError)
        choices = tuned.Tuned(lt.cupy, "a GPU", 13)
        choices.milliseconds = lambda plan, answer, addresses: times[answer.algorithm[0] - 70]
        lt.choose = choices.choose
        return lt, library

    return make


ONES = array(np.ones((3, 4, 4)), "float16")  # at one place: how arrays are aligned is part of a form


def multiply(lt, library) -> int:
    """-> the algorithm that was used."""
    assert lt.gemm_with(*ONES)
    return library.launched[-1]


def test_the_fastest_is_kept_on_disk_and_used_from_there(measured, tmp_path):
    assert multiply(*measured([3.0, 1.0, 2.0])) == 71
    (path,) = tmp_path.glob("products/*.json")
    assert "a-GPU" in path.name and "13" in path.name
    assert next(iter(json.loads(path.read_text()).values()))[0] == 71
    assert multiply(*measured([1.0, 2.0, 3.0])) == 71  # not measured again: a run that goes on has the same bits
    path.write_text("{ damaged")
    assert multiply(*measured([3.0, 2.0, 1.0])) == 72


def test_little_gain_no_change(measured):
    assert multiply(*measured([1.0, 0.99])) == 70


def test_nothing_is_measured_while_recording(measured, tmp_path):
    assert multiply(*measured([3.0, 1.0], capturing=True)) == 70
    assert not list(tmp_path.iterdir())


def test_a_choice_that_cannot_be_kept_is_not_made(measured, tmp_path):
    (tmp_path / "products").write_text("in the way")
    assert multiply(*measured([3.0, 1.0])) == 70


# --- on a GPU

gpu = pytest.mark.gpu


@pytest.fixture
def device():
    from minisb.gpu import open_gpu

    device = open_gpu()
    assert device.fused is not None
    return device


@gpu
@pytest.mark.parametrize("name", HALVES)
@pairings
@pytest.mark.parametrize("m, n, k", [*SHAPES, (600, 264, 72), (256, 128, 512)])
@pytest.mark.parametrize("gap", [0, 16])
def test_products_on_a_gpu(device, name, ta, tb, m, n, k, gap):
    if name == "bfloat16" and int(device.target.strip("sm_a")) < 80:
        pytest.skip("bfloat16 needs sm_80")
    rng, xp, dtype = np.random.default_rng(0), device.xp, half(name)
    limit = 1e-3 if name == "float16" else 8e-3

    def there(rows, columns, gap):
        wide = xp.asarray(rng.standard_normal((rows, columns + gap)), "float32").astype(dtype)
        return wide[:, gap // 2 : gap // 2 + columns]

    a, b = there(*((k, m) if ta else (m, k)), gap), there(*((n, k) if tb else (k, n)), gap)
    want = wanted(here(a), here(b), ta, tb)
    wide = xp.full((m, n + gap), 3, "float32")
    out = wide[:, :n]
    done = device.gemm_with(a, b, out, ta, tb)
    if k >= 16 and gap == 0 and n % 8 == 0:
        assert done  # for small odd forms there may be no algorithm
    if done:
        assert relative_rms(here(out), want) < 1e-5
        assert device.gemm_with(a, b, out, ta, tb, accumulate=True)
        assert relative_rms(here(out), 2 * want) < 1e-5
    for count in {1, n // 2, n} - {0}:
        y, bias = there(m, n, gap), there(1, count, 0)[0]
        before = here(y).copy()
        biased = want.copy()
        biased[:, :count] += here(bias).astype(np.float64)
        if device.gemm_with(a, b, y, ta, tb, bias=bias):
            assert relative_rms(here(y), biased) < limit
        else:
            assert (here(y) == before).all()
    assert (here(wide)[:, n:] == 3).all()


@gpu
def test_a_projection_is_recorded_with_equal_bits(device):
    """Forward with a bias over fewer columns, and backward, step by step and replayed."""
    from minisb.backend import CudaBackend

    be, xp, rng = CudaBackend(device), device.xp, np.random.default_rng(0)
    dtype = half(be.activations)
    x, w, b, dy = (
        xp.asarray(rng.standard_normal(s), "float32").astype(dtype) for s in ((512, 64), (80, 64), (64,), (512, 80))
    )

    def work(x, dy):
        dw, db = xp.zeros(w.shape, "float32"), xp.zeros(b.shape, "float32")
        y = linear_forward(be, x, w, b)
        return y, linear_backward(be, dy, x, w, dw, db), dw, db

    with be.stream():
        want = [here(found).copy() for found in work(x, dy)]
        run = be.recorded(work)
        for _ in range(4):
            found = run(x, dy)
        replayed = [here(array).copy() for array in found]
    product = here(x).astype(np.float64) @ here(w).astype(np.float64).T
    product[:, :64] += here(b).astype(np.float64)
    assert relative_rms(replayed[0], product) < 8e-3
    assert relative_rms(replayed[3], here(dy).astype(np.float64)[:, :64].sum(0)) < 1e-3
    for got, expected in zip(replayed, want, strict=True):
        assert got.tobytes() == expected.tobytes()
    assert device.fused.plans


@gpu
def test_measured_choices_on_a_gpu(device, monkeypatch, tmp_path):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path))
    monkeypatch.setenv("MINISB_TUNE", "1")
    cupy, rng = device.xp, np.random.default_rng(0)
    a, b = (cupy.asarray(rng.standard_normal((512, 256)), "float32").astype("float16") for _ in range(2))
    found = []
    for _ in range(2):
        lt = cublaslt.beside(Cublas(cupy))
        out = lt.gemm(a, b, tb=True)
        assert relative_rms(here(out), wanted(here(a), here(b), False, True)) < 1e-3
        found.append(here(out).tobytes())
    assert found[0] == found[1] and len(list(tmp_path.glob("products/*.json"))) == 1
