"""The matrix product on a GPU: cuBLAS through ctypes, with a handle and a workspace of our own.

CuPy refuses cuBLAS calls while a stream is being recorded, and allocates inside them.  Called like this
a product can be recorded into a graph, and gives equal bits in every run: one stream, one workspace.
"""

from __future__ import annotations

import ctypes
import functools

from minisb.errors import MinisbError

_NO, _TRANSPOSE = 0, 1
_CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # CUDA_R_32F, ...
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_TF32 = 68, 70, 77
_DEFAULT_ALGORITHM = -1
WORKSPACE = 32 << 20  # bytes; what NVIDIA asks for on Hopper, ample elsewhere


def library(name: str = "cublas") -> ctypes.CDLL:
    """The cuBLAS that CuPy uses, or its cublasLt: already loaded, so the bare name finds it."""
    from cupy.cuda import device

    device.get_cublas_handle()  # loads it
    major = _cuda_major()
    for file in (f"lib{name}.so.{major}", f"{name}64_{major}.dll"):
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    try:  # CuPy's wheels know where pip put it
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib(name).abs_path)
    except Exception as error:
        raise MinisbError('cuBLAS was not found: pip install "cupy-cuda13x[ctk]" brings it.') from error


def _cuda_major() -> int:
    from cupy.cuda import runtime

    return runtime.runtimeGetVersion() // 1000


class Cublas:
    """tf32: let float32 products round their inputs to 10 bits, several times faster; off, because then
    a run on a GPU no longer follows one on a CPU."""

    def __init__(self, cupy, tf32: bool = False):
        self.cupy, self.tf32 = cupy, tf32
        self.library = library()
        self.handle = ctypes.c_void_p()
        self._check(self.library.cublasCreate_v2(ctypes.byref(self.handle)), "cublasCreate")
        self._gemm = self.library.cublasGemmEx
        number, pointer = ctypes.c_int, ctypes.c_void_p
        operand = [pointer, number, number]  # where, its type, elements from row to row
        self._gemm.argtypes = (
            [pointer] + 5 * [number] + [pointer, *operand, *operand, pointer, *operand, number, number]
        )
        self.workspace = cupy.cuda.alloc(WORKSPACE)
        self.stream = None
        # 1 and 0 in the type that sums have; index: whether that is double
        self._factors = [
            [ctypes.byref(number(factor)) for factor in (1, 0)] for number in (ctypes.c_float, ctypes.c_double)
        ]

    def gemm(self, a, b, out=None, ta=False, tb=False, accumulate=False):
        """op(a) @ op(b) for matrices whose rows may be apart; see Backend.gemm.

        float64 in and out; else float32, bfloat16 or float16 in (a and b alike), and any of these out,
        float32 for weight gradients; sums are float32, or float64.
        """
        (m, k), (k_b, n) = _shape(a, ta), _shape(b, tb)
        if k != k_b:
            raise MinisbError(f"matrices {a.shape} and {b.shape} cannot be multiplied (ta={ta}, tb={tb}).")
        if out is None:
            out = self.cupy.empty((m, n), a.dtype)
        if out.shape != (m, n):
            raise MinisbError(f"the product is {(m, n)}, out is {out.shape}.")
        if not out.size:
            return out
        a, a_step, ta = self.rows(a, ta)
        b, b_step, tb = self.rows(b, tb)
        double = a.dtype.itemsize == 8
        one, zero = self._factors[double]
        compute = _COMPUTE_64F if double else _COMPUTE_TF32 if self.tf32 else _COMPUTE_32F
        self._use_current_stream()
        # cuBLAS counts by columns: our rows are its columns, so it is asked for out^T = op(b)^T op(a)^T.
        status = self._gemm(
            self.handle, _TRANSPOSE if tb else _NO, _TRANSPOSE if ta else _NO, n, m, k, one,
            b.data.ptr, type_code(b.dtype), b_step, a.data.ptr, type_code(a.dtype), a_step, one if accumulate else zero,
            out.data.ptr, type_code(out.dtype), step(out), compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        self._check(status, "cublasGemmEx")
        return out

    def rows(self, x, transposed):
        """x as a matrix whose rows have no gaps, the elements between rows, and the transposition left."""
        if x.shape[1] == 1 or x.strides[1] == x.itemsize:
            return x, step(x), transposed
        if x.strides[0] == x.itemsize:  # a transposed view: its columns have no gaps
            return x.T, step(x.T), not transposed
        x = self.cupy.ascontiguousarray(x)
        return x, x.shape[1], transposed

    def _use_current_stream(self):
        """Setting a stream takes the workspace away, so both are set when the stream changes."""
        stream = self.cupy.cuda.get_current_stream().ptr
        if stream != self.stream:
            self._check(self.library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)), "cublasSetStream")
            memory = ctypes.c_void_p(self.workspace.ptr)
            status = self.library.cublasSetWorkspace_v2(self.handle, memory, ctypes.c_size_t(WORKSPACE))
            self._check(status, "cublasSetWorkspace")
            self.stream = stream

    @staticmethod
    def _check(status: int, call: str):
        if status:
            raise MinisbError(f"{call} failed with cuBLAS status {status}.")


@functools.cache
def type_code(dtype) -> int:
    """cudaDataType."""
    return _CODES[dtype.name]


def _shape(x, transposed):
    return x.shape[::-1] if transposed else x.shape


def step(x) -> int:
    """Elements from one row to the next; any number does for a single row, if it is not too small."""
    return max(x.strides[0] // x.itemsize, x.shape[1]) if x.shape[0] > 1 else x.shape[1]
