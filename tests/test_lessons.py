"""The lessons hold: the core of `python -m lessons._ci`, which runs in full in CI."""

import pytest

from lessons._ci import exports, fences, mutants, notebooks, proofs, texts
from lessons._lib import desk
from lessons._lib.book import check_lesson, lesson
from lessons._lib.checks import close, exact
from lessons._lib.sandbox import StudentFile

NUMBERS = [found.number for found in proofs.exercised()]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_exercise_is_solvable_and_its_check_finds_mistakes(number):
    assert proofs.prove(number) == []


def test_a_check_that_finds_nothing_is_noticed(monkeypatch):
    harmless = ("gla_step", "nothing is wrong", proofs.adapters.gla_step)
    monkeypatch.setitem(mutants.MUTANTS, "04", [*mutants.MUTANTS["04"], harmless])
    assert proofs.mutants_fail("04") == ["04 gla_step: passes although nothing is wrong"]


def test_the_package_is_refused_to_the_student():
    assert fences.refusals() == []


def test_a_harmless_import_is_not_refused():
    assert fences.failure("import math, minisb.backend\ndef f(): return math.pi") == "nothing failed"


def test_a_students_failures_have_names():
    assert fences.limits() == []


def test_texts():
    assert texts.unresolved() + texts.broken_examples() == []
    assert texts.differing_code() + texts.missing_translations() == []


def test_a_missing_symbol_is_noticed():
    here = texts.ROOT / "minisb" / "ops" / "gla.py"
    assert texts.defines(here, "gla_forward") and not texts.defines(here, "gla_forwards")
    assert texts.defines(texts.ROOT / "minisb" / "layers.py", "GatedLinearAttention.mix")
    assert not texts.defines(texts.ROOT / "minisb" / "layers.py", "GatedLinearAttention.gla_forward")


def test_a_failure_says_what_came_and_where():
    result = close("t", [[1.0, 2.0], [3.0, 5.0]], [[1.0, 2.0], [3.0, 4.0]], lesson("04").check.FLOAT64)
    assert not result.passed and "[1, 1]: expected 4, came 5" in result.text
    assert "shape (2,), came (3,)" in exact("t", [1, 2, 3], [1, 2]).text
    assert not close("t", [float("nan")], [1.0], lesson("04").check.FLOAT64).passed


def test_a_known_mistake_is_answered_with_its_question():
    def ungated(q, k, v, log_g, state):
        return proofs.adapters.gla_step(q, k, v, 0 * log_g, state)

    assert "Where does log_g enter" in str(lesson("04").check.gla_step(ungated))


def test_messages_are_chinese_on_request(monkeypatch):
    monkeypatch.setenv("MINISB_LANG", "zh_CN.UTF-8")
    source = lesson("04").exercise.read_text(encoding="utf-8")
    with StudentFile(source, "04.py") as stub:
        assert "还没有写" in str(next(check_lesson(lesson("04"), stub)))


def test_notebooks_are_what_the_texts_give():
    assert notebooks.not_rebuilt() == []


def test_graders_write_down_what_was_earned_so_far():
    assert exports.unfinished() == []


def test_the_files_for_otter_and_nbgrader_grade():
    assert exports.notebook_graders() == []


def test_a_course_refuses_pasted_code():
    assert exports.course() == []


def test_a_fresh_stub_forgets_what_passed_and_keeps_the_students_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MINISB_LESSONS", str(tmp_path))
    path, _ = desk.start(lesson("10"))
    path.write_text("mine = 1\n")
    (tmp_path / "progress.json").write_text('{"04": {"gla_step": "2026-01-01"}, "10": {"threshold": "2026-01-01"}}')
    path, kept = desk.reset(lesson("10"))
    assert kept.read_text() == "mine = 1\n" and path.read_text() == lesson("10").exercise.read_text()
    assert desk.passed() == {"04": {"gla_step": "2026-01-01"}}
