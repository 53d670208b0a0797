"""Milliseconds of GPU work, for the benches beside this file."""

import tempfile
from pathlib import Path

import cupy

from minisb import kernels
from minisb.kernels import element

ROUNDS = 20
AT_ONCE = "constexpr int AT_ONCE = {};"  # in some kernels: what a thread asks for before it waits


def milliseconds(call, rounds: int = ROUNDS) -> float:
    """Median time of what call() launches, with a cold cache.

    Before each call a large buffer is overwritten: that empties the cache as another layer's work would, and keeps the
    GPU busy while Python issues the launches, so that their cost is not counted.
    """
    other = cupy.empty(1 << 27, "float32")  # 512 MB
    times = []
    for i in range(rounds + 3):
        other.fill(i)
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return sorted(times[3:])[rounds // 2]


def torch_milliseconds(call, rounds: int = ROUNDS) -> float:
    """The same of what PyTorch launches."""
    import torch

    other = torch.empty(1 << 27, device="cuda")
    times = []
    for i in range(rounds + 5):  # the first ones compile
        other.fill_(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[5:])[rounds // 2]


def copy_rate() -> float:
    """GB/s, read and written."""
    big = cupy.zeros(1 << 28, "float32")
    other = cupy.empty_like(big)
    return 2 * big.nbytes / milliseconds(lambda: cupy.copyto(other, big)) / 1e6


def product_rate(be, dtype: str = "bfloat16") -> float:
    """TFLOP/s of a product of 8192 x 8192 x 8192, on random numbers."""
    a, b = (cupy.random.standard_normal((8192, 8192), dtype="float32").astype(element(dtype)) for _ in range(2))
    out = cupy.empty_like(a)
    return 2 * 8192**3 / milliseconds(lambda: be.gemm(a, b, out=out)) / 1e9


def at_once_kernel(gpu, stem: str, name: str, usual: int, at_once: int):
    """Kernel `name` of cuda/STEM.cu in bfloat16, with another AT_ONCE than the usual one."""
    text, default = kernels.assembled(stem), AT_ONCE.format(usual)
    assert default in text
    options = (*kernels.OPTIONS, f"--gpu-architecture={gpu.target}", "-DREAL_bfloat16")
    code, _ = gpu.compiler.compile(text.replace(default, AT_ONCE.format(at_once)), f"{stem}.cu", options)
    path = Path(tempfile.mkdtemp()) / "variant.cubin"
    path.write_bytes(code)
    return cupy.RawModule(path=str(path)).get_function(name)
