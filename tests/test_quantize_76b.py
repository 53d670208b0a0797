"""W8ASpike on the 76B's layout: parallel hybrids, sinks, experts and their router in int8."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from conftest import backend_of
from safetensors.numpy import load_file
from test_quantize import damaged, decodes_as_it_reads, fails, float_model, texts_of, threads_change_no_bit, tokens_of

import minisb
import sample
import train_small
from minisb import checkpoint, cli, quantize
from minisb.__main__ import main as minisb_main
from minisb.backend import Backend, CpuBackend
from minisb.config import SPIKE_PROJECTIONS, preset
from minisb.gradcheck import relative_rms
from minisb.meter import measure, operations
from minisb.model import SpikingBrain
from minisb.ops.w8aspike import decode_heads, dequantize_weight, quantize_weight, w8aspike_grouped, w8aspike_linear
from minisb.quantized import INT8, SCALES, float_routers, store_of
from minisb.state import Int8KeyValueCache

C = preset("76b-tiny", vocab=37, window=8, seq_len=20, batch_size=2, ffn=140)
LAYOUTS = {
    "76b": C,
    "shared projections": replace(C, shared_projections=True),
    "low-rank gate": replace(C, gate="low_rank", gate_rank=4, gate_divisor=2.0),
    "shared, low-rank gate": replace(C, gate="low_rank", gate_rank=4, feature_map="relu", shared_projections=True),
    "two experts a token": replace(C, top_k=2, shared_experts=2),
    "no shared expert, no sinks": replace(C, shared_experts=0, sinks=0),
    "float router": replace(C, spike=tuple(name for name in SPIKE_PROJECTIONS if name != "router")),
    "one mixer a layer": replace(C, mixers=("gla", "window", "full"), ffns=("moe",), layers=3),
}
ROUTER = "layers.1.mlp.router.weight"


@pytest.fixture(params=["numpy", "cpu"])
def be(request):
    """One thread: that more give the same bits is a test of its own."""
    backend_of(request.param, "w8aspike_linear")
    return (CpuBackend if request.param == "cpu" else Backend)(threads=1)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def config(request):
    return request.param


def quantized(config, be=None, embedding=False):
    """(float model, the same quantised)."""
    model = float_model(config, be or Backend(1))
    tensors, k = int8_of(config, type(model.be), embedding)
    return model, SpikingBrain(config, model.be, store_of({name: x.copy() for name, x in tensors.items()}, dict(k)))


@functools.cache
def int8_of(config, kind, embedding):
    """The tensors and k of the quantised model, made once for all tests."""
    tensors, section, _ = quantize.quantize(float_model(config, kind(1)), texts_of(config), 128, embedding)
    return tensors, section["k"]


def taps_of(model, tokens, spike=False):
    seen = {}
    model.forward(tokens, spike, tap=lambda name, x: seen.setdefault(name, x))
    return seen


# --- what is int8


def test_every_matrix_inside_the_layers_is_int8_and_nothing_else(config):
    model, small = quantized(config, embedding=True)
    pairs = {s.name for s in model.specs if "gk_proj" in s.name and s.name.endswith("weight")}
    matrices = {s.name for s in model.specs if len(s.shape) > 1} - pairs - {"sinks.weight"} - float_routers(config)
    merged = {name.replace(".0.weight", ".weight") for name in pairs if name.endswith(".0.weight")}
    assert set(small.store.int8) == matrices | merged and len(merged) == (config.gate == "low_rank") * config.layers
    assert all(m.w8.dtype == np.int8 for m in small.store.int8.values())
    assert all(x.dtype == np.float32 for x in small.store.p.values())
    shapes = {s.name: s.shape for s in model.specs}
    assert all(m.w8.shape == shapes[name] for name, m in small.store.int8.items() if name in shapes)
    down = small.store.int8["layers.1.mlp.experts.down_proj.weight"]
    assert down.w8.shape == (4, 24, 140) and down.scales.shape == (4, 24, 2)  # groups of 128 and 12 inputs
    assert ("sinks.weight" in small.store.p) == (config.sinks > 0)


def test_the_router_is_int8_if_the_config_lets_it_spike():
    whole, floats = quantized(C)[1], quantized(LAYOUTS["float router"])[1]
    some = quantized(replace(C, spike=("0-1.all", "2-3.gate")))[1]
    other = "layers.3.mlp.router.weight"
    assert ROUTER in whole.store.int8 and other in whole.store.int8
    assert ROUTER in floats.store.p and other in floats.store.p
    assert ROUTER in some.store.int8 and other in some.store.p
    tokens = tokens_of(1, 20, C)
    assert "layers.1.mlp.router.count" in taps_of(whole, tokens)
    seen = taps_of(floats, tokens)
    assert "layers.1.mlp.router.count" not in seen and "layers.1.mlp.experts.gate.count" in seen


def test_the_tap_sees_the_counts_of_every_input(config):
    model, small = quantized(config)
    counts = {name for name in taps_of(small, tokens_of(1, 9, config)) if name.endswith(".count")}
    spiking = {name for name in taps_of(model, tokens_of(1, 9, config), True) if name.endswith(".count")}
    assert counts == spiking


# --- what it computes


def test_a_quantised_model_is_close_to_its_spiking_self(config, be):
    model, small = quantized(config, be)
    tokens, targets = tokens_of(4, 20, config), tokens_of(4, 20, config)[:, ::-1]
    loss, spiking = small.loss(tokens, targets), model.loss(tokens, targets, spike=True)
    assert abs(loss / spiking - 1) < 0.02 and loss != spiking
    assert loss == small.loss(tokens, targets, spike=True)


def test_at_fine_spikes_only_the_weights_are_rounded(config, be):
    """k = 2000: hardly any rounding of activations is left, so the float model over the rounded weights is near."""
    config = replace(config, spike_k=2000.0)
    model = float_model(config, be)
    tensors, section, _ = quantize.quantize(model, texts_of(config), 128)
    small = SpikingBrain(config, be, store_of(tensors, dict.fromkeys(section["k"], 2000.0)))
    for name, w in quantize.float_matrices(model, False).items():
        w8, scales = tensors[name + INT8], tensors[name + SCALES]
        rows = w8.reshape(-1, w8.shape[-1]), scales.reshape(-1, scales.shape[-1])
        rounded = dequantize_weight(*rows).reshape(w.shape)
        assert relative_rms(rounded, w) < 0.02
        if name in model.store.p:
            model.store.p[name][...] = rounded
    tokens = tokens_of(2, 30, config)
    assert relative_rms(small.forward(tokens), model.forward(tokens)) < 0.05


def test_one_expert_is_the_dense_network(be):
    """One expert, always chosen, its gate 1: with the same integers the same bits."""
    dense, moe = replace(C, ffns=("dense",)), replace(C, ffns=("moe",), experts=1, shared_experts=0)
    model = float_model(dense, be)
    tensors, section, _ = quantize.quantize(model, texts_of(dense), 128)
    twin = {name.replace(".mlp.", ".mlp.experts."): x[None] for name, x in tensors.items() if ".mlp." in name}
    twin |= {name: x for name, x in tensors.items() if ".mlp." not in name}
    k = {name.replace(".mlp.", ".mlp.experts."): value for name, value in section["k"].items()}
    for i in range(moe.layers):
        name = f"layers.{i}.mlp.router.weight"
        twin[name + INT8], twin[name + SCALES] = quantize_weight(np.ones((1, C.width), np.float32))
        k[f"layers.{i}.mlp.router"] = 3.0
    tokens = tokens_of(2, 21, C)
    one = SpikingBrain(dense, be, store_of(dict(tensors), section["k"]))
    other = SpikingBrain(moe, be, store_of(twin, k))
    np.testing.assert_array_equal(other.forward(tokens), one.forward(tokens))


def test_each_row_is_multiplied_by_its_own_expert(be):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 140)).astype(np.float32), rng.standard_normal((4, 6, 140)).astype(np.float32)
    w8, scales = (np.stack(parts) for parts in zip(*map(quantize_weight, w), strict=True))
    y = w8aspike_grouped(be, x, w8, scales, 3.0, np.array([0, 2, 2, 7, 8]))
    for e, rows in ((0, slice(0, 2)), (2, slice(2, 7)), (3, slice(7, 8))):
        np.testing.assert_array_equal(y[rows], w8aspike_linear(be, x[rows], w8[e], scales[e], 3.0))
    assert not y[8:].any()


def test_decoding_follows_the_full_pass(config):
    small = quantized(config, CpuBackend(1))[1]  # NumPy where the natives are not compiled
    decodes_as_it_reads(small, tokens_of(6, 41, config))


def test_sinks_stay_in_the_int8_cache(be):
    small = quantized(C, be)[1]
    state, tokens = small.new_state(2), tokens_of(2, 3 * C.window, C)
    memories, _ = small._read_sinks(False)
    small.prefill(tokens, state)
    for (_, coded), (_, cache) in zip(memories, state.layers, strict=True):
        assert isinstance(cache, Int8KeyValueCache) and coded[0].dtype == np.int8
        for name, x in zip(cache.FIELDS, coded, strict=True):
            np.testing.assert_array_equal(getattr(cache, name)[:, : C.sinks], np.stack([x] * 2))
        np.testing.assert_array_equal(cache.sinks()[1], decode_heads(coded[2], coded[3]))
    before = small.forward(tokens)
    small.sinks[0] += 1
    assert (np.abs(small.forward(tokens) - before).max(-1) > 1e-4).all()  # every token sees them, far past the window


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_a_bit(threads):
    threads_change_no_bit(quantized(C)[1], tokens_of(2, 30, C), threads)


# --- calibration of experts


def test_each_expert_is_fitted_to_the_tokens_that_reach_it():
    """The rows that are kept of expert e are those that the router sent there, in float mode."""
    model = float_model(C)
    texts = texts_of(C)
    inputs = quantize.Inputs(model, texts)
    name, rows, expected = "layers.1.mlp.experts.gate+up", None, [[] for _ in range(4)]
    for x, _ in texts:
        rows = taps_of(model, x)["layers.1.mlp.router.input"].reshape(-1, C.width)
        for e, row in zip((rows @ model.store.p[ROUTER].T).argmax(1), rows, strict=True):
            expected[e].append(row)
    assert inputs.every == 1 and inputs.offsets[name].tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    np.testing.assert_allclose(inputs.rows[name], np.concatenate([e for e in expected if e]), rtol=1e-6)
    everything = inputs.rows[name].astype(np.float64)
    for e in range(4):
        own = np.array(expected[e], np.float64).reshape(-1, C.width)
        common = quantize.COMMON_ROWS / len(everything) * everything.T @ everything
        product = inputs.product("layers.1.mlp.experts.up_proj.weight", e)
        np.testing.assert_allclose(product, own.T @ own + common, rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_reaches_is_fitted_to_the_whole_layer(be):
    model = float_model(C, be)
    model.store.p[ROUTER][...] = 0  # equal logits: all tokens go to expert 0
    gate = model.store.p["layers.1.mlp.experts.gate_proj.weight"]
    model.store.p["layers.1.mlp_norm.weight"][5] = 0  # a channel that nobody uses,
    gate[0, :, 5] = 3 * np.abs(gate[0]).max()  # with large weights: worth cutting off
    gate[2] = gate[0]
    inputs = quantize.Inputs(model, texts_of(C))
    assert np.diff(inputs.offsets["layers.1.mlp.experts.down"]).tolist() == [80, 0, 0, 0]
    tensors, section, _ = quantize.quantize(model, texts_of(C), 128)
    name = "layers.1.mlp.experts.gate_proj.weight"
    # all tokens of the layer are those of expert 0: the same weights are cut off
    assert (tensors[name + SCALES][0] < 0.95 * quantize_weight(gate[0])[1]).mean() > 0.5
    np.testing.assert_array_equal(tensors[name + INT8][2], tensors[name + INT8][0])
    np.testing.assert_array_equal(tensors[name + SCALES][2], tensors[name + SCALES][0])
    for part in ("gate", "up", "down"):
        w = model.store.p[f"layers.1.mlp.experts.{part}_proj.weight"]
        for e in range(4):
            w8, scales = (tensors[f"layers.1.mlp.experts.{part}_proj.weight{end}"][e] for end in (INT8, SCALES))
            assert relative_rms(np.delete(dequantize_weight(w8, scales), 5, 1), np.delete(w[e], 5, 1)) < 0.03
    assert np.isfinite(SpikingBrain(C, be, store_of(tensors, section["k"])).forward(tokens_of(2, 20, C))).all()


# --- the meter


def test_operations_of_experts_are_those_of_a_token():
    config = LAYOUTS["two experts a token"]
    model = float_model(config)
    found = operations(model, {
        "layers.1.mlp.experts.down": {"spikes_per_channel": 1.0, "silent": 0.5},
        "layers.1.mlp.router": {"spikes_per_channel": 2.0, "silent": 0.0},
    })  # fmt: skip
    experts, router = 2 * config.width * config.ffn, config.experts * config.width
    assert found["additions"] == pytest.approx((experts + 2 * router) / (experts + router))
    assert found["weights_reached"] == pytest.approx((experts / 2 + router) / (experts + router))
    assert found["activations"] == pytest.approx((2 * config.ffn + config.width) / (experts + router))


@pytest.mark.parametrize("spike, names", [
    (("router",), {f"layers.{i}.mlp.router" for i in (1, 3)}),
    (("1.up",), {"layers.1.mlp.experts.up", "layers.1.mlp.shared.up"}),
    (("0.o",), {"layers.0.attn.linear.o", "layers.0.attn.softmax.o"}),
])  # fmt: skip
def test_names_of_spikes_reach_branches_and_experts(spike, names):
    model = float_model(replace(C, spike=spike))
    assert set(measure(model, tokens_of(1, 41, C)[0])[1]) == names


# --- run folders


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two trained runs of 76b-tiny, `run` and, its routers reading floats, `floats`; both quantised."""
    folder = tmp_path_factory.mktemp("home")
    tiny_run.write_text(folder / "text", files=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        command = ["--preset", "76b-tiny", "--data", "text", "--steps", "12", "--batch-size", "1", "--threads", "1"]
        command += ["--eval-every", "12"]
        no_router = ",".join(name for name in SPIKE_PROJECTIONS if name != "router")
        for name, spike in (("run", "all"), ("floats", no_router)):
            assert cli.run(train_small.main, [*command, "--out", name, "--spike", spike]) == 0
            quantise = ["quantize", name, "--out", f"{name}-int8", "--texts", "4", "--threads", "1"]
            assert cli.run(minisb_main, quantise) == 0
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    return home


def test_the_command_reports_and_writes_real_int8(at_home, capsys):
    assert minisb_main(["quantize", "run", "--out", "again", "--texts", "4", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(found["loss_w8aspike"] / found["loss_spike"] - 1) < 0.02
    tensors = load_file("again/model.safetensors")
    assert found["bytes_w8aspike"] == sum(x.nbytes for x in tensors.values()) < found["bytes_float"]
    assert tensors["layers.1.mlp.experts.up_proj.weight" + INT8].shape == (4, 32, 24)
    assert tensors[ROUTER + INT8].dtype == np.int8 and tensors["sinks.weight"].dtype == np.float32
    assert load_file("floats-int8/model.safetensors")[ROUTER].dtype == np.float32


@pytest.mark.parametrize("name", ["run-int8", "floats-int8"])
def test_a_loaded_run_decodes(at_home, capsys, name):
    model = minisb.load(name, native="none")
    expected = set(quantize.input_names(model.config))
    assert set(checkpoint.load_config(name)["quantized"]["k"]) == expected
    assert ("layers.1.mlp.router" in expected) == (name == "run-int8")
    capsys.readouterr()
    assert cli.run(sample.main, [name, "--quantized", "--tokens", "12", "--temperature", "0", "--threads", "1"]) == 0
    assert "grows: full attention" in capsys.readouterr().err
    assert np.isfinite(model.forward(tokens_of(1, 9, C))).all()


EXPERTS = "layers.3.mlp.experts.gate_proj.weight"


def minus_128(tensors):
    tensors[EXPERTS + INT8][3, 0, 0] = -128
    return tensors


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {n: x for n, x in t.items() if n != EXPERTS + SCALES}, [EXPERTS + SCALES, "missing"]),
        (lambda t: t | {EXPERTS + INT8: t[EXPERTS + INT8][:3].copy()}, [EXPERTS + INT8, "does not fit"]),
        (lambda t: t | {EXPERTS + SCALES: 0 * t[EXPERTS + SCALES]}, [EXPERTS, "damaged"]),
        (lambda t: {n: x for n, x in t.items() if ROUTER not in n} | {ROUTER: np.ones((4, 24), np.float32)},
         [ROUTER + INT8, "missing"]),
        (lambda t: t | {"sinks.weight": t["sinks.weight"][:2].copy()}, ["sinks.weight", "does not fit"]),
        (minus_128, [EXPERTS, "damaged"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(home, tmp_path, capsys, change, words):
    fails(capsys, sample.main, [damaged(home / "run-int8", tmp_path, change)], *words)


def test_settings_that_do_not_fit(home, tmp_path, capsys):
    """A router that should be float after all, and an input without its k."""
    copy = damaged(home / "run-int8", tmp_path, lambda tensors: tensors)
    values = json.loads((copy / "config.json").read_text())
    other = json.loads(json.dumps(values))
    other["model"]["spike"] = ["q"]
    (copy / "config.json").write_text(json.dumps(other))
    fails(capsys, sample.main, [copy], ROUTER, "missing")
    del values["quantized"]["k"]["layers.1.mlp.experts.gate+up"]
    (copy / "config.json").write_text(json.dumps(values))
    fails(capsys, sample.main, [copy], "damaged", "no k")


def test_the_meter_measures_the_run(at_home, capsys):
    assert minisb_main(["spikes", "run", "--tokens", "64", "--k", "3", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("1.mlp.router", "3.mlp.experts.down", "0.attn.softmax.q", "1.mlp.shared.up"):
        assert f"\n  layers.{name} " in printed


# --- the load of its experts


@pytest.mark.parametrize("name, flags", [("run", []), ("run", ["--spike"]), ("run-int8", [])])
def test_the_load_of_each_expert_is_printed(at_home, capsys, name, flags):
    command = ["experts", name, "--threads", "1", *flags]
    assert minisb_main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["load"]) == {"1", "3"} and all(sum(row) == pytest.approx(4) for row in found["load"].values())
    assert found["load_min"] == min(map(min, found["load"].values())) and found["tokens"] > 100
    assert 0 < found["entropy"] <= found["entropy_max"] == pytest.approx(np.log(4))
    assert minisb_main(command) == 0
    printed = capsys.readouterr().out
    assert f"least of all: {found['load_min']:.1%} of its fair share" in printed
    assert len(printed.splitlines()) == 3 + 2 + 2


def test_the_end_of_training_names_the_least_loaded_expert(at_home, capsys):
    flags = ["--steps", "1", "--batch-size", "1", "--threads", "1", "--out", "short"]
    assert cli.run(train_small.main, ["--preset", "76b-tiny", "--data", "text", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert minisb_main(["experts", "short", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert result["expert_load_min"] == pytest.approx(found["load_min"])
    assert "expert_load_min" in checkpoint.read_log("short")[-1]


def test_experts_refuses_what_has_none(at_home, capsys):
    config = preset("76b-tiny", ffns=("dense",))
    checkpoint.save_config("dense", config, {}, minisb.load("run").tokenizer, {})
    fails(capsys, minisb_main, ["experts", "dense"], "no experts", "upcycle")
    fails(capsys, minisb_main, ["experts", "nowhere"], "no run in nowhere")
    fails(capsys, minisb_main, ["experts", "run", "--tokens", "0"], "--tokens")
