"""The whole model on the CUDA backend: gradients, decoding, training, the scripts, cuBLAS, recording."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from conftest import backends
from emulator import here
from test_model import TINY, batch

from minisb import cli
from minisb.backend import Backend, CudaBackend
from minisb.data import TokenData
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain, specs
from minisb.ops.adamw import grad_norm
from minisb.ops.spike import spike_forward
from minisb.optim import update
from minisb.params import ParamStore
from minisb.train import Trainer, TrainSettings

gpu = pytest.mark.gpu


@pytest.fixture
def device():
    from minisb.gpu import open_gpu

    return open_gpu()


def model_of(config, be, dtype=np.float32, noise=0.0):
    model = SpikingBrain(config, be, ParamStore(specs(config), be.xp, dtype, optimizer=True))
    model.store.initialise(0)
    shake = noise * np.random.default_rng(1).standard_normal(model.store.size)
    model.store.flat_p += be.xp.asarray(shake.astype(dtype))
    return model


@pytest.mark.parametrize("spike", [False, True, ("k", "up")], ids=str)
@pytest.mark.parametrize("kernels", ["all", "none"])
def test_loss_and_gradient_of_the_whole_model(cuda, spike, kernels):
    """With all kernels, and with none: then the reference runs on the backend's own arrays."""
    be = CudaBackend(cuda.device, kernels)
    tokens, targets = batch(TINY)
    expected, model = (model_of(TINY, b, np.float64, noise=0.1) for b in (backends()["numpy"], be))
    want = expected.loss_and_backward(tokens, targets, spike)
    tokens, targets = be.xp.asarray(tokens), be.xp.asarray(targets)
    got = model.loss_and_backward(tokens, targets, spike)
    assert float(got) == pytest.approx(float(want), rel=1e-11)
    assert float(model.loss(tokens, targets, spike)) == pytest.approx(float(want), rel=1e-11)
    assert relative_rms(here(model.store.flat_g), expected.store.flat_g) < 1e-10


@pytest.mark.parametrize("kernels", ["all", "none"])
def test_a_text_in_pieces_and_token_by_token(cuda, kernels):
    be = CudaBackend(cuda.device, kernels)
    tokens, _ = batch(TINY)
    want = model_of(TINY, backends()["numpy"], np.float64, noise=0.1).forward(tokens)
    model, tokens = model_of(TINY, be, np.float64, noise=0.1), be.xp.asarray(tokens)
    assert relative_rms(here(model.forward(tokens)), want) < 1e-12
    state = model.new_state(2)
    assert relative_rms(here(model.prefill(tokens[:, :9], state)), want[:, 8]) < 1e-12
    assert relative_rms(here(model.prefill(tokens[:, 9:15], state)), want[:, 14]) < 1e-12
    for t in range(15, 23):
        assert relative_rms(here(model.step(tokens[:, t], state)), want[:, t]) < 1e-12


def curve(be, config, steps, lr):
    """Losses of `steps` updates, in float mode."""
    model, settings = model_of(config, be), TrainSettings()
    rng, losses = np.random.default_rng(0), []
    text = rng.integers(0, config.vocab, 400) // 2  # something to learn: half of the tokens never come
    for step in range(1, steps + 1):
        starts = rng.integers(0, 300, config.batch_size)
        x, y = (be.xp.asarray(np.stack([text[s + d : s + d + config.seq_len] for s in starts])) for d in (0, 1))
        model.store.zero_grad()
        losses.append(float(model.loss_and_backward(x, y)))
        update(be, model.store, step, lr, grad_norm(be, model.store.flat_g), settings)
    return np.array(losses)


def test_training_follows_the_cpu(cuda):
    """float32 without TF32.  At a higher rate a difference of one bit would grow by itself."""
    steps = 3 if cuda.xp is np else 50
    config = replace(tiny_run.Tiny(), layers=3, mixers=("gla", "window", "full"))
    want, got = (curve(be, config, steps, 1e-3) for be in (backends()["numpy"], cuda))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert steps < 50 or got[-1] < got[0] - 0.1


def test_the_trainer_reads_the_gpu_only_where_it_logs(cuda, tmp_path):
    config = replace(tiny_run.Tiny(), steps=4)
    settings = TrainSettings(log_every=4, eval_every=4, spike_from=0.5)
    rng = np.random.default_rng(0)
    data = TokenData(rng.integers(0, 300, 900, np.uint16), rng.integers(0, 300, 40, np.uint16), 900, 40)
    logs, read = [], []
    for be in (Backend(2), cuda):
        folder = tmp_path / be.name
        folder.mkdir()
        trainer = Trainer(folder, model_of(config, be), settings, data)
        check = trainer._check_finite
        trainer._check_finite = lambda check=check, **values: (read.append(values), check(**values))
        assert trainer.run()
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    assert [sorted(values) for values in read] == 4 * [["gradient", "loss"]] + [["validation_loss"]] + 2 * [
        ["gradient", "loss"]
    ] + [["validation_loss"]]
    for want, got in zip(*logs, strict=True):
        for name in ("step", "loss", "grad_norm", "val_loss", "val_loss_spike", "sparsity"):
            assert (name in got) == (name in want)
            assert name not in got or got[name] == pytest.approx(want[name], rel=2e-3), name


@gpu
def test_the_scripts_on_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    text = tiny_run.write_text(tmp_path / "text")
    train, sample = importlib.import_module("train_small"), importlib.import_module("sample")
    folder = tmp_path / "run"
    flags = ["--preset", "tiny", "--data", str(text), "--out", str(folder), "--device", "cuda"]
    assert cli.run(train.main, flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["device"] == "cuda" and result["val_loss"] < 6 and "gla" in result["native"]
    assert cli.run(sample.main, [str(folder), "--device", "cuda", "--tokens", "5", "--spike"]) == 0
    on_gpu = capsys.readouterr().out
    assert cli.run(sample.main, [str(folder), "--device", "cpu", "--tokens", "5", "--temperature", "0"]) == 0
    assert on_gpu
    assert cli.run(train.main, ["--resume", str(folder), "--device", "cuda"]) == 0


# --- cuBLAS, streams, recording


@gpu
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 11, 5), (1, 300, 33), (300, 1, 33), (65, 3, 129), (600, 33, 70)])
def test_gemm(device, dtype, limit, ta, tb, m, n, k):
    xp, rng = device.xp, np.random.default_rng(0)
    a, b = rng.standard_normal((k, m) if ta else (m, k)), rng.standard_normal((n, k) if tb else (k, n))
    a, b = a.astype(dtype), b.astype(dtype)
    want = (a.T if ta else a).astype(np.float64) @ (b.T if tb else b)
    A, B = xp.asarray(a), xp.asarray(b)
    assert relative_rms(device.gemm(A, B, ta=ta, tb=tb).get(), want) < limit
    wide = xp.full((m, n + 5), 7, dtype)
    out = wide[:, 2 : 2 + n]
    assert device.gemm(A, B, out=out, ta=ta, tb=tb) is out
    device.gemm(A.T, B.T, out=out, ta=not ta, tb=not tb, accumulate=True)  # views whose columns have no gaps
    assert relative_rms(out.get(), 2 * want) < limit
    assert (wide.get()[:, :2] == 7).all() and (wide.get()[:, 2 + n :] == 7).all()


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gemm_of_halves_with_sums_in_float32(device, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    xp, rng = device.xp, np.random.default_rng(0)
    a, b = (xp.asarray(rng.standard_normal(s), "float32").astype(dtype) for s in ((65, 33), (33, 17)))
    want = a.astype("float64").get() @ b.astype("float64").get()
    out = xp.zeros((65, 17), "float32")
    for _ in range(2):
        device.gemm(a, b, out=out, accumulate=True)
    assert relative_rms(out.get(), 2 * want) < 1e-5
    assert relative_rms(device.gemm(a, b).astype("float64").get(), want) < 5e-3


@gpu
def test_a_product_and_a_kernel_are_recorded_and_replayed(device):
    be, xp = CudaBackend(device), device.xp
    x, w = xp.ones((64, 32), "float32"), xp.full((16, 32), 0.5, "float32")
    y, z, vth = xp.empty((64, 16), "float32"), xp.empty((64, 16), "float32"), xp.empty((64, 1), "float32")

    def work():
        be.gemm(x, w, out=y, tb=True)
        be.launch("spike_forward", y, 16, 128, y, z, vth, 64, 16, 3.0, 1e-5, 1e4)

    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        work()
        stream.synchronize()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        x *= 3
        graph.launch(stream)
        stream.synchronize()
        want = spike_forward(backends()["numpy"], here(x) @ here(w).T, 3.0)
    assert relative_rms(here(z), want[0]) < 1e-6 and relative_rms(here(vth), want[1]) < 1e-6


@gpu
def test_memory_and_description(device):
    before = device.memory()["used"]
    held = device.xp.zeros(1 << 20)
    assert device.memory()["used"] - before >= held.nbytes
    assert device.target in device.describe()
