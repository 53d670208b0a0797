"""The GPU: which one there is or why none, checked launches of our kernels, and what memory is in use.

kernels.py turns source into machine code, this file machine code into launches, launchers/ an operation into
its launches; cublas.py is the matrix product.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import sys

import numpy as np

from minisb import kernels
from minisb.errors import MinisbError
from minisb.graph import Recorded, Repeated

#: Threads of a block where a kernel has no reason for another number.
THREADS = 256


class Launcher:
    """Launches of our kernels on arrays of `xp`, checked against what the sources declare.

    A kernel knows neither shape nor type of what it is given and would read on beyond the end, so
    arguments are checked here, once, against the parameters of the kernel's own source text.
    """

    xp = fused = None

    def __init__(self):
        self._ready = {}

    def load(self, stem: str, element: str) -> dict:
        """Kernel name -> function(blocks, threads, arguments) of one file.  A device fills this in."""
        raise NotImplementedError

    def pointer(self, array):
        """An array as a kernel takes it, after a look at where it lies; None is a null pointer."""
        raise NotImplementedError

    def launch(self, name: str, element, blocks, threads, *args, shared: int = 0):
        """Run kernel `name`, compiled for arrays of `element`, a dtype, with `shared` bytes of dynamic shared memory.

        blocks, threads: an int or a tuple of up to three.  args: arrays, None for a null pointer where
        the kernel allows it, numbers, and Rows(array) for a matrix whose rows are apart.
        Raises MinisbError for an argument that does not fit the declaration.
        """
        function, parameters = self._ready.get((name, element)) or self._prepare(name, element)
        if len(args) != len(parameters):
            raise MinisbError(f"kernel {name} takes {len(parameters)} arguments, not {len(args)}.")
        packed = [
            self._array(name, parameter, dtype, arg) if parameter.array else dtype(arg)
            for (parameter, dtype), arg in zip(parameters, args, strict=True)
        ]
        blocks, threads = _three(blocks), _three(threads)
        if not all(blocks):  # an empty array needs no block
            return
        if shared:
            function.max_dynamic_shared_size_bytes = shared  # beyond 48 KB only if asked for
            function(blocks, threads, packed, shared_mem=shared)
        else:
            function(blocks, threads, packed)

    def gemm_with(self, *args, **kwargs) -> bool:
        """A product with a bias in its launch, see cublaslt.py; False where that cannot be."""
        return bool(self.fused) and self.fused.gemm_with(*args, **kwargs)

    def _prepare(self, name: str, element):
        stem, _ = kernels.signatures()[name]
        functions = self.load(stem, element.name)
        for kernel, (its_stem, declared) in kernels.signatures().items():
            if its_stem == stem:
                typed = tuple((p, _dtype(p.type, element.name, p.array)) for p in declared)
                self._ready[kernel, element] = functions[kernel], typed
        return self._ready[name, element]

    def _array(self, kernel: str, parameter, dtype, array):
        if isinstance(array, Rows):
            array = array.matrix
        elif array is not None and not array.flags.c_contiguous:
            raise MinisbError(f"kernel {kernel}: {parameter.name} must be contiguous, its strides are {array.strides}.")
        if array is not None and array.dtype != dtype:
            raise MinisbError(f"kernel {kernel}: {parameter.name} must be {dtype}, not {array.dtype}.")
        return self.pointer(array)


class Rows:
    """A matrix whose rows lie `stride` elements apart, each row without gaps."""

    def __init__(self, matrix):
        self.matrix, self.stride = matrix, matrix.strides[0] // matrix.itemsize
        if matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize:
            raise MinisbError(f"a row must have no gaps, the matrix's strides are {matrix.strides}.")


def _three(size) -> tuple[int, int, int]:
    return (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)[:3]


@functools.cache
def _dtype(declared: str, element: str, array: bool):
    """What a declared type is for arrays of dtype `element`: a dtype, or for numbers a scalar type."""
    wide = "float64" if element == "float64" else "float32"
    found = {"real": element, "wide": wide, "int": "int32", "i64": "int64", "float": "float32", "double": "float64"}
    name = found.get(declared, declared)  # int8 and int16 are what they say
    return kernels.element(name) if array else np.dtype(name).type


class Gpu(Launcher):
    """One NVIDIA GPU through CuPy."""

    def __init__(self):
        import cupy

        from minisb import cublaslt
        from minisb.cublas import Cublas

        super().__init__()
        self.xp, self.cupy = cupy, cupy
        self.device = cupy.cuda.Device()
        self.compiler = kernels.CupyNvrtc()
        self.target = kernels.architecture(self.device.compute_capability, self.compiler.architectures())
        cublas = Cublas(cupy)
        self.gemm, self.fused = cublas.gemm, cublaslt.beside(cublas)
        if self.fused and self.fused.choose:
            self.gemm = self.fused.gemm
        self.shared_bytes = self.device.attributes["MaxSharedMemoryPerBlockOptin"]
        self._null = np.uintp(0)
        self._cubins = {}  # (file stem, element type) -> path
        self._families, self._element = set(), None  # those that are compiled; the type of the first kernel

    def load(self, stem: str, element: str) -> dict:
        """The first kernel of a family brings all its files that go with the process's element type: compiled side by
        side, they take little longer.  Whatever else is needed comes a file at a time."""
        family = kernels.family(stem)
        self._element = self._element or element
        if family not in self._families:
            self._families.add(family)
            self._compile(kernels.first_files(self._element, self.target, family))
        if (stem, element) not in self._cubins:
            self._compile([(stem, element)])
        module = self.cupy.RawModule(path=str(self._cubins[stem, element]))
        names = [name for name, (where, _) in kernels.signatures().items() if where == stem]
        return {name: module.get_function(name) for name in names}

    def _compile(self, wanted: list[tuple[str, str]]):
        self._cubins |= kernels.compile_files(self.compiler, wanted, self.target)

    def pointer(self, array):
        if array is None:
            return self._null
        if not isinstance(array, self.cupy.ndarray):
            raise MinisbError(f"a kernel was given a {type(array).__name__} that is not on the GPU.")
        if array.data.device_id != self.device.id:
            raise MinisbError(f"an array lies on GPU {array.data.device_id}, the kernel runs on GPU {self.device.id}.")
        return array

    def recorded(self, function):
        return Recorded(self.cupy, function)

    def repeated(self, function):
        return Repeated(self.cupy, function)

    def pinned(self, shape, dtype):
        """An empty array of the host that stays where it is, so that a recording can copy from it and to it."""
        dtype, count = np.dtype(dtype), math.prod(shape)
        memory = self.cupy.cuda.alloc_pinned_memory(count * dtype.itemsize)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def upload(self, to, pinned):
        """Begin to copy from a pinned array to one of the GPU, of as many bytes."""
        self._copy(to.data.ptr, pinned.ctypes.data, to.nbytes, "memcpyHostToDevice")

    def download(self, pinned, array):
        """The other way."""
        self._copy(pinned.ctypes.data, array.data.ptr, array.nbytes, "memcpyDeviceToHost")

    def _copy(self, to: int, source: int, size: int, kind: str):
        """CuPy's arrays refuse to copy while a graph is recorded, as memory that is not pinned could not be."""
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(to, source, size, getattr(runtime, kind), self.cupy.cuda.get_current_stream().ptr)

    @contextlib.contextmanager
    def stream(self):
        """A stream of its own: the one that everybody shares cannot be recorded."""
        self.device.synchronize()
        with self.cupy.cuda.Stream(non_blocking=True) as stream:
            yield
            stream.synchronize()

    def describe(self) -> str:
        """Name, memory, architecture and CUDA version, for people."""
        name = self.cupy.cuda.runtime.getDeviceProperties(self.device.id)["name"].decode()
        cuda = ".".join(map(str, self.compiler.version))
        return f"{name}, {self.device.mem_info[1] / 2**30:.0f} GiB, {self.target}, CUDA {cuda}"

    def memory(self) -> dict[str, int]:
        """Bytes: held by arrays, kept by CuPy's pool for later ones, free and in all on the device."""
        pool = self.cupy.get_default_memory_pool()
        free, total = self.device.mem_info
        return {"used": pool.used_bytes(), "pool": pool.total_bytes(), "free": free, "total": total}

    @contextlib.contextmanager
    def range(self, name: str):
        """A named stretch in NVIDIA's profilers."""
        self.cupy.cuda.nvtx.RangePush(name)
        try:
            yield
        finally:
            self.cupy.cuda.nvtx.RangePop()


def named_ranges(gpu: Gpu, natives: dict) -> dict:
    """With $MINISB_NVTX set, every operation shows up in a profile under its own name."""
    if not os.environ.get("MINISB_NVTX"):
        return natives

    def wrap(name, twin):
        @functools.wraps(twin)
        def run(*args, **kwargs):
            with gpu.range(name):
                return twin(*args, **kwargs)

        return run

    return {name: wrap(name, twin) for name, twin in natives.items()}


# --- is there one, and if not, why


def driver() -> tuple[int, int] | None:
    """(CUDA version that the driver knows, as 13000 for 13.0; number of GPUs), or None without a driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return version.value, count.value


def installed() -> dict[str, str]:
    """CuPy's wheels: name -> version.  More than one hide each other."""
    found = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name == "cupy" or name.startswith("cupy-cuda")}


def wheel_for(version: int) -> str:
    """The CuPy to install for a driver, with the CUDA libraries that it needs beside it."""
    return "cupy-cuda13x[ctk]" if version >= 13000 else "cupy-cuda12x[ctk]"


@functools.cache
def trouble() -> tuple[str, str]:
    """Why no GPU can be used, and the one command that mends it; ("", "") if one can.

    The command is empty where no command helps: there is no NVIDIA GPU.
    """
    found = driver()
    if found is None:
        return "there is no NVIDIA driver", ""
    version, count = found
    if not count:
        return "the NVIDIA driver sees no GPU", ""
    return _cupy_trouble(version, installed(), _import_cupy)


def _cupy_trouble(version: int, wheels: dict[str, str], load) -> tuple[str, str]:
    """version: of the driver.  wheels: as installed() has them.  load() imports CuPy and its libraries."""
    fitting = wheel_for(version)
    install = f'pip install "{fitting}"'
    if not wheels:
        return "CuPy is not installed", install
    replace = f"pip uninstall -y {' '.join(wheels)} && {install}"
    if len(wheels) > 1:
        return f"{' and '.join(wheels)} are both installed and overwrite each other", replace
    (name,) = wheels
    if name == "cupy-cuda13x" and version < 13000:
        known = f"{version // 1000}.{version % 1000 // 10}"
        return f"{name} needs a driver for CUDA 13, this one knows CUDA {known}", replace
    try:
        load()
    except Exception as error:  # a broken install can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "nvrtc" in reason.lower() or "cublas" in reason.lower():
            return f"{name} finds no CUDA libraries ({reason})", install
        return f"{name} cannot be loaded ({reason})", replace
    return "", ""


def _import_cupy():
    import cupy
    from cupy.cuda import nvrtc

    nvrtc.getVersion()
    cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.device.get_cublas_handle()


def why_not() -> str:
    """One clause why there is no GPU to use, or "" if there is one.  Quick where nothing hints at a GPU."""
    return trouble()[0]


@functools.cache
def open_gpu() -> Gpu:
    """The process's GPU.  Raises MinisbError with the reason and the remedy if there is none."""
    reason, mend = trouble()
    if reason:
        raise MinisbError(f"no GPU to use: {reason}; " + (f"mend it with: {mend}" if mend else "use --device cpu."))
    return Gpu()
