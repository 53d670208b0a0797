"""The lessons hold: the core of `python -m lessons._ci`, which runs in full in CI."""

import contextlib
import signal

import pytest

from lessons._ci import exports, fences, mutants, notebooks, proofs, texts
from lessons._lib import book, desk
from lessons._lib.book import check_lesson, lesson
from lessons._lib.checks import close, exact
from lessons._lib.sandbox import StudentFile


@pytest.fixture(autouse=True)
def in_english(monkeypatch):
    monkeypatch.setenv("MINISB_LANG", "en")


#: Lesson 04 takes several seconds: `python -m lessons._ci` proves all of them.
SHORT = [found.number for found in proofs.exercised() if found.number != "04"]


@pytest.mark.parametrize("number", SHORT)
def test_every_exercise_is_solvable_and_its_check_finds_mistakes(number):
    assert proofs.prove(number) == []


def test_a_check_that_finds_nothing_is_noticed(monkeypatch):
    harmless = ("gla_step", "nothing is wrong", proofs.adapters.gla_step)
    one_each = {name: (name, what, mutant) for name, what, mutant in mutants.MUTANTS["04"]}  # enough, and quicker
    monkeypatch.setitem(mutants.MUTANTS, "04", [*one_each.values(), harmless])
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


#: Slips that readers made, and words of the question that each deserves.
SLIPS = {
    "04": [
        ("the mask comes after the exponential", "is the mask there before you take exp"),
        ("exp(b_t) times exp(-b_s)", "is exp taken of the difference"),
        ("k * v instead of the outer product", "What shape has k_t v_t^T"),
        ("the new state comes transposed", "is yours transposed"),
        ("older tokens are read without exp(b)", "by what has it faded when token t reads it"),
        ("older tokens are read with exp(-b)", "which sign has the exponent"),
        ("only whole chunks come back", "Is the last piece shorter"),
        ("the tokens after the last whole chunk are dropped", "after the last whole chunk"),
        ("the state is not faded from chunk to chunk", "the old state fades, too"),
    ],
    "10": [
        ("the mean of x, kept above", "What happens to negative activations"),
        ("the mean is bounded before", "Do you bound it, or the mean before"),
    ],
    "11": [
        ("the columns of a step are added up in int8", "where do you widen"),
        ("sums in int8 wrap round", "where do you widen"),
        ("the outputs come transposed", "The axes are in another order"),
        ("time is the last axis", "The axes are in another order"),
        ("what the bits are worth", "How do you get the bit itself"),
    ],
}


@pytest.mark.parametrize(("number", "what", "question"), [(n, *slip) for n, slips in SLIPS.items() for slip in slips])
@pytest.mark.filterwarnings("ignore")
def test_a_slip_is_met_with_its_own_question(number, what, question):
    name, _, wrong = next(m for m in mutants.MUTANTS[number] if m[1].startswith(what))
    assert question in str(getattr(lesson(number).check, name)(wrong))


def test_a_square_result_that_is_transposed_is_asked_about_its_axes():
    right = [[1.0, 2.0], [3.0, 4.0]]
    assert "another order" in close("t", [[1.0, 3.0], [2.0, 4.0]], right, lesson("04").check.FLOAT64).text


BROKEN = """
import numpy as np

def helper(*args):
    return gla_step(*args)

def gla_step(q, k, v, log_g, state):
    return q, state

def gla_recurrent(q, k, v, log_g, state):
    return np.stack([helper(*token, state)[0] for token in zip(q, k, v, log_g)]), state

def gla_parallel(q, k, v, log_g):
    return v
"""


def test_a_function_that_calls_a_wrong_one_waits_for_it():
    with StudentFile(BROKEN, "04.py") as student:
        reports = {report.name: report for report in check_lesson(lesson("04"), student)}
    assert reports["gla_step"].waits_for == "" and reports["gla_recurrent"].waits_for == "gla_step"
    assert "waits for gla_step, which it calls" in str(reports["gla_recurrent"])
    assert reports["gla_parallel"].waits_for == "" and "not right yet" in str(reports["gla_parallel"])


def test_a_notebooks_function_waits_for_the_one_that_it_calls():
    namespace = {}
    exec(BROKEN, namespace)
    assert book.check_notebook("04", "gla_recurrent", namespace).waits_for == "gla_step"
    namespace["gla_step"] = proofs.adapters.gla_step
    assert book.check_notebook("04", "gla_recurrent", namespace).waits_for == ""


def test_what_a_file_tells_of_itself_is_not_trusted():
    with StudentFile("def f():\n    return 1", "f.py") as student:
        for told in ({"f": 3}, {"f": (3,)}, "f", None):
            student.uses = told
            assert student.used_by("f") == set()


def test_a_check_in_a_notebook_cannot_hang(monkeypatch):
    def gla_step(*args):
        while True:
            with contextlib.suppress(Exception):
                len(args)

    monkeypatch.setattr(book, "SECONDS", 0.2)
    assert "took too long" in str(book.check_notebook("04", "gla_step", {"gla_step": gla_step}))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
