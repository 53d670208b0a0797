"""A quantised run: made, written, read back, decoded; and everything that can be wrong with its files."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

import minisb
from minisb import checkpoint, cli, quantize
from minisb.__main__ import main as minisb_main
from minisb.backend import Backend, CpuBackend
from minisb.config import Config
from minisb.errors import MinisbError
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain
from minisb.ops.w8aspike import dequantize_weight, quantize_weight
from minisb.quantized import INT8, SCALES, matrix_shapes, store_of
from minisb.state import Int8KeyValueCache, KeyValueCache

sys.path.insert(0, str(tiny_run.ROOT))
import sample  # noqa: E402
import train_small  # noqa: E402

C = Config(
    vocab=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, ffn=140, window=10,
    mixers=("gla", "window", "full"), gate_rank=4, seq_len=20, batch_size=2,
)  # fmt: skip


def float_model(config=C, be=None, seed=1):
    model = SpikingBrain(config, be or Backend(2))
    model.store.initialise(seed)
    noise = np.random.default_rng(seed).standard_normal(model.store.size)
    model.store.flat_p += (0.1 * noise).astype(np.float32)
    return model


def texts_of(config=C, count=4):
    tokens = np.random.default_rng(5).integers(0, config.vocab, (count, 1, config.seq_len + 1))
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def quantized(config=C, be=None, group=128, embedding=False):
    """(float model, the same quantised)."""
    model = float_model(config, be)
    tensors, section, _ = quantize.quantize(model, texts_of(config), group, embedding)
    return model, SpikingBrain(config, model.be, store_of(tensors, section["k"]))


def tokens_of(batch, length, config=C):
    return np.random.default_rng(2).integers(0, config.vocab, (batch, length))


# --- the model


@pytest.mark.parametrize("group, embedding", [(128, False), (None, False), (128, True)])
def test_all_projections_are_int8_and_nothing_else(group, embedding):
    _, small = quantized(group=group, embedding=embedding)
    names = set(small.store.int8)
    gla = {f"layers.0.{n}_proj.weight" for n in ("attn.q", "attn.k", "attn.v", "attn.gk", "attn.o")}
    ffn = {f"layers.{i}.mlp.{n}_proj.weight" for i in range(3) for n in ("gate", "up", "down")}
    soft = {f"layers.{i}.attn.{n}_proj.weight" for i in (1, 2) for n in "qkvo"}
    assert names == gla | ffn | soft | ({"embeddings.weight"} if embedding else set())
    assert small.store.int8["layers.0.attn.gk_proj.weight"].w8.shape == (C.kv_heads * C.head_dim, C.width)
    assert all(x.dtype == np.float32 for x in small.store.p.values())
    assert not any(name.endswith("gk_proj.0.weight") for name in small.store.p)
    assert all(m.w8.dtype == np.int8 for m in small.store.int8.values())
    down = small.store.int8["layers.0.mlp.down_proj.weight"]
    assert down.scales.shape == (C.width, 2 if group else 1)  # 140 inputs: a group of 128 and one of 12


@pytest.mark.parametrize("untied", [False, True])
def test_a_quantised_model_is_close_to_its_spiking_self(be, untied):
    config = replace(C, tied=not untied)
    for embedding in (False, True):
        model, small = quantized(config, be, embedding=embedding)
        tokens, targets = tokens_of(4, 20), tokens_of(4, 20)[:, ::-1]
        loss, spiking = small.loss(tokens, targets), model.loss(tokens, targets, spike=True)
        assert abs(loss / spiking - 1) < 0.02 and loss != spiking
        assert loss == small.loss(tokens, targets, spike=True)


def test_at_fine_spikes_only_the_weights_are_rounded(be):
    """k = 2000: hardly any rounding of activations is left, so the float model over the rounded weights is near."""
    config = replace(C, spike_k=2000.0)
    model = float_model(config, be)
    tensors, _, _ = quantize.quantize(model, texts_of(config), 128)
    small = SpikingBrain(config, be, store_of(tensors, dict.fromkeys(quantize.input_names(config), 2000.0)))
    for name, w in quantize.float_matrices(model, False).items():
        rounded = dequantize_weight(tensors[name + INT8], tensors[name + SCALES])
        assert relative_rms(rounded, w) < 0.02
        if name in model.store.p:
            model.store.p[name][...] = rounded
    tokens = tokens_of(2, 30)
    assert relative_rms(small.forward(tokens), model.forward(tokens)) < 0.02


def test_numpy_and_natives_agree_from_one_input_and_in_loss():
    if not CpuBackend(2).modules:
        pytest.skip("natives are not compiled")
    one, other = quantized(be=Backend(2))[1], quantized(be=Backend(2))[1]
    other.be = CpuBackend(2)
    tokens, targets = tokens_of(8, 30), tokens_of(8, 30)[::-1]
    assert abs(one.loss(tokens, targets) / other.loss(tokens, targets) - 1) < 1e-3


def threads_change_no_bit(small, tokens, threads):
    if not CpuBackend(2).modules:
        pytest.skip("natives are not compiled")
    small.be = CpuBackend(2)
    expected = small.forward(tokens)
    small.be = CpuBackend(threads)
    np.testing.assert_array_equal(small.forward(tokens), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_a_bit(threads):
    threads_change_no_bit(quantized()[1], tokens_of(2, 30), threads)


def decodes_as_it_reads(small, tokens):
    """A last-bit difference at a tie becomes a whole spike, so it is the mean loss that must agree."""
    full = small.forward(tokens[:, :-1])
    state, logits = small.new_state(6), []
    for t in range(40):
        logits.append(small.step(tokens[:, t], state))
    pieces, cut = small.new_state(6), []
    for start, end in ((0, 7), (7, 8), (8, 31), (31, 40)):
        cut.append((end - 1, small.prefill(tokens[:, start:end], pieces)))

    def loss(rows, at):
        rows = rows.astype(np.float64)
        log_p = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        return -np.take_along_axis(log_p, tokens[:, at + 1, None], -1).mean()

    by_step, whole = (np.mean([loss(x[t], t) for t in range(40)]) for x in (logits, full.swapaxes(0, 1)))
    assert abs(by_step / whole - 1) < 1e-3
    for t, rows in cut:
        assert abs(loss(rows, t) / loss(full[:, t], t) - 1) < 0.02
    assert pieces.position == state.position == 40 and pieces.nbytes == state.nbytes


def test_decoding_follows_the_full_pass(be):
    small = quantized(be=be)[1]
    assert [type(s) for s in small.new_state(6).layers[1:]] == [Int8KeyValueCache] * 2
    decodes_as_it_reads(small, tokens_of(6, 41))


def test_the_int8_ring_holds_what_was_appended_last(be):
    ring = Int8KeyValueCache(be, C, 1, np.float32, 4)
    for t in range(1, 12):
        k = np.full((1, 1, 2, 6), t, np.int8)
        unit = np.full((1, 1, 2), 0.5, np.float32)
        ring.append(k, unit, -k, 2 * unit)
    k, v = ring.past()
    assert k[0, :, 0, 0].tolist() == [4.5, 5, 5.5] and v[0, :, 1, 3].tolist() == [-9, -10, -11]
    twin = ring.copy()
    twin.append(k[:, :1].astype(np.int8), unit, v[:, :1].astype(np.int8), unit)
    assert ring.seen == 11 and ring.k[0, 3, 0, 0] == 8 and twin.k[0, 3, 0, 0] == 4
    floats = KeyValueCache(be, C, 1, np.float32, 4)
    assert floats.nbytes == 4 * 4 * 24 and ring.nbytes == 4 * (24 + 4 * 4)


def test_no_training(be):
    small = quantized(be=be)[1]
    with pytest.raises(MinisbError, match="cannot be trained"):
        small.loss_and_backward(tokens_of(1, 5), tokens_of(1, 5))


def test_the_tap_sees_counts(be):
    small, seen = quantized(be=be)[1], {}
    small.forward(tokens_of(1, 9), tap=lambda name, x: seen.update({name: x}))
    assert len(seen) == 8 + 7 + 7 and all(name.endswith(".count") for name in seen)
    assert all((x == np.rint(x)).all() for x in seen.values())


# --- calibration


def test_clipping_is_chosen_by_the_error_of_the_output():
    """A channel that is never used holds a huge weight: cutting it off costs nothing and helps the others."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 64)).astype(np.float32), rng.standard_normal((500, 64)).astype(np.float32)
    w[:3, 5], x[:, 5] = 9, 0

    def error(w8, scales):
        return (((x @ (dequantize_weight(w8, scales) - w).T) ** 2).sum(0)).astype(np.float64)

    product = (x.T @ x).astype(np.float64)
    chosen, plain = quantize._quantize_rows(Backend(2), w, 128, product), quantize_weight(w)
    np.testing.assert_allclose(chosen[1][:3], 0.8 * plain[1][:3], rtol=1e-6)
    assert (error(*chosen) <= error(*plain) * (1 + 1e-4)).all() and (error(*chosen) < error(*plain))[:3].all()


def test_k_follows_the_error():
    """The finest k that is needed: an input whose outputs are exact anyway takes the smallest of the grid."""
    model = float_model()
    inputs = quantize.Inputs(model, texts_of())
    tensors, _, _ = quantize.quantize(model, texts_of(), 128)
    easy, hard = quantize.input_names(C)[:2]
    inputs.rows[easy] = np.sign(inputs.rows[easy])  # |x| = 1: counts are exactly k wherever k is whole
    inputs.rows[hard] = np.where(np.arange(24) < 1, 1.0, 0.02) * np.ones((50, 1), np.float32)  # tiny beside one
    inputs.rows[hard] = inputs.rows[hard].astype(np.float32)
    k = quantize._fit_k(model, inputs, quantize.float_matrices(model, False), tensors)
    assert k[easy] == min(quantize.K_GRID) and set(k.values()) <= {*quantize.K_GRID}
    assert len(set(k.values())) > 1


def test_the_gate_pair_is_multiplied_out():
    model = float_model()
    p = model.store.p
    merged = quantize.float_matrices(model, False)["layers.0.attn.gk_proj.weight"]
    x = np.random.default_rng(0).standard_normal((7, C.width)).astype(np.float32)
    pair = x @ p["layers.0.attn.gk_proj.0.weight"].T @ p["layers.0.attn.gk_proj.1.weight"].T
    assert relative_rms(x @ merged.T, pair) < 1e-5


# --- run folders


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a trained run in `run`, and `int8`, quantised from it."""
    folder = tmp_path_factory.mktemp("home")
    tiny_run.write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        command = ["--preset", "tiny", "--data", "text", "--native", "none", "--steps", "6", "--out", "run"]
        assert cli.run(train_small.main, command) == 0
        assert cli.run(minisb_main, ["quantize", "run", "--out", "int8", "--texts", "6"]) == 0
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("MINISB_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    return home


def fails(capsys, main, arguments, *words):
    capsys.readouterr()
    assert cli.run(main, list(map(str, arguments))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], lines[0]


def test_the_command_reports_and_writes_real_int8(at_home, capsys):
    for flags in ([], ["--group", "row"], ["--quantize-embedding"]):
        out = at_home / ("out" + "".join(flags))
        assert minisb_main(["quantize", "run", "--out", str(out), "--texts", "6", *flags]) == 0
        printed = capsys.readouterr().out
        found = json.loads(printed.splitlines()[-1])
        for word in ("bytes in fp32", "W8ASpike", "beyond int8", "sample.py"):
            assert word in printed
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.tiktoken"]
        tensors = load_file(out / "model.safetensors")
        assert tensors["layers.0.mlp.down_proj.weight.int8"].dtype == np.int8
        assert ("embeddings.weight.int8" in tensors) == (flags == ["--quantize-embedding"])
        assert found["bytes_w8aspike"] == sum(x.nbytes for x in tensors.values()) < found["bytes_float"]
        assert abs(found["loss_w8aspike"] / found["loss_spike"] - 1) < 0.02
        model = minisb.load(out)
        assert model.loss(tokens_of(1, 9), tokens_of(1, 9)) > 0 and model.tokenizer.vocab_size == 300


def test_a_loaded_run_is_the_one_that_was_made(at_home):
    one, other = minisb.load("int8", native="none"), minisb.load("int8", native="none")
    np.testing.assert_array_equal(one.forward(tokens_of(2, 9)), other.forward(tokens_of(2, 9)))
    settings = checkpoint.load_config("int8")
    assert settings["quantized"]["format"] == 1 and settings["quantized"]["group"] == 128
    assert set(settings["quantized"]["k"]) == set(quantize.input_names(settings["model"]))
    run = minisb.load("run", native="none")
    for name in matrix_shapes(run.specs, False):
        if name in run.store.p:
            w8, scales = one.store.int8[name].w8, one.store.int8[name].scales
            assert relative_rms(dequantize_weight(w8, scales), run.store.p[name]) < 0.02


def test_sample_decodes_a_quantised_run(at_home):
    for flags in ([], ["--quantized"]):
        command = [sys.executable, str(tiny_run.ROOT / "sample.py"), "int8", "--tokens", "12", *flags]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, done.stderr
        # 1 state matrix of 8 x 8 in fp32; 8 keys and values of 8 bytes with a unit each
        assert b"768" not in done.stderr and b"448 bytes (constant)" in done.stderr


def test_sample_names_the_command_for_a_run_that_is_not_quantised(at_home, capsys):
    fails(capsys, sample.main, ["run", "--quantized"], "not quantised", "python -m minisb quantize run --out run-int8")
    fails(capsys, sample.main, ["nowhere", "--quantized"], "no run in nowhere")


def test_refusals(at_home, capsys):
    fails(capsys, minisb_main, ["quantize", "nowhere", "--out", "x"], "no run in nowhere")
    fails(capsys, minisb_main, ["quantize", "int8", "--out", "x"], "quantised already")
    fails(capsys, minisb_main, ["quantize", "run", "--out", "run"], "already holds a run")
    fails(capsys, minisb_main, ["quantize", "run", "--out", "x", "--texts", "0"], "--texts")
    fails(capsys, minisb_main, ["quantize", "run", "--out", "x", "--group", "64"], "--group")
    fails(capsys, minisb_main, ["quantize", "run", "--out", "text/0.txt"], "text/0.txt")
    fails(capsys, train_small.main, ["--resume", "int8"], "quantised", "cannot be trained")


def damaged(run, tmp_path, change):
    """A copy of a quantised run with other tensors: change(tensors) -> tensors."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "tokenizer.tiktoken"):
        (copy / name).write_bytes((run / name).read_bytes())
    checkpoint.save_quantized(copy, change(load_file(run / "model.safetensors")))
    return copy


NAME = "layers.0.mlp.down_proj.weight"


def minus_128(tensors):
    tensors[NAME + INT8][0, 0] = -128
    return tensors


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {n: x for n, x in t.items() if n != NAME + SCALES}, [NAME + SCALES, "missing"]),
        (lambda t: t | {NAME + INT8: t[NAME + INT8][:, :-1].copy()}, [NAME + INT8, "does not fit"]),
        (lambda t: t | {NAME + INT8: t[NAME + INT8].astype(np.float32)}, ["int8", "float32"]),
        (lambda t: t | {NAME + SCALES: t[NAME + SCALES].astype(np.float16)}, ["float32", "float16"]),
        (lambda t: t | {NAME + SCALES: -t[NAME + SCALES]}, [NAME, "damaged"]),
        (lambda t: t | {NAME + SCALES: np.nan * t[NAME + SCALES]}, [NAME, "damaged"]),
        (minus_128, [NAME, "damaged"]),
    ],
)
def test_tensors_that_do_not_fit(home, tmp_path, capsys, change, words):
    fails(capsys, sample.main, [damaged(home / "int8", tmp_path, change)], *words)


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_damaged_files(home, tmp_path, capsys, how):
    copy = damaged(home / "int8", tmp_path, lambda t: t)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    fails(capsys, sample.main, [copy], "model.safetensors", "missing" if how == "gone" else "damaged")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 2}, ["format 2", "reads format 1"]),
        ({"format": None}, ["format None"]),
        ({"group": 64}, ["damaged"]),
        ({"embedding": True}, ["does not fit", "embeddings.weight.int8"]),
        ({"k": {}}, ["damaged"]),
    ],
)
def test_settings_that_do_not_fit(home, tmp_path, capsys, change, words):
    copy = damaged(home / "int8", tmp_path, lambda t: t)
    values = json.loads((copy / "config.json").read_text())
    values["quantized"] |= change
    (copy / "config.json").write_text(json.dumps(values))
    fails(capsys, sample.main, [copy], *words)
