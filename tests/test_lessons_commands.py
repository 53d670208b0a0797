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


def test_doctor_ends_with_one_next_step(monkeypatch, capsys):
    from minisb import doctor

    findings = [doctor.Line("python", "3.x"), doctor.Line("speed", "slow", "mend me")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: findings,))
    assert commands.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "mend it with: mend me" in said and "python train_small.py" not in said
    assert said.splitlines()[-1].endswith("python -m lessons start 04")
    findings.append(doctor.Line("cache", "cannot be written", "mend it", fatal=True))
    assert commands.main(["doctor"]) == 1
    assert "python -m lessons start" not in capsys.readouterr().out


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


@pytest.mark.parametrize("number", ["04", "10", "11"])
def test_a_stub_has_a_picture_with_the_reference(number, my_lessons):
    commands.main(["start", number])
    assert commands.main(["show", number]) == 0
    assert (my_lessons / f"{number}.png").exists()


def test_a_result_of_another_shape_is_not_drawn(my_lessons, capsys):
    commands.main(["start", "10"])
    (my_lessons / "10.py").write_text("def simulate_neuron(x, vth, steps, v0):\n    return x[0][:3]\n")
    assert commands.main(["show", "10"]) == 1
    assert "cannot be drawn; python -m lessons check 10" in capsys.readouterr().out


class Editor:
    """Stands in for time.sleep: every wait of the watcher is a moment in which the student does something."""

    def __init__(self, path, *moments):
        self.path, self.moments = path, list(moments)

    def __call__(self, seconds):
        moment = self.moments.pop(0)
        if moment is None:
            self.path.unlink()
        elif moment is KeyboardInterrupt:
            raise KeyboardInterrupt
        elif moment is not Ellipsis:  # a moment of thought
            self.path.write_bytes(moment)


def watched(path, monkeypatch, *moments):
    monkeypatch.setattr(commands.time, "sleep", Editor(path, *moments, KeyboardInterrupt))
    return commands.main(["check", "04", "--watch"])


def test_watch_checks_every_save_from_red_to_green_and_ends_with_ctrl_c(my_lessons, monkeypatch, capsys):
    commands.main(["start", "04"])
    right = adapters.pasted("04").encode()
    broken = right + b"\ngla_step = None\n"
    assert watched(my_lessons / "04.py", monkeypatch, ..., b"def f(", ..., broken, None, ..., right, ...) == 0
    said = capsys.readouterr().out
    assert said.count("waiting for the next save") == 4  # the stub, a syntax error, 3 of 4, all
    assert [said.count(f"{n} of 4 functions pass") for n in (0, 3, 4)] == [2, 1, 1]
    assert "SyntaxError" in said


def test_watch_goes_on_when_the_file_is_no_text(my_lessons, monkeypatch, capsys):
    commands.main(["start", "04"])
    assert watched(my_lessons / "04.py", monkeypatch, b"\xff\xfe", b"x = 1") == 1
    assert "cannot be read as UTF-8" in capsys.readouterr().out


def test_a_save_during_a_check_is_not_missed(my_lessons, monkeypatch, capsys):
    commands.main(["start", "04"])
    codes = iter((1, 0))

    def check_and_save(found, path):
        code = next(codes)
        if code:
            path.write_text("saved = 'while the check ran'")
        return code

    monkeypatch.setattr(commands, "check_file", check_and_save)
    assert watched(my_lessons / "04.py", monkeypatch) == 0
