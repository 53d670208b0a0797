"""Launches that do not fit are refused, and a GPU that cannot be used gets a reason and a remedy."""

import emulator
import numpy as np
import pytest

from minisb import backend, gpu
from minisb.errors import MinisbError
from minisb.gpu import Rows


@pytest.fixture
def launch():
    """Launches of norm.cu's kernel, with arguments that fit unless they are replaced."""
    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    device = emulator.Emulated()
    x, w = np.ones((3, 8), np.float32), np.full(8, 2, np.float32)
    fitting = {
        "x": x,
        "delta": None,
        "w": w,
        "z": None,
        "y": np.empty_like(x),
        "rstd": np.empty((3, 1), np.float32),
        "rows": 3,
        "C": 8,
        "eps": 0.0,
    }

    def run(**changes):
        args = {**fitting, **changes}
        device.launch("rmsnorm_forward", np.dtype("float32"), 1, 128, *args.values())
        return args["y"]

    return run


def test_a_launch_that_fits(launch):
    assert (launch() == 2).all()


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"x": np.ones((3, 8))}, "x must be float32, not float64"),
        ({"rstd": np.ones((3, 1))}, "rstd must be float32"),
        ({"x": np.ones((8, 3), np.float32).T}, "x must be contiguous"),
        ({"w": np.ones(16, np.float32)[::2]}, "w must be contiguous"),
        ({"one_more": 1}, "takes 9 arguments, not 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_launch_that_does_not_fit(launch, changes, complaint):
    with pytest.raises(MinisbError, match=complaint):
        launch(**changes)


def test_nothing_to_do_is_no_launch(launch):
    y = np.full((3, 8), 7, np.float32)
    device = emulator.Emulated()
    w, rstd = y[0].copy(), np.empty((3, 1), np.float32)
    device.launch("rmsnorm_forward", y.dtype, 0, 128, y, None, w, None, y, rstd, 0, 8, 0.0)
    assert (y == 7).all()


def test_rows_apart_but_without_gaps():
    wide = np.zeros((4, 20), np.float32)
    assert Rows(wide[:, 3:9]).stride == 20
    with pytest.raises(MinisbError, match="no gaps"):
        Rows(wide[:, ::2])


# --- is there a GPU, and why not


def works():
    pass


def breaks(text):
    def load():
        raise RuntimeError(text)

    return load


@pytest.mark.parametrize(
    "version, wheels, load, reason, mend",
    [
        (13000, {"cupy-cuda13x": "14"}, works, "", ""),
        (13010, {"cupy-cuda12x": "14"}, works, "", ""),  # a driver runs what was built for older ones
        (13000, {}, works, "not installed", 'pip install "cupy-cuda13x[ctk]"'),
        (12040, {}, works, "not installed", 'pip install "cupy-cuda12x[ctk]"'),
        (12040, {"cupy-cuda13x": "14"}, works, "needs a driver for CUDA 13, this one knows CUDA 12.4",
         'pip uninstall -y cupy-cuda13x && pip install "cupy-cuda12x[ctk]"'),
        (13000, {"cupy-cuda12x": "13", "cupy-cuda13x": "14"}, works, "both installed",
         'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x[ctk]"'),
        (13000, {"cupy-cuda13x": "14"}, breaks("libnvrtc.so.13: cannot open shared object file"),
         "finds no CUDA libraries", 'pip install "cupy-cuda13x[ctk]"'),
        (13000, {"cupy": "14"}, breaks("undefined symbol"), "cannot be loaded (undefined symbol)",
         'pip uninstall -y cupy && pip install "cupy-cuda13x[ctk]"'),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu_and_what_mends_it(version, wheels, load, reason, mend):
    found = gpu._cupy_trouble(version, wheels, load)
    assert reason in found[0] and bool(reason) == bool(found[0]) and found[1] == mend


@pytest.fixture
def trouble(monkeypatch):
    def set_to(reason, mend):
        monkeypatch.setattr(gpu, "trouble", lambda: (reason, mend))
        gpu.open_gpu.cache_clear()

    yield set_to
    gpu.open_gpu.cache_clear()


def test_auto_takes_the_cpu_and_says_why_only_if_a_gpu_is_there(trouble):
    trouble("there is no NVIDIA driver", "")
    be, why = backend.choose("auto")
    assert be.name in ("cpu", "numpy") and "GPU" not in why
    trouble("CuPy is not installed", "pip install it")
    assert "no GPU: CuPy is not installed; mend it with: pip install it" in backend.choose("auto")[1]
    assert "GPU" not in backend.choose("cpu")[1]


def test_asking_for_a_gpu_that_is_not_there(trouble):
    trouble("CuPy is not installed", "pip install it")
    with pytest.raises(MinisbError, match="CuPy is not installed; mend it with: pip install it"):
        backend.choose("cuda")
    trouble("there is no NVIDIA driver", "")
    with pytest.raises(MinisbError, match="no NVIDIA driver; use --device cpu"):
        backend.choose("cuda")


@pytest.mark.gpu
def test_auto_takes_the_gpu():
    be, why = backend.choose("auto")
    assert be.name == "cuda" and "sm_" in why and "gla" in be.modules
    assert backend.choose("cuda", "gla,norm")[0].modules == ["gla", "norm"]
    assert backend.choose("cuda", "none")[0].natives == {}
    with pytest.raises(MinisbError, match="unknown native"):
        backend.choose("cuda", "nonsense")


@pytest.mark.gpu
def test_arrays_of_the_host_are_refused():
    be, _ = backend.choose("cuda")
    with pytest.raises(MinisbError, match="not on the GPU"):
        be.launch("gla_decay", np.ones(3, np.float32), 1, 32, np.ones(3, np.float32), np.ones(3, np.float32), 3)


@pytest.mark.parametrize(
    "reason, flags, want",
    [
        ("", [], "small"),
        ("", ["--device", "cpu"], "nano"),
        ("there is no NVIDIA driver", [], "nano"),
        ("", ["--preset", "nano"], "nano"),
    ],
)
def test_a_gpu_trains_a_larger_model_unless_told(monkeypatch, reason, flags, want):
    import train_small

    monkeypatch.setattr(gpu, "trouble", lambda: (reason, ""))
    _, config, _ = train_small.new_run(train_small.parser().parse_args(flags))
    assert config.preset == want
