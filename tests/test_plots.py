"""Pictures are drawn from a run folder's own log, from measured spikes, from a sweep's JSON."""

import json

import numpy as np
import pytest
from test_model import TINY, model_of

from minisb import checkpoint, plots
from minisb.backend import Backend
from minisb.config import preset
from minisb.errors import MinisbError
from minisb.meter import measure
from minisb.plots import draw_spikes, expert_load, loss_curve, main, raster


def write_run(folder, records):
    values = {"format": checkpoint.FORMAT, "model": preset("nano", steps=20).to_dict(), "training": {"spike_from": 0.5}}
    (folder / checkpoint.CONFIG).write_text(json.dumps(values))
    (folder / checkpoint.LOG).write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_loss_curve_is_a_picture(tmp_path):
    records = [{"step": s, "tokens": 100 * s, "loss": 5 - s / 10} for s in range(1, 21)]
    records[-1] |= {"val_loss": 3.1, "val_loss_spike": 3.2}
    write_run(tmp_path, records)
    loss_curve(tmp_path, tmp_path / "loss.png", bigram=4.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_experts_has_a_picture_of_their_load(tmp_path):
    records = [
        {"step": s, "tokens": 100 * s, "loss": 5.0, "expert_load": {"1": [0.5, 0.5, 0, 0], "3": [1, 0, 0, 0]}}
        for s in (1, 10, 20)
    ]
    write_run(tmp_path, records)
    expert_load(tmp_path, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    write_run(tmp_path, [{"step": 1, "tokens": 100, "loss": 5.0}])
    with pytest.raises(MinisbError, match="no load of experts"):
        expert_load(tmp_path, tmp_path / "experts.png")


def test_a_run_without_a_step_has_no_curve(tmp_path):
    write_run(tmp_path, [])
    with pytest.raises(MinisbError, match="no logged steps"):
        loss_curve(tmp_path, tmp_path / "loss.png")


def test_two_arguments_are_asked_for():
    with pytest.raises(MinisbError, match="usage"):
        main(["one"])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, kept to be looked into."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda plt, figure, picture: (figures.append(figure), figure.savefig(picture)))
    return figures


def points(axes):
    """The (x, y) of every marker that was drawn."""
    return {tuple(point) for dots in axes.collections for point in dots.get_offsets().data.tolist()}


def test_a_raster_shows_the_highest_bit_first(tmp_path, drawn):
    raster(np.array([6, -1, 0]), tmp_path / "raster.png")
    binary, ternary, bitwise, bidirectional, twos_complement = drawn[0].axes
    assert points(ternary) == points(binary) == {(t, 0) for t in range(6)} | {(0, 1)}
    assert points(bitwise) == points(bidirectional) == {(0, 0), (1, 0), (2, 1)}  # 6 is 110, 1 is 001
    assert points(twos_complement) == {(1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 1)}  # 0110 and 1111
    assert [label.get_text() for label in twos_complement.get_xticklabels()] == ["-8", "4", "2", "1"]
    assert "6 steps" in ternary.get_title() and "3 spikes" in bidirectional.get_title()


def test_a_measured_model_is_drawn(tmp_path, drawn):
    model = model_of(TINY, Backend(1), noise=0.1)
    sample = np.random.default_rng(0).integers(0, TINY.vocab, 2 * TINY.seq_len + 1)
    _, tallies = measure(model, sample)
    draw_spikes(tmp_path / "new", model, sample, tallies)
    names = {"spike_raster.png", "spike_counts.png", "spike_thresholds.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 120_000
    bars = [bar.get_height() for bar in drawn[1].axes[0].patches][:-1]  # the last is the silent one, drawn over
    assert sum(bars) == pytest.approx(1)
    fixed, adaptive = drawn[2].axes
    (silent, saturated), (silent_too, saturated_too) = (
        [np.asarray(dots.get_offsets())[:, 1] for dots in axes.collections] for axes in (fixed, adaptive)
    )
    assert silent.max() == 1 and saturated.max() > 0.5
    assert silent_too.max() < 0.3 and saturated_too.max() < 0.01


def sweep_result():
    row = {"name": "k1", "k": 1.0, "cost": 0.01, "cost_untrained": 0.02, "sparsity": 0.8, "sparsity_firing": 0.6}
    rows = [row, row | {"k": 3.0, "cost": 0.001, "sparsity": 0.6, "sparsity_firing": 0.5}]
    return {"by_k": rows, "broken": [row | {"name": "zero gradient", "cost": 0.03}], "at_report_sparsity": None}


def test_a_sweep_is_drawn_from_the_last_line_of_its_output(tmp_path, drawn):
    (tmp_path / "sweep.json").write_text("a table\n" + json.dumps(sweep_result()) + "\n")
    assert main([str(tmp_path / "sweep.json"), str(tmp_path / "sweep.png")]) == 0
    loss, sparsity = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in [*loss.lines, *sparsity.lines]}
    assert list(lines["trained with spikes"]) == pytest.approx([1.0, 0.1])
    assert list(lines["broken backward: zero gradient"]) == pytest.approx([3.0])
    assert list(lines["all channels"]) == [0.8, 0.6]


@pytest.mark.parametrize("content", ["", "no json", '{"by_k": []}', "[]"])
def test_what_is_no_sweep_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(MinisbError, match=r"bench/spike_sweep\.py"):
        main([str(tmp_path / "sweep.json"), str(tmp_path / "sweep.png")])
    with pytest.raises(MinisbError):
        main([str(tmp_path / "nowhere.json"), str(tmp_path / "sweep.png")])
