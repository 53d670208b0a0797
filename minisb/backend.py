"""What runs an operation: `numpy` (the readable reference), `cpu` (its Cython twins) or `cuda` (its kernels).

An operation is a function `name(be, ...)` in minisb/ops, decorated with `@op`.  The backend may
hold a compiled twin of the same name and signature; where it has none, the reference runs.
"""

from __future__ import annotations

import contextlib
import functools
import os

# NumPy's OpenBLAS and OpenMP each keep a pool of threads, and by default OpenMP's waiting threads
# spin long enough to take the cores from the other pool.  With the natives BLAS stays on one thread,
# so a short spin is safe, and spares waking a sleeping thread at each of a step's 200 parallel loops.
# Read once by the OpenMP runtime, so set before any native module is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np

from minisb import blas, native
from minisb.errors import MinisbError


def op(reference):
    """Make `reference(be, ...)` an operation: a native twin of the same name runs in its place."""
    name = reference.__name__

    @functools.wraps(reference)
    def run(be, *args, **kwargs):
        twin = be.natives.get(name)
        return (twin or reference)(be, *args, **kwargs)

    run.reference = reference
    return run


def on_host(x):
    """An array of any backend as a NumPy array."""
    return x.get() if hasattr(x, "get") else x


class Backend:
    """NumPy, and the interface of every backend.

    xp: the array module.  natives: operation name -> compiled (or a student's) function.
    checked: spikes refuse NaN and infinity with one clear sentence; MINISB_CHECK=1 turns it on.
    """

    name = "numpy"
    xp = np
    #: The head works on this many logits at a time: a slice stays in cache, and the logits of a
    #: whole batch never exist at once.
    head_logits = 1 << 21
    #: What --dtype auto means here.
    activations = "float32"

    def __init__(self, threads: int | None = None):
        self.threads = threads or default_threads()
        self.natives: dict = {}
        self.checked = os.environ.get("MINISB_CHECK", "0") not in ("", "0")
        blas.set_threads(self.threads)

    def use(self, name: str, function):
        """Swap in another implementation of one operation; lessons and tests do this."""
        self.natives[name] = function

    def recorded(self, function):
        """function(*arrays, **flags) as it is; on a GPU recorded after its first calls, then replayed (graph.py)."""
        return function

    def stream(self):
        """`with be.stream():` whatever is launched inside can be recorded; on a CPU there is nothing to do."""
        return contextlib.nullcontext()

    @staticmethod
    def wide(dtype):
        """The type of sums, states and rotary tables beside activations of `dtype`."""
        return np.dtype("float64" if dtype.itemsize == 8 else "float32")

    def gemm(self, a, b, out=None, ta=False, tb=False, accumulate=False):
        """op(a) @ op(b) for matrices, op = transpose where ta / tb; `out` is written or, with
        accumulate, added to.  The only matrix product of the hot path."""
        a = a.T if ta else a
        b = b.T if tb else b
        if out is None:
            return self.xp.matmul(a, b)
        if accumulate:
            out += self.xp.matmul(a, b)
        else:
            out[...] = self.xp.matmul(a, b)
        return out


class CpuBackend(Backend):
    """NumPy with Cython natives.  `select` is "all", "none" or a comma-separated list of modules."""

    name = "cpu"

    def __init__(self, threads: int | None = None, select: str = "all"):
        super().__init__(threads)
        modules = native.load(select)
        for module in modules.values():
            self.natives.update(module.TWINS)
        self.modules = sorted(modules)
        if "linear" in modules:
            # Our own gemm cuts a product into slices and gives one to each thread, so BLAS
            # itself stays on one: the slices depend on shapes only, hence equal bits.
            blas.set_threads(1)
            self.gemm = functools.partial(modules["linear"].gemm, self)
        blas.keep_freed_memory()


class CudaBackend(Backend):
    """CuPy with CUDA twins of the operations.  Where one is missing, the reference runs on CuPy's arrays.

    device: what launches kernels and multiplies matrices, a gpu.Gpu (or a stand-in for it in tests).
    select: "all", "none" or a comma-separated list of modules, as for CpuBackend.
    """

    name = "cuda"
    head_logits = 1 << 28  # a GPU wants large products

    def __init__(self, device, select: str = "all"):
        from minisb import gpu, launchers

        super().__init__()
        self.device, self.xp = device, device.xp
        self.modules = sorted(set(native.chosen(select, native.MODULES)) & set(launchers.MODULES))
        for module in self.modules:
            self.natives.update({twin.__name__: twin for twin in launchers.MODULES[module]})
        self.natives = gpu.named_ranges(device, self.natives)
        self.gemm, self.gemm_with = device.gemm, device.gemm_with
        # bfloat16 has the range of float32, and multiplies on tensor cores from this generation on.
        self.activations = "bfloat16" if int(device.target.strip("sm_a")) >= 80 else "float16"

    def recorded(self, function):
        return self.device.recorded(function)

    def stream(self):
        return self.device.stream()

    def launch(self, kernel: str, like, blocks, threads, *args, **options):
        """Run a kernel in its version for arrays of the dtype of `like`; see gpu.Launcher.launch."""
        self.device.launch(kernel, like.dtype, blocks, threads, *args, **options)


def default_threads() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def is_gpu(device: str) -> bool:
    """Whether choose takes a GPU for this --device."""
    from minisb import gpu

    return device == "cuda" or (device == "auto" and not gpu.why_not())


def choose(device: str = "auto", select: str = "all", threads: int | None = None) -> tuple[Backend, str]:
    """Pick a backend.  Returns it with the reason, one clause to print.

    "auto" takes a GPU if one can be used.  Raises MinisbError for a device that this machine lacks or for a
    thread count under 1.
    """
    from minisb import gpu

    if threads is not None and threads < 1:
        raise MinisbError(f"--threads must be at least 1, got {threads}.")
    if device not in ("auto", "cpu", "cuda"):
        raise MinisbError(f"unknown device {device!r}; choose from auto, cpu, cuda.")
    if is_gpu(device):
        be = CudaBackend(gpu.open_gpu(), select)
        return be, f"{be.device.describe()}, kernels: {', '.join(be.modules) or 'none, plain CuPy'}"
    # Worth a word only where somebody may wonder: a GPU is there, and something keeps us from using it.
    reason, mend = gpu.trouble()
    unused = f" (no GPU: {reason}; mend it with: {mend})" if device == "auto" and mend else ""
    if select == "none":
        return Backend(threads), f"NumPy only, as --native none asks{unused}"
    be = CpuBackend(threads, select)
    if not be.modules:
        return Backend(threads), f"NumPy only: {native.why_missing()}{unused}"
    return be, f"{be.threads} thread{'s' * (be.threads > 1)}, natives: {', '.join(be.modules)}{unused}"
