"""bench/gpu_train.py and its profile, tiny and in emulation: what is added up, and that nothing stays behind."""

import importlib
import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import NO_GPU, has_gpu
from test_model import TINY

from minisb import kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
gpu_train = importlib.import_module("gpu_train")
gpu_profile = importlib.import_module("gpu_profile")
gpu_ops = importlib.import_module("gpu_ops")


class Clock:
    """Stands in for cupy.cuda: every event is a millisecond after the one before."""

    now = 0

    class Event:
        def record(self):
            Clock.now += 1
            self.at = Clock.now

        def synchronize(self):
            pass

    @staticmethod
    def get_elapsed_time(start, end):
        return float(end.at - start.at)


def emulated():
    import emulator

    if emulator.COMPILER is None:
        pytest.skip(emulator.NO_COMPILER)
    return emulator.backend()


def test_a_profile_sees_every_launch_and_leaves_the_backend_as_it_was():
    be = emulated()
    step = gpu_train.Step(replace(TINY, seq_len=8, batch_size=2), be, "float32")
    launched, products = [], []
    launch, gemm = be.device.launch, be.gemm
    be.device.launch = lambda name, *rest, **options: (launched.append(name), launch(name, *rest, **options))
    be.gemm = counting = lambda *args, **how: (products.append(args), gemm(*args, **how))[1]
    natives = be.natives
    with gpu_profile.Profile(be, step.model, Clock) as profile:
        step(spiking=True)
    assert be.natives is natives and be.gemm is counting and "launch" not in vars(be)
    assert not set(gpu_profile.PHASES) & set(vars(step.model))
    kernels = profile.groups(lambda r: {"name": r.name, "product": bool(r.flops)})
    assert {g.name: g.calls for g in kernels if not g.product} == {n: launched.count(n) for n in launched}
    assert sum(g.calls for g in kernels if g.product) == len(products) > 0
    assert sum(g.ms for g in kernels) == len(launched) + len(products)  # a millisecond each
    assert sum(ms for ms, _, _ in profile.gaps()) == len(profile.records) - 1
    assert {g.what for g in profile.groups(lambda r: {"what": r.phase})} == {"forward", "head", "backward", "optimiser"}
    by_op = {(g.op, g.name) for g in profile.groups(lambda r: {"op": r.op, "name": r.name})}
    assert {("swiglu_forward", "swiglu_forward"), ("adamw", "adamw")} <= by_op


def test_bytes_and_operations_of_a_profile():
    be = emulated()
    step = gpu_train.Step(replace(TINY, seq_len=8, batch_size=2), be, "float32")
    with gpu_profile.Profile(be, step.model, Clock) as profile:
        step()
    store, c = step.model.store, step.model.config
    (adamw,) = (r for r in profile.records if r.name == "adamw")
    assert adamw.bytes == 7 * store.flat_p.nbytes  # p, m, v twice, g once; no copy in float32, the scale has no axes
    (loss,) = (r for r in profile.records if r.name == "cross_entropy")
    assert loss.bytes == 4 * (2 * 8 * (2 * c.vocab + 2) + 1)  # logits twice, targets, losses, a factor
    rows, letters = 2 * 8, re.compile(r"gemm (\d+) x (\d+) x (\d+) (\w\w) -> (\w+)( \+=)?")
    head = [r for r in profile.records if r.flops and r.phase == "head"]
    found = [letters.fullmatch(r.name).groups() for r in head]
    V, C = str(c.vocab), str(c.width)
    assert found == [
        (str(rows), V, C, "NT", "float32", None),
        (str(rows), C, V, "NN", "float32", None),
        (V, C, str(rows), "TN", "float32", " +="),
    ]
    assert {r.flops for r in head} == {2 * rows * c.vocab * c.width}
    assert head[0].bytes == 4 * (rows * c.width + c.vocab * c.width + rows * c.vocab)
    assert head[2].bytes == head[0].bytes + 4 * c.vocab * c.width  # what is added to is read as well
    text = profile.table(copy_gb_s=1e-3, tflop_s=1e-6)
    for part in ("by kernel", "products by shape", "by operation", "by part", "between launches", "adamw"):
        assert part in text
    line = next(line.split() for line in text.splitlines() if line.endswith("  adamw"))
    floor = adamw.bytes / 1e-3 / 1e6  # ms at a copy of a megabyte a second
    assert line[:5] == ["1.000", f"{1 / profile.total():.1%}", "1", f"{floor:.3f}", f"{1 - floor:.3f}"]


def test_arrays_that_a_profile_counts_twice_are_there():
    for kernel, names in gpu_profile.IN_PLACE.items():
        assert set(names) <= {p.name for p in kernels.signatures()[kernel][1] if p.array}


def test_the_step_learns_and_does_not_look():
    """Its loss falls on the few batches it has, and the result is not a Python number on a GPU's backend."""
    be = emulated()
    step = gpu_train.Step(replace(TINY, seq_len=12, batch_size=2), be, "float32")
    losses = [float(step()) for _ in range(12 * gpu_train.BATCHES)]
    n = gpu_train.BATCHES
    assert sum(losses[-n:]) < sum(losses[:n]) - 0.1 * n


def test_figures_and_ratios():
    c = gpu_train.ROWS["101m"]
    found = gpu_train.figures(c, 100_000_000, [90.0, 80.0, 100.0])
    assert found["tok_per_s"] == round(32 * 1024 / 0.09) and found["step_ms"] == 90.0
    assert found["share_of_989"] == pytest.approx(6e8 * 32 * 1024 / 0.09 / 989e12, abs=1e-4)
    result = {
        "ours": {"best": "recorded", "recorded": {"tok_per_s": 500_000}, "step by step": {"tok_per_s": 1}},
        "peer": {"tok_per_s": 400_000, "device": "NVIDIA H100 80GB HBM3"},
    }
    assert gpu_train.compare("101m", result)["ratio"] == 1.25
    assert gpu_train.compare("101m", result)["peer_is_fair"]
    result["peer"]["tok_per_s"] = 300_000
    assert not gpu_train.compare("101m", result)["peer_is_fair"]
    result["peer"]["device"] = "another"
    assert "peer_is_fair" not in gpu_train.compare("101m", result)
    assert "ratio" not in gpu_train.compare("101m", {"ours": {"error": ["it broke"]}})


@pytest.mark.parametrize(("row", "params"), [("101m", 101), ("101m-long", 101), ("25m", 25), ("101m-full", 101)])
def test_rows_have_the_sizes_that_their_names_say(row, params):
    from minisb.model import specs
    from minisb.params import count

    assert round(count(specs(gpu_train.ROWS[row])) / 1e6) == params
    assert gpu_train.ROWS[row].batch_size * gpu_train.ROWS[row].seq_len == 32768


def test_a_side_that_fails_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("print('so far')\nraise SystemExit('no wheels')\n")
    import os

    assert gpu_train.run_side([str(broken)], dict(os.environ)) == {"error": ["so far", "no wheels"]}
    works = tmp_path / "works.py"
    works.write_text("import sys\nprint('hello')\nprint('RESULT {\"tok_per_s\": 5}')\nassert '--began' in sys.argv\n")
    assert gpu_train.run_side([str(works)], dict(os.environ)) == {"tok_per_s": 5}
    assert "hello" in capsys.readouterr().out


class Memory:
    """Stands in for CuPy's pool and for what the GPU says of its memory."""

    def used_bytes(self):
        return 1 << 30

    def free_all_blocks(self):
        pass

    total_bytes = used_bytes


@pytest.mark.parametrize("fails", [False, True], ids=["recorded", "cannot be recorded"])
def test_our_side_from_beginning_to_end(monkeypatch, capsys, tmp_path, fails):
    import numpy as np

    class Arrays:
        cuda = Clock
        get_default_memory_pool = Memory

        def __getattr__(self, name):
            return getattr(np, name)

    be = emulated()
    monkeypatch.setattr(Clock, "Device", lambda: SimpleNamespace(synchronize=lambda: None), raising=False)
    be.xp = be.device.xp = Arrays()
    be.device.describe = lambda: "a stand-in"
    be.device.memory = lambda: {"pool": 2 << 30, "free": 5 << 30, "total": 9 << 30}

    class Recorded:
        pool = Memory()

        def __init__(self, function):
            self.function = function

        def __call__(self, *arrays, **flags):
            if fails:
                raise ValueError("no capture")
            return self.function(*arrays, **flags)

    be.recorded = Recorded
    monkeypatch.setattr("minisb.backend.choose", lambda device: (be, "because"))
    monkeypatch.setattr(gpu_train, "limits", lambda be: {"copy_gb_s": 1.0, "product_tflop_s": 1.0})
    monkeypatch.setitem(gpu_train.ROWS, "101m", replace(TINY, seq_len=8, batch_size=2))
    file = tmp_path / "rows.json"
    args = Namespace(began=0.0, dtype="float16", steps=3, graph="both", spikes=True, profile="both", json=str(file))
    found = json.loads(json.dumps(gpu_train.ours("101m", args)))
    assert found["memory"] == {"alive_gib": 1.0, "pool_gib": 2.0, "device_gib": 4.0}
    assert found["step by step"]["step_ms"] == 1.0  # one event a step
    flops = 6 * found["params"] * found[found["best"]]["tok_per_s"]
    assert found["share_of_measured"] == pytest.approx(flops / 1e12, abs=1e-4)
    if fails:
        assert found["best"] == "step by step" and found["graph_error"] == "ValueError: no capture"
    else:
        assert "recorded, spikes" in found and found["memory_recorded"]["pool_gib"] == 3.0
    assert capsys.readouterr().out.count("products by shape") == 2
    rows = json.loads(file.read_text())
    assert any(row["name"] == "spike_forward" for row in rows["spikes"])
    assert not any(row["name"] == "spike_forward" for row in rows["float"])


@pytest.mark.gpu
def test_our_side_on_a_gpu(monkeypatch, capsys):
    if not has_gpu():
        pytest.skip(NO_GPU)
    tiny = replace(TINY, head_dim=64, seq_len=128, batch_size=2)
    monkeypatch.setitem(gpu_train.ROWS, "101m", tiny)
    args = Namespace(began=0.0, dtype=None, steps=3, graph="both", spikes=True, profile="both", json=None)
    found = gpu_train.ours("101m", args)
    text = capsys.readouterr().out
    assert "graph_error" not in found and found["recorded"]["tok_per_s"] > 0 and "products by shape" in text
    assert SimpleNamespace(**found["memory"]).alive_gib <= SimpleNamespace(**found["memory"]).pool_gib


def test_every_row_of_the_operations_runs_and_its_launches_are_seen():
    be, tiny = emulated(), SimpleNamespace(B=2, T=8, C=16, H=4, G=2, D=8, R=3, W=4, F=12, V=20, params=30)
    seen = {}
    for row in gpu_ops.Rows(be, "float32", tiny):
        seen[row.name] = [name for name, *_ in gpu_ops.launches(be, row.call)]
        assert row.bytes > 0 and "launch" not in vars(be.device)
    assert seen["rope_backward"] == ["rope_backward"] and "attention_forward" in seen["attention_forward"]
    assert all(launched for name, launched in seen.items() if name != "copy" and not name.startswith("linear"))
