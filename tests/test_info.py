"""python -m minisb: counts, bytes and FLOPs against arithmetic by hand; doctor and bench."""

import json
import re
import tracemalloc
from types import SimpleNamespace

import pytest
import tiny_run

from minisb import accounting, bench, blas, checkpoint, doctor, experts_cli
from minisb.__main__ import COMMANDS, main
from minisb.backend import Backend, default_threads
from minisb.config import PRESETS, Config, preset
from minisb.errors import MinisbError
from minisb.model import SpikingBrain, specs
from minisb.params import ParamStore, count
from minisb.quantized import empty_tensors, float_routers

SMALL = Config(vocab=50, width=8, layers=4, heads=4, kv_heads=2, head_dim=2, ffn=12, window=6, seq_len=10, gate_rank=3)


def test_7b_has_exactly_the_parameters_of_the_report():
    found = accounting.parameters(preset("7b"))
    assert found["total"] == 7_616_542_976
    assert found["by_part"]["embedding"] == found["by_part"]["head"] == 152064 * 3584


def test_7b_differs_from_its_base_by_the_gates_and_norms_only():
    """926,464 parameters are new relative to Qwen2.5-7B."""
    new = [s for s in specs(preset("7b")) if "gk_proj" in s.name or "g_norm" in s.name]
    assert count(new) == 926_464


@pytest.mark.parametrize("name, total", [("7b-mini", 7_329_392), ("nano", 1_515_840)])
def test_small_presets(name, total):
    assert accounting.parameters(preset(name))["total"] == total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_adds_up(name):
    c = preset(name)
    found = accounting.report(c)
    total = count(specs(c))
    counts = found["parameters"]
    assert counts["total"] == total == sum(counts["by_part"].values())
    outside = count([s for s in specs(c) if not s.name.startswith("layers.")])
    assert sum(counts["by_layer"]) + outside == total
    kinds = found["layer_kinds"].values()
    assert sorted(i for kind in kinds for i in kind["layers"]) == list(range(c.layers))
    assert sum(len(kind["layers"]) * kind["parameters"] for kind in kinds) + outside == total
    for kind in kinds:
        assert sum(tensor["parameters"] for tensor in kind["tensors"]) == kind["parameters"]
    weights = found["weight_bytes"]
    assert weights["fp32"] == 4 * total == 2 * weights["bf16"]
    assert total < weights["int8_embedding"] < weights["bf16"] and weights["int8_embedding"] < weights["int8"]
    assert weights["int8"] < weights["fp32"]
    assert found["optimizer_bytes"]["moments"] == 8 * total


@pytest.mark.parametrize("mixers", [("gla", "window"), ("window",), ("gla",)])
@pytest.mark.parametrize("context", [1, 40])
def test_decode_state_is_what_decoding_allocates(mixers, context):
    c = Config(**{**SMALL.to_dict(), "mixers": mixers})
    model = SpikingBrain(c, Backend(threads=1), ParamStore(specs(c)))
    state = model.new_state()
    model.prefill(model.be.xp.zeros((1, context), int), state)
    assert state.nbytes == accounting.decode_state_bytes(c, context)["total"]


def test_decode_state_of_7b():
    c = preset("7b")
    gla, ring = 14 * 4 * 128 * 128 * 4, 14 * 2 * 4096 * 4 * 128
    for context in accounting.CONTEXTS.values():
        found = accounting.decode_state_bytes(c, context)
        assert (found["gla"], found["window"]) == (gla, 4 * ring)
        assert found["total"] == gla + 4 * ring
        assert found["full_attention"] == 28 * 2 * context * 4 * 128 * 4
        assert accounting.decode_state_bytes(c, context, accounting.BF16)["window"] == 2 * ring


def test_full_attention_grows():
    c = Config(**{**SMALL.to_dict(), "mixers": ("full",)})
    one, ten = (accounting.decode_state_bytes(c, t)["total"] for t in (1, 10))
    assert ten == 10 * one == accounting.decode_state_bytes(c, 10)["full_attention"]


def test_int8_by_hand():
    """A row of 300 inputs has 3 groups, the last one shorter."""
    c = Config(**{**SMALL.to_dict(), "width": 300, "heads": 3, "kv_heads": 3, "layers": 1, "mixers": ("full",)})
    inner = 3 * 2
    projections = {"qkv": (3 * inner, 300), "o": (300, inner), "gate, up": (2 * 12, 300), "down": (300, 12)}
    weights = sum(rows * inputs for rows, inputs in projections.values())
    scales = sum(rows * -(-inputs // 128) for rows, inputs in projections.values())
    rest = count(specs(c)) - weights
    found = accounting.weight_bytes(c)
    assert found["int8"] == weights + 4 * scales + 4 * rest
    embedding = c.vocab * 300  # tied; 4 bytes a weight before, 1 and a scale a row after
    assert found["int8_embedding"] == found["int8"] - 3 * embedding + 4 * c.vocab


@pytest.mark.parametrize("name", ["nano", "7b-mini", "76b-tiny"])
@pytest.mark.parametrize("embedding", [False, True])
def test_int8_is_what_quantize_writes(name, embedding):
    """The gate's pair multiplied out, experts, an untied head, a router that stays float."""
    c = preset(name, spike=("q", "down"))
    written = empty_tensors(specs(c), 128, embedding, float_routers(c))
    key = "int8_embedding" if embedding else "int8"
    assert accounting.weight_bytes(c)[key] == sum(x.nbytes for x in written.values())


def test_flops_by_hand():
    """Two of each kind of layer.  Every product is 2 rows inputs; the recurrence is written out."""
    c, D, H, G = SMALL, 2, 4, 2
    linear = 2 * (D * D * G + 2 * D * D * G + 2 * D * D * H)
    projections = 4 * 2 * 8 * (H * D + 2 * G * D + H * D) + 2 * 2 * (3 * 8 + G * D * 3)
    found = accounting.decoding_flops(c, 1000)
    assert found["projections"] == projections
    assert found["ffn"] == 4 * 2 * 3 * 8 * 12
    assert found["head"] == 2 * 8 * 50
    assert found["mixer"] == linear + 2 * 4 * D * H * 6
    assert found["total"] == sum(found[part] for part in ("projections", "mixer", "ffn", "head"))
    # tokens 1 .. 10 with a window of 6 see 1 2 3 4 5 6 6 6 6 6 keys: 4.5 on average
    assert accounting.training_flops(c)["mixer"] == 3 * (linear + 2 * 4 * D * H * 4.5)


@pytest.mark.parametrize("length, window", [(1, 1), (10, 6), (6, 10), (7, 7)])
def test_mean_keys(length, window):
    seen = [min(t + 1, window) for t in range(length)]
    assert accounting.mean_keys(length, window) == pytest.approx(sum(seen) / length)


def test_training_costs_six_flops_a_weight():
    """The rule of thumb: 6 N a token, N without the embedding, plus the mixers."""
    c = preset("7b")
    flops = accounting.training_flops(c)
    n = count(specs(c)) - 152064 * 3584
    assert abs((flops["total"] - flops["mixer"]) / (6 * n) - 1) < 1e-3


def test_info_allocates_nothing(capsys):
    tracemalloc.start()
    assert main(["info", "7b"]) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert "7,616,542,976" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_info_prints_every_preset(name, capsys):
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    assert f"{count(specs(preset(name))):,} parameters" in out
    for word in ("linear attention", "decode state", "128k", "1M", "FLOPs", "training", "int8"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


def test_info_as_json(capsys):
    assert main(["info", "7b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "7b" and found["parameters"]["total"] == 7_616_542_976
    assert set(found) == {
        "preset", "config", "parameters", "other_projections", "layer_kinds", "weight_bytes", "optimizer_bytes",
        "decode_state_bytes", "flops_per_token",
    }  # fmt: skip
    assert set(found["decode_state_bytes"]["bf16_cache"]) == set(found["flops_per_token"]["decoding"])
    assert set(found["flops_per_token"]["decoding"]) == {"4k", "128k", "1M"}
    assert found["layer_kinds"]["gla"]["tensors"][1] == {
        "name": "attn.q_proj.weight", "shape": [3584, 3584], "parameters": 3584 * 3584,
    }  # fmt: skip


def test_info_of_a_run(tmp_path, capsys):
    checkpoint.save_config(tmp_path, preset("nano", ffn=96), {}, SimpleNamespace(settings={}), {})
    assert main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["ffn"] == 96 and found["run"] == str(tmp_path)
    assert found["parameters"]["total"] == count(specs(preset("nano", ffn=96)))
    assert main(["info", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}, nano: ")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(MinisbError, match="there is no run in"):
        main(["info", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["info", "8b"], "unknown preset '8b'"),
        (["info", "nanno"], "did you mean nano?"),
        (["info", "runs/nowhere"], "no run in runs/nowhere"),
        (["levitate"], "levitate"),
        ([], "COMMAND"),
    ],
)
def test_bad_commands_are_one_sentence(arguments, words):
    with pytest.raises(MinisbError, match=words):
        main(arguments)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    project = (tiny_run.ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^([\w-]+) = ", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    assert "cuda-check" in extras and all(name in out.rpartition("extras")[2] for name in extras)


# --- doctor


def test_doctor_ends_well_where_the_tests_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for topic in ("python", "cpu", "numpy", "natives", "speed", "gpu", "cupy", "cache", "tokenizer"):
        assert f"  {topic} " in out or f" !{topic} " in out
    assert "python train_small.py" in out.splitlines()[-1]


def test_doctor_gives_every_problem_a_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor.native, "status", lambda: {"gla": "not compiled", "norm": "", "rope": "not compiled"})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor, "_speed", lambda: doctor.Line("speed", ""))
    first, second, *_ = doctor.check_natives()
    assert first.text == "norm" and not first.mend
    assert "gla, rope" in second.text
    assert second.mend == "sudo apt install build-essential python3-dev && pip install -e ."


def test_doctor_takes_the_best_round_and_says_what_to_try_when_natives_are_slower(monkeypatch):
    """A busy moment in one round changes nothing; natives that are slower in every round are a problem."""
    rounds = {"numpy": [], "cpu": []}
    monkeypatch.setattr(doctor, "CpuBackend", lambda: SimpleNamespace(name="cpu", modules=["gla"]))
    monkeypatch.setattr(doctor, "_step_ms", lambda be: rounds[be.name].pop())
    rounds.update(cpu=[300.0, 60.0, 70.0], numpy=[110.0, 120.0, 115.0])
    line = doctor._speed()
    assert "60 ms with these natives, 110 ms without any" in line.text and not line.mend
    rounds.update(cpu=[300.0, 160.0, 170.0], numpy=[110.0, 120.0, 500.0])
    line = doctor._speed()
    assert "160 ms with these natives, 110 ms without any: natives should be faster" in line.text
    assert line.mend == "python train_small.py --threads 1" and not line.fatal


def test_doctor_sees_compiled_modules_that_a_checkout_hides(tmp_path):
    compiled = tmp_path / "minisb" / "cpu"
    compiled.mkdir(parents=True)
    folders = ["/nowhere", str(doctor.PACKAGE.parent), str(tmp_path)]
    assert not list(doctor._shadowed(True, folders))
    (compiled / f"gla{doctor.EXTENSION_SUFFIXES[0]}").touch()
    assert not list(doctor._shadowed(False, folders))
    (line,) = doctor._shadowed(True, folders)
    assert str(compiled.parent) in line.text and "pip install -e ." in line.mend


def test_doctor_warns_when_threads_spin(monkeypatch):
    class WithNatives:
        natives, modules = {"swiglu_forward": None}, ["linear", "swiglu"]

    monkeypatch.setattr(doctor, "CpuBackend", WithNatives)
    monkeypatch.setattr(doctor, "spin_times", lambda be: (1.05, 8.0))
    (line,) = doctor.check_spinning()
    assert "8.00 ms in turn" in line.text and "OMP_WAIT_POLICY=passive" in line.mend
    monkeypatch.setattr(doctor, "spin_times", lambda be: (1.05, 1.2))
    (line,) = doctor.check_spinning()
    assert not line.mend


def test_doctor_fails_where_nothing_can_be_written(monkeypatch, capsys):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_files,))
    assert main(["doctor"]) == 1
    assert "MINISB_CACHE" in capsys.readouterr().out


def test_modules_with_a_command_line_of_their_own_are_commands_too(capsys):
    assert main(["plots", "--help"]) == 0
    assert "the loss curve of a run" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "--help"])
    assert stop.value.code == 0 and "attention_fast" in capsys.readouterr().out


# --- experts


def test_experts_says_what_entropy_is_between():
    found = {"run": "run", "tokens": 64, "experts": 4, "top_k": 1, "load": {"3": [0.4, 1.2, 1.2, 1.2]},
             "load_min": 0.4, "entropy": 1.25, "entropy_max": 1.386}  # fmt: skip
    *_, least, entropy = experts_cli.text(found).splitlines()
    assert least == "least of all: 40.0% of its fair share, expert 0 of layer 3"
    assert "1.250 nats, from 0 (sure of one expert) to 1.386 (all 4 alike)" in entropy


# --- bench


def test_bench_times_every_operation(monkeypatch):
    monkeypatch.setattr(bench, "_median_ms", lambda call: call() is None or 1.0)
    try:
        found = bench.measure(SMALL, 2)
    finally:
        blas.set_threads(default_threads())
    assert json.loads(json.dumps(found))["threads"] == 2
    names = [row["op"] for row in found["ops"]]
    assert len(names) == len(set(names))
    for op in ("linear", "gla", "attention", "rmsnorm", "add_rmsnorm", "rope", "relu_heads", "swiglu", "log_gate"):
        assert {f"{op}_forward", f"{op}_backward"} <= set(names)
    assert {"spike_forward", "cross_entropy", "adamw", "grad_norm", "gla_step", "attention_step"} <= set(names)
    table = bench.text(found)
    assert all(name in table for name in names)
