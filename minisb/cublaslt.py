"""A product that adds a bias to the rows it writes: cuBLASLt through ctypes, beside cublas.py.

That spares a launch and a pass over memory.  cuBLASLt is asked once for every form of product; its answer, a plan, can
be recorded, and gives equal bits in every run: one stream, one workspace, the same algorithm.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import suppress

from minisb import tuned
from minisb.cublas import WORKSPACE, library, step, type_code
from minisb.errors import MinisbError

# Numbers of cublasLt.h, the same in CUDA 12 and 13.
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS = 3, 4, 7, 8  # of a description
_PLAIN, _WITH_BIAS = 1, 4  # epilogues
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # of a preference; alignments of A, B, C and D
_COMPUTE_32F, _REAL_32F = 68, 0


class Answer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, whose 64 bytes are cuBLASLt's own, and what it takes."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class CublasLt:
    """plans: form of a product -> Plan, or None where cuBLASLt has no algorithm for it.

    choose(plan, launch): what a new plan's algorithm is to be, if not the first that cuBLASLt names (tuned.py).
    """

    def __init__(self, cublas, library):
        """cublas: a Cublas, whose handle is one for cuBLASLt too, and whose workspace serves both."""
        self.cublas, self.cupy, self.library = cublas, cublas.cupy, _declared(library)
        self.choose, self.plans, self._biases = None, {}, {}

    def gemm(self, a, b, out=None, ta=False, tb=False, accumulate=False):
        """Cublas.gemm by chosen algorithms."""
        if out is None:
            out = self.cupy.empty((a.shape[ta], b.shape[not tb]), a.dtype)
        if not self.gemm_with(a, b, out, ta, tb, accumulate):
            self.cublas.gemm(a, b, out, ta, tb, accumulate)
        return out

    def gemm_with(self, a, b, out, ta=False, tb=False, accumulate=False, bias=None) -> bool:
        """Cublas.gemm for bfloat16 and float16, and in its launch bias (J,) added to the first J columns of out.

        False if that cannot be, with nothing done.
        """
        if a.dtype.itemsize != 2 or not out.size or (bias is not None and bias.dtype != out.dtype):
            return False
        a, a_step, ta = self.cublas.rows(a, ta)
        b, b_step, tb = self.cublas.rows(b, tb)
        k, n = b.shape[::-1] if tb else b.shape
        if out.shape != (a.shape[ta], n) or a.shape[not ta] != k:
            return False  # gemm has words for it
        if bias is not None and bias.size < n:
            bias = self._with_zeros(bias, n)
        # cuBLASLt counts by columns: our rows are its columns, so it is asked for out^T = op(b)^T op(a)^T.
        arrays = (b, b_step, tb), (a, a_step, ta), (out, step(out), False)
        addresses = *(x.data.ptr for x, _, _ in arrays), bias.data.ptr if bias is not None else 0
        form = (
            (_PLAIN if bias is None else _WITH_BIAS, bool(accumulate), _alignment(addresses[3])),
            *((type_code(x.dtype), *x.shape, apart, bool(t), _alignment(x.data.ptr)) for x, apart, t in arrays),
        )
        if form not in self.plans:
            self.plans[form] = self._plan(form, addresses)
        plan = self.plans[form]
        if plan is None or plan.launch(addresses):
            self.plans[form] = None
            return False
        return True

    def _plan(self, form, addresses):
        """A Plan, or None."""
        plan = Plan(self, form)
        if plan.failed or not plan.ask(addresses[3], 1):
            return None
        if self.choose and not self.cupy.cuda.get_current_stream().is_capturing():
            self.choose(plan, addresses)
        return plan

    def _with_zeros(self, bias, n: int):
        """bias (J,) and zeros, (n,).  Layers share the place: a product is over when the next one's bias is copied.

        The copy is part of a recording, the zeros are older: what is recorded has run before.
        """
        key = bias.size, n, bias.dtype
        if key not in self._biases:
            self._biases[key] = self.cupy.zeros(n, bias.dtype)
        self._biases[key].data.copy_from_device_async(bias.data, bias.nbytes)
        return self._biases[key]


class Plan:
    """One form of product: its description and layouts, made once, and its algorithm.

    form: (epilogue, accumulate, alignment of the bias), then A, B and D as cuBLASLt sees them, each (type, our rows,
    our columns, elements from row to row, transposed, alignment).
    """

    def __init__(self, lt: CublasLt, form):
        self.lt, self.form, self.failed = lt, form, 0
        (epilogue, accumulate, _), *operands = form
        self.description = self._new("cublasLtMatmulDescCreate", _COMPUTE_32F, _REAL_32F)
        for attribute, value in (
            (_TRANSPOSE_A, operands[0][4]), (_TRANSPOSE_B, operands[1][4]), (_EPILOGUE, epilogue)
        ):  # fmt: skip
            self._set("cublasLtMatmulDescSetAttribute", self.description, attribute, ctypes.c_int(value))
        self.layouts = [
            self._new("cublasLtMatrixLayoutCreate", code, columns, rows, step)
            for code, rows, columns, step, _, _ in operands
        ]
        self.one, self.beta = ctypes.c_float(1), ctypes.c_float(accumulate)
        self.algorithm, self.bias = None, None

    def _new(self, create: str, *args):
        made = ctypes.c_void_p()
        self.failed |= getattr(self.lt.library, create)(ctypes.byref(made), *args)
        return made

    def _set(self, call: str, what, attribute: int, value):
        self.failed |= getattr(self.lt.library, call)(what, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def point(self, bias: int):
        """Set the address of the bias; layers differ in it."""
        if bias != self.bias:
            self._set("cublasLtMatmulDescSetAttribute", self.description, _BIAS, ctypes.c_void_p(bias))
            self.bias = bias

    def ask(self, bias: int, most: int) -> list[Answer]:
        """Up to `most` algorithms, the likely fastest first; the first becomes the plan's."""
        library, answers, found = self.lt.library, (Answer * most)(), ctypes.c_int(0)
        self.point(bias)  # how it is aligned matters
        preference = self._new("cublasLtMatmulPreferenceCreate")
        set_to = functools.partial(self._set, "cublasLtMatmulPreferenceSetAttribute", preference)
        set_to(_MOST_WORKSPACE, ctypes.c_uint64(WORKSPACE))
        a, b, d = (operand[5] for operand in self.form[1:])
        for attribute, alignment in zip(_ALIGNMENTS, (a, b, d, d), strict=True):
            set_to(attribute, ctypes.c_uint32(alignment))
        if not self.failed:
            self.failed = library.cublasLtMatmulAlgoGetHeuristic(
                self.lt.cublas.handle, self.description, *self.layouts, self.layouts[2], preference,
                most, answers, ctypes.byref(found),
            )  # fmt: skip
        library.cublasLtMatmulPreferenceDestroy(preference)
        usable = [] if self.failed else [answer for answer in answers[: found.value] if answer.status == 0]
        if usable:
            self.algorithm = usable[0].algorithm
        return usable

    def launch(self, addresses) -> int:
        """addresses: of A, B, D and the bias, 0 if there is none -> status, 0 if it went well."""
        a, b, d, bias = addresses
        self.point(bias)
        layout_a, layout_b, layout_d = self.layouts
        return self.lt.library.cublasLtMatmul(
            self.lt.cublas.handle, self.description, ctypes.byref(self.one), a, layout_a, b, layout_b,
            ctypes.byref(self.beta), d, layout_d, d, layout_d, ctypes.byref(self.algorithm),
            self.lt.cublas.workspace.ptr, WORKSPACE, self.lt.cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip


def beside(cublas) -> CublasLt | None:
    """cuBLASLt for a Cublas: a part of it, so missing only where an installation is broken."""
    with suppress(MinisbError, OSError, AttributeError):
        lt = CublasLt(cublas, library("cublasLt"))
        if tuned.asked_for():
            runtime = cublas.cupy.cuda.runtime
            name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
            lt.choose = tuned.Tuned(cublas.cupy, name, lt.library.cublasLtGetVersion()).choose
        return lt
    return None


def _declared(library):
    """The library, knowing what its functions take: ctypes would pass an address as an int of 32 bits."""
    number, size, place = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    for name, types in {
        "cublasLtMatmulDescCreate": [place, number, number],
        "cublasLtMatmulDescSetAttribute": [place, number, place, size],
        "cublasLtMatrixLayoutCreate": [place, number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
        "cublasLtMatmulPreferenceCreate": [place],
        "cublasLtMatmulPreferenceSetAttribute": [place, number, place, size],
        "cublasLtMatmulPreferenceDestroy": [place],
        "cublasLtMatmulAlgoGetHeuristic": [*7 * [place], number, place, place],
        "cublasLtMatmul": [*14 * [place], size, place],
    }.items():
        getattr(library, name).argtypes = types
    library.cublasLtGetVersion.restype = size
    return library


def _alignment(address: int) -> int:
    """The largest power of two that divides an address, up to 256, more than which no kernel asks for."""
    return min(address & -address, 256) if address else 0
