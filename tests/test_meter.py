"""The meter against counts that are known, the energy model against the report's numbers, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from test_model import TINY, model_of

import train_small
from minisb import __main__ as tools
from minisb import cli, energy, spikes_cli
from minisb.backend import Backend
from minisb.meter import QUANTITIES, Tally, mean_loss, measure, operations
from minisb.ops.spike import window_sparsity
from minisb.train import evaluate


def tally_of(*arrays):
    tally = Tally()
    for array in arrays:
        tally.add(np.asarray(array, np.float32))
    return tally


def test_every_quantity_of_counts_known_by_hand():
    """Three tokens of four channels; 1, 7 and 17 have 1, 3 and 2 bits, and 8 and 16 are clipped to the 3 of 7."""
    found = tally_of([[0, -1, 17, 2]], [[0, 1, -3, 7]], [[0, 0, 8, -16]]).statistics()
    assert found["silent"] == pytest.approx(4 / 12) and found["silent_channels"] == 1 / 4
    assert found["at_most_7"] == 9 / 12 and found["over_7"] == 3 / 12 and found["over_16"] == 1 / 12
    assert found["mean_count"] == pytest.approx((1 + 3 + 7 + 8 + 16 + 1 + 17 + 2) / 12)
    spikes, clipped = 1 + 2 + 3 + 1 + 1 + 1 + 2 + 1, 1 + 2 + 3 + 3 + 3 + 1 + 3 + 1
    assert found["spikes_per_channel"] == pytest.approx(spikes / 12)
    assert found["spikes_per_firing"] == pytest.approx(spikes / 8)
    assert found["sparsity"] == pytest.approx(1 - clipped / 36)
    assert found["sparsity_firing"] == pytest.approx(1 - clipped / 24)
    assert found["sparsity_full"] == pytest.approx(1 - spikes / 12 / 5)
    assert found["codes"]["ternary"]["steps"] == 17 and found["codes"]["bidirectional"]["steps"] == 5
    assert found["codes"]["ternary"]["spikes_per_channel"] == found["codes"]["binary"]["spikes_per_channel"]
    assert found["codes"]["twos_complement"]["steps"] == 6
    assert {q.key for q in QUANTITIES} <= set(found)


def test_a_tally_in_pieces_is_the_tally_at_once_and_its_memory_is_that_of_the_largest_count():
    counts = np.rint(np.random.default_rng(0).standard_normal((500, 33)) * 5)
    whole, pieces = tally_of(counts), tally_of(*np.array_split(counts, 7))
    assert np.array_equal(whole.seen, pieces.seen) and whole.statistics() == pieces.statistics()
    assert len(pieces.seen) == 2 * int(np.abs(counts).max()) + 1 and pieces.fired.shape == (33,)
    assert whole.statistics()["sparsity"] == pytest.approx(window_sparsity(Backend(1), counts))
    whole.merge(tally_of([[40, 0]]))
    assert whole.seen.sum() == counts.size + 2 and whole.fired.shape == (35,)
    assert whole.statistics()["silent_channels"] == pytest.approx(1 / 35)


def test_all_silent():
    found = tally_of(np.zeros((3, 4))).statistics()
    assert found["silent"] == found["silent_channels"] == found["sparsity"] == 1 and found["spikes_per_firing"] == 0


def test_a_model_is_measured_through_the_tap(be):
    model = model_of(TINY, be, noise=0.1)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab, 4 * TINY.seq_len + 1)
    found, tallies = measure(model, tokens)
    trained = evaluate(model, tokens)
    assert found["loss"] == pytest.approx(trained["val_loss_spike"], rel=1e-6)
    assert mean_loss(model, tokens, False) == pytest.approx(trained["val_loss"], rel=1e-6)
    assert found["total"]["sparsity"] == pytest.approx(trained["sparsity"])  # one batch of 4 windows
    assert set(found["projections"]) == set(tallies) and len(tallies) == 8 + 7 + 7
    q, k = tallies["layers.0.attn.q"], tallies["layers.0.attn.k"]
    assert np.array_equal(q.seen, k.seen) and q.seen.sum() == 4 * TINY.seq_len * TINY.width
    assert tallies["layers.1.mlp.down"].fired.shape == (TINY.ffn,)
    assert model.config.spike_k == TINY.spike_k  # measured with another k, the model keeps its own
    coarse, fine = (measure(model, tokens, k)[0]["total"] for k in (1, 4))
    assert coarse["sparsity"] > found["total"]["sparsity"] > fine["sparsity"]
    assert coarse["mean_count"] == pytest.approx(1, rel=0.1) and fine["mean_count"] == pytest.approx(4, rel=0.1)


def test_only_what_spikes_is_measured(be):
    model = model_of(replace(TINY, spike=("1.down",)), be)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab, TINY.seq_len + 1)
    assert set(measure(model, tokens)[0]["projections"]) == {"layers.1.mlp.down"}


def test_operations_weigh_projections_by_their_size():
    model = model_of(TINY, Backend(1))
    O, I = TINY.width, TINY.ffn
    counted = operations(
        model,
        {
            "layers.0.mlp.down": {"spikes_per_channel": 1.0, "silent": 0.5},
            "layers.0.attn.gk": {"spikes_per_channel": 2.0, "silent": 0.0},
        },
    )
    macs = O * I + TINY.gate_rank * O
    assert counted["additions"] == pytest.approx((O * I * 1 + TINY.gate_rank * O * 2) / macs)
    assert counted["weights_reached"] == pytest.approx((O * I * 0.5 + TINY.gate_rank * O) / macs)
    assert counted["activations"] == pytest.approx((I + O) / macs)


def test_the_reports_energy():
    """Eq. 24: 0.034 pJ, -97.7 %, -85.2 %; 43.48x comes from the rounded share."""
    claims = energy.report_claims()
    assert claims == {"energy_pj": 0.034, "saved_fp16": 0.977, "saved_int8": 0.852, "factor_from_rounded": 43.48,
                      "factor": 44.1}  # fmt: skip
    assert energy.mac("fp16") == pytest.approx(1.5) and energy.mac("int8") == pytest.approx(0.23)


def test_memory_traffic_shrinks_what_spikes_save():
    table = energy.account({"additions": 1.13, "weights_reached": 0.816, "activations": 0.01})
    fp16, spikes = table["FP16 multiply-accumulate"], table["spikes, as counted here"]
    assert spikes == pytest.approx(table["spikes, the report's 1.13"])
    assert 1 - spikes["arithmetic"] / fp16["arithmetic"] == pytest.approx(0.977, abs=1e-3)
    assert fp16["with DRAM"] == pytest.approx(1.5 + 2.02 * 162.5)
    assert spikes["with DRAM"] == pytest.approx(0.0339 + 0.826 * 162.5)
    assert 1 - spikes["with DRAM"] / fp16["with DRAM"] < 0.6


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISB_CACHE", str(folder / "cache"))
        text = tiny_run.write_text(folder / "text", files=12)
        for name, spike in (("run", "all"), ("float", "none")):
            flags = ["--preset", "tiny", "--data", str(text), "--steps", "3"]
            assert cli.run(train_small.main, [*flags, "--out", str(folder / name), "--spike", spike]) == 0
        yield folder / "run"


def spikes(capsys, *flags):
    code = cli.run(tools.main, ["spikes", *map(str, flags)])
    return code, capsys.readouterr()


def test_the_command_prints_one_json_object(run, capsys):
    code, printed = spikes(capsys, run, "--k", "2,0.5", "--tokens", "64", "--json")
    found = json.loads(printed.out)
    assert code == 0 and found["tokens"] == 64 and [m["k"] for m in found["by_k"]] == [0.5, 2, 3]
    assert found["spike_k"] == 3 and set(found["definitions"]) == set(found["report"])
    assert found["energy"]["note"] == "a model, not a measurement"
    assert all(np.isfinite(m["loss"]) for m in found["by_k"])


def test_the_command_prints_tables(run, capsys):
    code, printed = spikes(capsys, run, "--tokens", "64")
    assert code == 0
    lines = printed.out.splitlines()
    for q in QUANTITIES:
        assert any(q.key in line and q.definition in line for line in lines)
    assert any("69.15%" in line for line in lines) and any("layers.1.mlp.down" in line for line in lines)
    words = " ".join(printed.out.split())
    assert "small costs on few tokens are noise" in words and "(these are from 64;" in words
    assert "other reading" not in words and "the 7B" in words and max(map(len, lines)) <= 120
    account = lines[next(i for i, line in enumerate(lines) if line.startswith("energy")) :]
    account = account[: account.index("  constants, published figures in pJ:")]
    numbers = [line for line in account if any(c.isdigit() for c in line)]
    assert len(numbers) == 10 and all(energy.NOTE in line for line in numbers)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["nowhere"], "no run in nowhere"),
        (["RUN", "--k", "two"], "'two' is no list of numbers"),
        (["RUN", "--k", "2,0"], "above 0"),
        (["RUN", "--k", "nan"], "finite"),
        (["RUN", "--tokens", "0"], "--tokens"),
        (["FLOAT"], "no spikes"),
    ],
)
def test_mistakes_are_one_line(run, capsys, flags, words):
    named = {"RUN": run, "FLOAT": run.with_name("float")}
    code, printed = spikes(capsys, *(named.get(flag, flag) for flag in flags))
    assert code == 2 and words in printed.err and len(printed.err.splitlines()) == 1


def test_the_definitions_fit_the_reports_arithmetic():
    """1.13 spikes: 62.3 % if per channel, 69.3 % if per firing channel of which 18.4 % are silent."""
    assert pytest.approx(0.623, abs=1e-3) == 1 - 1.13 / 3
    assert pytest.approx(0.693, abs=1e-3) == 1 - 1.13 * (1 - 0.184) / 3
    assert spikes_cli.REPORT_SPARSITY[3.0] == pytest.approx(0.6915, abs=1e-3)
