"""The CUDA kernels run on the CPU: compiled as C++ against emulator.h, launched like on a GPU.

Slow and faithful in logic only.  What needs a real GPU (races between warps, alignment, cuBLAS, speed) is
tested there, under the marker gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minisb import kernels
from minisb.backend import Backend, CudaBackend
from minisb.cache import atomic_write, cache_folder
from minisb.gpu import Launcher

HEADER = Path(__file__).with_name("emulator.h")
COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-fno-strict-aliasing")
NO_COMPILER = "no C++ compiler"


class Emulated(Launcher):
    """A gpu.Gpu in which arrays are NumPy's and every thread is a fiber."""

    xp = np
    target, shared_bytes = "sm_90a", 227 << 10
    log = None  # what is recorded goes here: functions and their arguments

    def load(self, stem: str, element: str) -> dict:
        path = _all_compiled(element).get(stem) or _compiled(stem, element, _header(element))
        library = ctypes.CDLL(str(path))
        return {
            name: functools.partial(_run, getattr(library, f"run_{name}"))
            for name, (where, _) in kernels.signatures().items()
            if where == stem
        }

    def recorded(self, function):
        return function

    def repeated(self, function):
        return Repeated(self, function)

    def launch(self, *args, **how):
        self._do(super().launch, *args, **how)

    def pinned(self, shape, dtype):
        return np.empty(shape, dtype)

    def upload(self, to, pinned):
        self._do(np.copyto, to, pinned)

    def download(self, pinned, array):
        self._do(np.copyto, pinned, array)

    def _do(self, function, *args, **how):
        function(*args, **how)
        if self.log is not None:
            self.log.append(functools.partial(function, *args, **how))

    def stream(self):
        return contextlib.nullcontext()

    def pointer(self, array):
        assert array is None or isinstance(array, np.ndarray)
        return ctypes.c_void_p(None if array is None else array.ctypes.data)

    def gemm(self, a, b, out=None, ta=False, tb=False, accumulate=False):
        """Sums in float32 at least, as cuBLAS has them."""
        if out is None:
            out = np.empty((a.shape[ta], b.shape[not tb]), a.dtype)
        self._do(self._gemm, a, b, out, ta, tb, accumulate)
        return out

    def _gemm(self, a, b, out, ta, tb, accumulate):
        if a.dtype.itemsize > 2:
            Backend.gemm(self, a, b, out, ta, tb, accumulate)
        else:
            product = Backend.gemm(self, a.astype("float32"), b.astype("float32"), None, ta, tb)
            out[...] = out + product if accumulate else product


class Repeated:
    """As graph.Repeated: what the second call launches, copies and multiplies is all that later calls do, in the same
    arrays.  What NumPy does between them is not recorded, and shows."""

    def __init__(self, device, function):
        self.device, self.function, self.warm, self.log = device, function, False, None

    def __call__(self):
        if self.log is not None:
            for call in self.log:
                call()
        elif not self.warm:
            self.function()
            self.warm = True
        else:
            self.log = self.device.log = []
            try:
                self.function()
            finally:
                self.device.log = None


def backend() -> CudaBackend:
    return CudaBackend(Emulated())


def there(be, arrays):
    """Host arrays in a dict, a list or alone -> the backend's own, always copies."""
    if isinstance(arrays, dict):
        return {name: there(be, a) for name, a in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return [there(be, a) for a in arrays]
    return be.xp.array(arrays)


def here(x):
    """As NumPy arrays."""
    if isinstance(x, dict):
        return {name: here(a) for name, a in x.items()}
    if isinstance(x, (list, tuple)):
        return [here(a) for a in x]
    return x.get() if hasattr(x, "get") else np.asarray(x)


def _run(function, blocks, threads, args, shared_mem=0):
    boxed = [arg if isinstance(arg, ctypes.c_void_p) else np.ctypeslib.as_ctypes(np.array(arg)) for arg in args]
    addresses = (ctypes.c_void_p * len(boxed))(*(ctypes.addressof(box) for box in boxed))
    function(addresses, *blocks, *threads)


@functools.cache
def _all_compiled(element: str) -> dict[str, Path]:
    """File stem -> shared library, of files with code for this type; two are compiled at a time."""
    stems = [stem for stem in kernels.files() if kernels.has_code(stem, element, Emulated.target)]
    folder = _header(element)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(stems, pool.map(lambda stem: _compiled(stem, element, folder), stems), strict=True))


def _header(element: str) -> Path:
    """A folder with emulator.h, compiled in advance: half of each file's time goes into the system's headers."""
    key = hashlib.sha256(f"{HEADER.read_text()}{element}{FLAGS}{COMPILER}".encode()).hexdigest()[:20]
    folder = cache_folder() / "emulator" / f"header-{key}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        shutil.copy(HEADER, partial)
        flags = [flag for flag in FLAGS if flag not in ("-x", "c++", "-shared")]
        command = [COMPILER, "-x", "c++-header", *flags, f"-DREAL_{element}", partial / HEADER.name]
        subprocess.run([*command, "-o", partial / f"{HEADER.name}.gch"], capture_output=True)  # without it, only slower
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _compiled(stem: str, element: str, folder: Path) -> Path:
    """One file as a shared library, in the cache under everything it depends on."""
    text = f'#include "{HEADER.name}"\n{kernels.assembled(stem)}\n#line 1 "wrappers"\n'
    text += "\n".join(_wrapper(name, p) for name, (where, p) in kernels.signatures().items() if where == stem)
    key = hashlib.sha256(f"{text}{HEADER.read_text()}{element}{FLAGS}".encode()).hexdigest()[:20]
    path = cache_folder() / "emulator" / f"{stem}-{element}-{key}.so"
    if not path.exists():
        with atomic_write(path) as temporary:
            command = [COMPILER, *FLAGS, f"-DREAL_{element}", "-I", folder, "-o", temporary, "-"]
            done = subprocess.run(command, input=text, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
    return path


def complaints(stem: str, element: str, claims: str) -> str:
    """What the compiler says of a file with static_asserts behind it; nothing if they hold."""
    text = f'#include "{HEADER.name}"\n{kernels.assembled(stem)}\n{claims}'
    command = [COMPILER, *FLAGS, f"-DREAL_{element}", "-I", _header(element), "-fsyntax-only", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True).stderr[:500]


def _wrapper(name: str, parameters) -> str:
    """A function that takes its arguments as CUDA's own launch does: an array of their addresses."""
    values = ", ".join(f"*({p.type}{'*' * p.array}*)a[{i}]" for i, p in enumerate(parameters))
    sizes = "unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz"
    return (
        f'extern "C" void run_{name}(void** a, {sizes}) {{\n'
        f"    emulator::launch([](void** a) {{ {name}({values}); }}, a, {{gx, gy, gz}}, {{bx, by, bz}});\n}}"
    )
