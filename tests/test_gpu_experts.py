"""The 76B's kernels against the reference, and the whole layout on the CUDA backend: on a GPU and in emulation."""

import importlib
import json
from dataclasses import replace

import emulator
import numpy as np
import op_checks
import pytest
import tiny_run
from conftest import backends
from emulator import here, there
from moe_cases import CASES
from test_gpu_model import model_of

from minisb import cli, kernels
from minisb.__main__ import main as minisb_main
from minisb.config import preset
from minisb.experts import Loads
from minisb.gradcheck import relative_rms
from minisb.launchers import experts as twins
from minisb.model import SpikingBrain, specs
from minisb.ops import moe
from minisb.ops.adamw import grad_norm
from minisb.ops.sinks import sinks_state_backward
from minisb.optim import update
from minisb.params import ParamStore
from minisb.train import TrainSettings

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# --- every operation, as test_gpu_ops.py has them


def test_every_operation_has_a_kernel(cuda):
    assert {name for case in CASES for name in case.natives} <= set(cuda.natives)


@every_case
@pytest.mark.parametrize("T", [1, 9, 65])
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_kernels_equal_the_reference(case, T, dtype, limit, cuda):
    op_checks.equals_the_reference(case, T, dtype, limit, cuda)


@every_case
@pytest.mark.parametrize("forward_by_kernels", [True, False], ids=["kernels-reference", "reference-kernels"])
def test_what_is_saved_belongs_to_the_operation(case, forward_by_kernels, cuda):
    op_checks.what_is_saved_belongs_to_the_operation(case, 33, cuda, forward_by_kernels)


@every_case
@pytest.mark.parametrize("T", [1, 33])
def test_gradient_along_a_random_direction(case, T, cuda):
    op_checks.gradient_along_a_random_direction(case, T, cuda)


@every_case
def test_all_memory_is_written_and_bits_repeat(case, cuda, monkeypatch):
    op_checks.all_memory_is_written_and_bits_repeat(case, 33, cuda, monkeypatch, others=99)


# --- what is particular to each -----------------------------------------------------------------


def test_of_equal_experts_the_first_is_chosen(cuda):
    logits = np.array([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [3, 1, 1, 1, 1], [-np.inf, 1, -np.inf, -np.inf, 1]])
    _, experts, *_ = moe.router_forward(cuda, there(cuda, logits), 3)
    assert here(experts).tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2], [1, 4, 0]]


def test_a_token_that_is_not_finite_still_has_experts_and_shows(cuda):
    logits = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    logits[1, 65] = np.nan
    gates, experts, p, lse, _ = here(moe.router_forward(cuda, there(cuda, logits), 70)[:4]) + [None]
    assert (
        np.isnan(p).all(1).tolist() == np.isnan(lse).tolist() == np.isnan(gates).all(1).tolist() == [False, True, False]
    )
    assert (np.sort(experts) == np.arange(70)).all()
    assert (experts[[0, 2]] == np.argsort(-logits, kind="stable")[[0, 2]]).all()


@pytest.mark.parametrize("tile, capacity", [(1, None), (4, None), (64, 5), (1, 1)])
@pytest.mark.parametrize("N, E, K", [(1, 1, 1), (23, 5, 2), (700, 33, 3)])
def test_the_plan_is_the_references(cuda, N, E, K, tile, capacity):
    experts = np.argsort(np.random.default_rng(0).random((N, E)) * np.arange(1, E + 1), axis=1)[:, :K]
    got = moe.dispatch_plan(cuda, there(cuda, experts), E, tile, capacity)
    want = moe.dispatch_plan(backends()["numpy"], experts, E, tile, capacity)
    for name in ("row", "token", "offsets"):
        assert (here(getattr(got, name)) == getattr(want, name)).all(), name
    assert (here(moe.load(cuda, there(cuda, experts), E)) == moe.load(backends()["numpy"], experts, E)).all()


@pytest.mark.parametrize("N, E", [(1, 2), (300, 40)])
def test_losses_of_the_router(cuda, N, E):
    rng, be = np.random.default_rng(0), backends()["numpy"]
    p, lse, counts = rng.random((N, E)), rng.standard_normal(N), rng.integers(1, 9, E)
    for got, want in (
        (moe.balance_loss(cuda, *there(cuda, [p, counts]), 0.7), moe.balance_loss(be, p, counts, 0.7)),
        (moe.z_loss(cuda, there(cuda, lse), 0.3), moe.z_loss(be, lse, 0.3)),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(here(a), b, rtol=1e-12)


#: Rows of each expert, rows of the buffer, O, I.  More than one tile in every direction, experts without rows.
PRODUCTS = [
    ((0, 70, 0, 3, 129, 0), 230, 24, 136), ((1,), 1, 8, 8), ((0, 0), 5, 8, 16), ((64, 65), 129, 130, 40),
]  # fmt: skip


def products(be, counts, R, O, I, arrays):
    """Forward into columns of a wider array, dx added and not, dw added."""
    x, w, dy, dx, dw = there(be, arrays)
    offsets = there(be, np.cumsum([0, *counts]))
    wide = be.xp.full((R, O + 16), 7, x.dtype)
    y = moe.grouped_forward(be, x, w, offsets, wide[:, 8:-8]).copy()
    assert (here(wide)[:, :8] == 7).all() and (here(wide)[:, -8:] == 7).all()
    wide[:, 8:-8] = dy
    plain = moe.grouped_backward(be, wide[:, 8:-8], x, w, offsets, there(be, arrays[4]))
    moe.grouped_backward(be, dy, x, w, offsets, dw, dx)
    return here([y, moe.grouped_forward(be, x, w, offsets), plain, dx, dw])


def on_hopper(monkeypatch, cuda, hopper):
    """Products by cuda/moe_hopper.cu where they fit, or by nothing of Hopper's own."""
    if hopper and cuda.device.target != "sm_90a":
        pytest.skip("not a Hopper GPU")
    if not hopper:
        monkeypatch.setattr(twins, "HOPPER", None)


def operands(counts, R, O, I, dtype, wide):
    """x, w, dy, dx, dw"""
    rng = np.random.default_rng(0)
    shapes = (R, I), (len(counts), O, I), (R, O), (R, I), (len(counts), O, I)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return [*arrays[:4], arrays[4].astype(wide)]


def agree(cuda, case, element):
    """What kernels give against float64 from the same rounded inputs."""
    counts, R, O, I = case
    arrays = operands(*case, kernels.element(element), "float64" if element == "float64" else "float32")
    exact = products(backends()["numpy"], counts, R, O, I, [a.astype(np.float64) for a in arrays])
    got = products(cuda, counts, R, O, I, arrays)
    for one, want in zip(got, exact, strict=True):
        error = np.linalg.norm(one.astype(np.float64) - want) / max(np.linalg.norm(want), 1)
        assert error < (1e-13 if element == "float64" else 4e-3 if element == "bfloat16" else 5e-4)
    return got


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize(
    "element, hopper", [("float64", False), *((half, hopper) for half in kernels.HALVES for hopper in (False, True))]
)
def test_one_product_per_expert(cuda, monkeypatch, launched, element, hopper, case):
    """Halves on tensor cores, where widths allow it."""
    if element == "bfloat16":
        pytest.importorskip("ml_dtypes")
    on_hopper(monkeypatch, cuda, hopper)
    agree(cuda, case, element)
    assert all(name.startswith("grouped_hopper") for name in launched) == (hopper and case[2] % 8 == 0)


#: Rows of each expert, rows of the buffer, O, I: depths of more slices than there are stages and of part of one, more
#: tiles than one in both directions, last tiles with rows for both halves and for one.
DEEP = [((130, 7, 0, 230), 400, 136, 264), ((64,), 64, 264, 392)]


@pytest.mark.parametrize("case", DEEP, ids=str)
def test_hopper_blocks_share_tiles_out_as_they_like(cuda, monkeypatch, case):
    """One block walks all tiles, several cut the last ones in two, on a GPU many have one each: equal bits."""
    on_hopper(monkeypatch, cuda, True)
    found = []
    for blocks in (1, 4) if cuda.xp is np else (1, 4, 132):
        monkeypatch.setattr(twins, "MULTIPROCESSORS", blocks)
        found.append(agree(cuda, case, "float16"))
    for once, *others in zip(*found, strict=True):
        assert all((once == other).all() for other in others)


@pytest.mark.parametrize("hopper", [False, True], ids=["mma", "wgmma"])
def test_an_expert_neither_reads_nor_writes_its_neighbours_rows(cuda, monkeypatch, hopper):
    on_hopper(monkeypatch, cuda, hopper)
    counts = 3, 70, 5
    x, w, dy, dx, dw = operands(counts, 78, 24, 40, np.float16, "float32")
    x[:3] = dy[:3] = x[-5:] = dy[-5:] = np.nan
    y, dx, _, dw = products(cuda, counts, 78, 24, 40, [x, w, dy, dx, dw])[1:]
    of_others = np.array([True] * 3 + [False] * 70 + [True] * 5)
    for rows in (y, dx):
        assert (np.isnan(rows).all(1) == of_others).all() and (np.isfinite(rows).all(1) == ~of_others).all()
    assert (np.isfinite(dw).all((1, 2)) == [False, True, False]).all()


def test_the_launcher_knows_what_the_hopper_kernels_take():
    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    how = twins.HOPPER
    assert kernels.assembled("moe_hopper").count(f"__launch_bounds__({how.threads}, 1) grouped_hopper") == 3
    claims = f"Memory::BYTES + 4 * 7 == {how.shared(7)}", f"ROWS == {how.rows}", f"COLUMNS == {how.columns}"
    claims += (f"CONSUMERS + PRODUCERS == {how.threads}",)
    assert emulator.complaints("moe_hopper", "bfloat16", "".join(f"static_assert({c});\n" for c in claims)) == ""


@pytest.fixture
def launched(monkeypatch, cuda):
    """The names of the kernels that ran."""
    names, launch = [], cuda.device.launch
    monkeypatch.setattr(cuda.device, "launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k)))
    return names


@pytest.mark.parametrize("hopper", [False, True], ids=["mma", "wgmma"])
def test_the_fast_products_are_taken_where_they_fit(cuda, monkeypatch, launched, hopper):
    on_hopper(monkeypatch, cuda, hopper)
    for O, I, half in ((8, 16, True), (8, 12, True), (8, 16, False)):
        x, w = (there(cuda, np.ones(shape, np.float16 if half else np.float32)) for shape in ((3, I), (1, O, I)))
        moe.grouped_forward(cuda, x, w, there(cuda, np.array([0, 3])))
    fast = "grouped_hopper_forward" if hopper else "grouped_fast_forward"
    assert launched == [fast, "grouped_forward", "grouped_forward"]


def test_the_state_that_sinks_left_gets_every_sequences_gradient(cuda):
    d = np.random.default_rng(0).standard_normal((5, 2, 6, 6))
    got = sinks_state_backward(cuda, there(cuda, d))
    np.testing.assert_allclose(here(got), d.sum(0, keepdims=True), rtol=1e-12)


# --- the whole layout ---------------------------------------------------------------------------

TINY = preset("76b-tiny", vocab=37, window=8)


class Natives(dict):
    """A backend's twins, and the names of operations that have none and were wanted."""

    def __init__(self, natives):
        super().__init__(natives)
        self.missed = set()

    def get(self, name, default=None):
        if name not in self:
            self.missed.add(name)
        return super().get(name, default)


def texts(be, config, B=2, T=21):
    tokens = np.random.default_rng(2).integers(0, config.vocab, (B, T))
    return be.xp.asarray(tokens[:, :-1]), be.xp.asarray(tokens[:, 1:])


def one_step(be, config, dtype, spike):
    """-> the loss of a step, its gradient and the weights after it."""
    model = model_of(config, be, dtype, noise=0.1)
    loss = model.loss_and_backward(*texts(be, config), spike)
    update(be, model.store, 1, 1e-3, grad_norm(be, model.store.flat_g), TrainSettings())
    return float(loss), here(model.store.flat_g), here(model.store.flat_p)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_projections": True, "gate": "low_rank", "gate_rank": 3},
        {"top_k": 2, "shared_experts": 0, "capacity": 0.75},
    ],
    ids=lambda changes: ",".join(changes) or "76b",
)
def test_a_training_step_is_the_cpus_and_every_operation_has_its_kernel(cuda, changes, monkeypatch):
    config = replace(TINY, **changes)
    monkeypatch.setattr(cuda, "natives", Natives(cuda.natives))
    for dtype, limit, spike in ((np.float32, 1e-5, False), (np.float64, 1e-10, True)):
        want, got = (one_step(be, config, dtype, spike) for be in (backends()["numpy"], cuda))
        assert got[0] == pytest.approx(want[0], rel=limit)
        assert relative_rms(got[1], want[1]) < limit and relative_rms(got[2], want[2]) < limit
    assert cuda.natives.missed <= {"ffn_forward", "ffn_backward"}  # which are made of others


def test_prefill_and_steps_are_the_cpus(cuda):
    tokens, _ = texts(cuda, TINY, T=25)
    want = here(model_of(TINY, backends()["numpy"], np.float64, noise=0.1).forward(here(tokens)))
    model = model_of(TINY, cuda, np.float64, noise=0.1)
    assert relative_rms(here(model.forward(tokens)), want) < 1e-11
    state = model.new_state(2)
    assert relative_rms(here(model.prefill(tokens[:, :9], state)), want[:, 8]) < 1e-11
    for t in range(9, 24):
        assert relative_rms(here(model.step(tokens[:, t], state)), want[:, t]) < 1e-11, t


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_halves_follow_float32(cuda, name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    want = model_of(TINY, backends()["numpy"])
    store = ParamStore(specs(TINY), cuda.xp, optimizer=True, activations=kernels.element(name))
    store.initialise(0)
    got = SpikingBrain(TINY, cuda, store)
    loss = want.loss_and_backward(*texts(backends()["numpy"], TINY))
    assert float(got.loss_and_backward(*texts(cuda, TINY), scale=64.0)) == pytest.approx(float(loss), rel=3e-3)
    assert relative_rms(here(store.flat_g) / 64, want.store.flat_g) < (0.1 if name == "bfloat16" else 0.02)


def test_the_log_of_a_step_reads_the_loads(cuda):
    loads, model = Loads(), model_of(TINY, cuda, noise=0.1)
    model.loss_and_backward(*texts(cuda, TINY), tap=loads)
    record = loads.record()
    assert record["dropped"] == 0 and 0 < record["router_entropy"] < 1.4
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in record["expert_load"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["on", "off"])
def test_the_scripts_on_a_gpu(tmp_path, capsys, monkeypatch, graph):
    """Training, sampling, the meter; then quantised, and sampling again."""
    scripts(tmp_path, capsys, monkeypatch, "cuda", "--graph", graph)


def scripts(tmp_path, capsys, monkeypatch, device, *flags):
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    text, run = tiny_run.write_text(tmp_path / "text"), str(tmp_path / "run")
    train, sample = importlib.import_module("train_small"), importlib.import_module("sample")
    where = ["--device", device]
    arguments = ["--preset", "76b-tiny", "--data", str(text), "--steps", "12", "--out", run, *where, *flags]
    assert cli.run(train.main, arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["device"] == device and 0 < result["val_loss"] < 7 and 0 < result["sparsity"] < 1
    assert cli.run(sample.main, [run, "--tokens", "5", "--spike", *where]) == 0
    capsys.readouterr()
    assert minisb_main(["spikes", run, "--tokens", "200", "--k", "3", "--json", *where]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["by_k"][0]["loss"] < 7
    assert minisb_main(["quantize", run, "--out", f"{run}-int8", "--texts", "4"]) == 0
    assert cli.run(sample.main, [f"{run}-int8", "--tokens", "5", "--quantized", *where]) == 0
