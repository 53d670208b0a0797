"""python -m lessons, as a student types it."""

import pytest

from lessons._ci import adapters
from lessons._lib import commands, desk, pictures
from lessons._lib.book import lesson


@pytest.fixture(autouse=True)
def my_lessons(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISB_LESSONS", str(tmp_path / "my"))
    monkeypatch.setenv("MINISB_LANG", "en")
    return tmp_path / "my"


def test_a_lesson_from_start_to_pass(my_lessons, capsys):
    assert commands.main(["start", "04"]) == 0
    assert commands.main(["check", "4"]) == 1
    assert "gla_step: not written yet" in capsys.readouterr().out
    (my_lessons / "04.py").write_text(adapters.pasted("04"))
    assert commands.main(["check", "04"]) == 0
    said = capsys.readouterr().out
    assert str(my_lessons / "04.py") in said and "4 of 4 functions pass" in said
    commands.main(["list"])
    assert "[ 4/4 ]" in capsys.readouterr().out


def test_start_leaves_work_alone_and_reset_keeps_it(my_lessons):
    commands.main(["start", "04"])
    (my_lessons / "04.py").write_text("mine = 1")
    commands.main(["start", "04"])
    assert (my_lessons / "04.py").read_text() == "mine = 1"
    commands.main(["reset", "04"])
    assert (my_lessons / "04.py").read_text() == lesson("04").exercise.read_text()
    assert [p.read_text() for p in my_lessons.glob("04-*.py")] == ["mine = 1"]


def test_a_function_that_breaks_again_loses_its_mark(my_lessons):
    commands.main(["start", "04"])
    (my_lessons / "04.py").write_text(adapters.pasted("04"))
    commands.main(["check", "04"])
    assert set(desk.passed()["04"]) == set(lesson("04").functions())
    (my_lessons / "04.py").write_text(adapters.pasted("04") + "\ngla_step = None\n")
    commands.main(["check", "04"])
    assert set(desk.passed()["04"]) == set(lesson("04").functions()) - {"gla_step"}


def test_hints_go_to_the_next_open_function(my_lessons, capsys):
    assert commands.main(["hint", "04"]) == 0
    assert "gla_step  1/3" in capsys.readouterr().out
    commands.main(["hint", "04", "3", "--for", "gla_chunk"])
    assert "gla_chunk  3/3" in capsys.readouterr().out
    assert commands.main(["hint", "04", "--for", "gla"]) == 2


@pytest.mark.parametrize("arguments", [["check", "04"], ["start", "99"], ["show", "04"]])
def test_what_is_not_there_is_one_sentence(arguments, capsys):
    assert commands.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_picture_with_what_is_written_so_far(my_lessons):
    commands.main(["start", "04"])
    assert commands.main(["show", "04"]) == 0
    assert (my_lessons / "04.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_show_prints_text(monkeypatch, capsys):
    monkeypatch.setattr(pictures, "pyplot", lambda: None)
    commands.main(["start", "04"])
    assert commands.main(["show", "04"]) == 0
    assert "reference" in capsys.readouterr().out
