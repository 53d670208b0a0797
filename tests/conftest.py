"""Tests run on this checkout, on two threads, and end with the number of gradient checks."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisb import backend, gradcheck  # noqa: E402

backend.default_threads = lambda: 2

NO_GPU = "not run: no GPU"
NO_NATIVES = "natives not compiled"


@functools.cache
def has_gpu() -> bool:
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # no CuPy, no driver, no device: all the same to a test
        return False


@functools.cache
def backends() -> dict:
    """name -> backend; "cpu" is there only if at least one native is compiled."""
    made = {"numpy": backend.Backend(2), "cpu": backend.CpuBackend(2)}
    return made if made["cpu"].natives else {"numpy": made["numpy"]}


def backend_of(name: str, *ops: str):
    """The backend of that name; skips the test if `ops` (or the module of gemm, linear) are not compiled."""
    be = backends().get(name)
    if be is None or (name == "cpu" and ops and not any(op in be.natives or op in be.modules for op in ops)):
        pytest.skip(NO_NATIVES)
    return be


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["numpy", "cpu"])
def be(request):
    return backend_of(request.param)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request):
    """A CudaBackend, on a GPU or on the emulator."""
    import emulator

    if request.param == "cuda":
        from minisb.gpu import open_gpu

        return backend.CudaBackend(open_gpu())
    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    return emulator.backend()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip(NO_GPU)


def pytest_terminal_summary(terminalreporter):
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_GPU, NO_NATIVES):
        count = sum(reason in text for text in skipped)
        if count:
            terminalreporter.write_line(f"{count} tests skipped: {reason}")
    terminalreporter.write_line(f"{gradcheck.ran} gradient checks ran")
