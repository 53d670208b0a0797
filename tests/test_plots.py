"""Pictures are drawn from a run folder's own log."""

import json

import pytest

from minisb import checkpoint
from minisb.config import preset
from minisb.errors import MinisbError
from minisb.plots import loss_curve, main


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


def test_a_run_without_a_step_has_no_curve(tmp_path):
    write_run(tmp_path, [])
    with pytest.raises(MinisbError, match="no logged steps"):
        loss_curve(tmp_path, tmp_path / "loss.png")


def test_two_arguments_are_asked_for():
    with pytest.raises(MinisbError, match="usage"):
        main(["one"])
