"""The autograders, run: with a right, a wrong and a hanging submission, as root (where we are) and not.

Gradescope and pytest exports run whole, in processes of their own.  Otter's and nbgrader's files are
run by small readers of their formats; `make exports` runs them with the real packages.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lessons._ci import adapters
from lessons._ci.notebooks import elsewhere, solved
from lessons._lib import export
from lessons._lib.book import lesson
from lessons._lib.course import make_course
from lessons._lib.sandbox import NOBODY, ROOT

NUMBER = "04"
FIRST, *OTHERS = adapters.solutions(NUMBER)
POINTS = export.POINTS


def submissions() -> dict[str, str]:
    right = adapters.pasted(NUMBER)
    return {
        "right": right,
        "wrong": right + "\n\nfirst = gla_step\ndef gla_step(*args):\n    return tuple(2 * x for x in first(*args))\n",
        "hanging": right + "\n\ndef gla_step(*args):\n    while True: pass\n",
        "nosy": right + NOSY,
    }


#: Tells who it runs as, and tries to give itself all the points and to read the checks.
NOSY = """

def gla_step(*args):
    import os, pathlib
    said = [f"uid {os.getuid()}"]
    for path in RESULTS, CHECK:
        try:
            pathlib.Path(path).open("a").write("")
            said.append(f"wrote {path}")
        except OSError:
            said.append("denied")
    raise ValueError(" ".join(said))
"""


def gradescope() -> list[str]:
    """Complaints about the zip, unpacked and run as Gradescope does it."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        packed = export.gradescope(lesson(NUMBER), folder)
        root = Path(folder, "autograder")
        with zipfile.ZipFile(packed) as opened:
            opened.extractall(root / "source")
        results = root / "results" / "results.json"
        for kind, source in submissions().items():
            (root / "submission").mkdir(exist_ok=True)
            check = root / "source" / "lessons" / "04_gated_linear_attention" / "check.py"
            names = f"\nRESULTS, CHECK = {str(results)!r}, {str(check)!r}\n"
            (root / "submission" / "answer.py").write_text(source + names)
            results.unlink(missing_ok=True)
            done = _run(["sh", str(root / "source" / "run_autograder")], AUTOGRADER=str(root), PYTHON=sys.executable)
            if done.returncode:
                wrong.append(f"gradescope, {kind}: {done.stderr[-2000:]}")
                continue
            tests = json.loads(results.read_text())["tests"]
            first, *others = [test["score"] for test in tests]
            if others != [POINTS] * len(OTHERS) or first != POINTS * (kind == "right"):
                wrong.append(f"gradescope, {kind}: {json.dumps(tests, indent=1)}")
            wrong += _nosy_complaints(tests[0]["output"]) if kind == "nosy" else []
    return wrong


def _nosy_complaints(said: str) -> list[str]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return []
    dropped = f"uid {NOBODY} denied denied" in said
    return [] if dropped else [f"gradescope: the student's code keeps rights: {said}"]


def unfinished() -> list[str]:
    """A grader that is killed in the middle has written what was earned until then."""
    from lessons._lib import grade

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        Path(folder, "04.py").write_text(adapters.pasted(NUMBER))
        seen, write = [], grade.write
        try:
            grade.write = lambda path, tests: (write(path, tests), seen.append([t["score"] for t in tests]))
            grade.grade(lesson(NUMBER), Path(folder), results)
        finally:
            grade.write = write
    wanted = [[POINTS] * n + [0] * (1 + len(OTHERS) - n) for n in range(2 + len(OTHERS))]
    return [] if seen == wanted else [f"gradescope: results after each test: {seen}"]


def pytest() -> list[str]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(3) as pool:
        made = export.pytest(lesson(NUMBER), folder)
        kinds = ("right", "wrong", "hanging")
        return [text for found in pool.map(lambda kind: _pytest(made, kind), kinds) for text in found]


def _pytest(made: Path, kind: str) -> list[str]:
    file = made.with_name(f"{kind}.py")
    file.write_text(submissions()[kind])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(made), str(made)]
    done = _run(command, cwd=made, SUBMISSION=str(file), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    closing = "4 passed" if kind == "right" else "1 failed, 3 passed"
    return [] if closing in done.stdout else [f"pytest, {kind}: {done.stdout[-2000:]}{done.stderr[-500:]}"]


def _run(command, cwd=ROOT, **environment):
    environment = {**os.environ, "MINISB_SECONDS": "6", "MINISB_LANG": "en", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# --- small readers of two formats ------------------------------------------------------------------


def read_otter(folder: Path, namespace: dict) -> dict[str, float]:
    """Test name -> points earned, as otter's doctest suites give them."""
    earned = {}
    for file in sorted((folder / "tests").glob("*.py")):
        read = {}
        exec(compile(file.read_text(), str(file), "exec"), read)
        test, passed = read["test"], True
        for case in test["suites"][0]["cases"]:
            parsed = doctest.DocTestParser().get_doctest(case["code"], dict(namespace), test["name"], str(file), 0)
            passed &= doctest.DocTestRunner().run(parsed, out=lambda text: None).failed == 0
        earned[test["name"]] = test["points"] * passed
    return earned


def read_nbgrader(cells, replaced: dict[str, str]) -> dict[str, float]:
    """Grade cell -> points earned: a graded cell that raises earns nothing."""
    namespace, earned = {"In": []}, {}
    for cell in cells:
        marks = cell["metadata"].get("nbgrader", {})
        if cell["cell_type"] != "code" or cell["metadata"]["tags"][0] in ("install", "export", "show"):
            continue
        source = replaced.get(f"exercise: {marks['grade_id']}") if marks.get("solution") else None
        try:
            exec("".join(cell["source"]) if source is None else source, namespace)
            passed = True
        except Exception:
            if not marks.get("grade"):
                raise
            passed = False
        if marks.get("grade"):
            earned[marks["grade_id"]] = marks["points"] * passed
    return earned


def notebook_graders() -> list[str]:
    wrong, found = [], lesson(NUMBER)
    stub = found.exercise.read_text(encoding="utf-8")
    full, none = dict.fromkeys((FIRST, *OTHERS), POINTS), dict.fromkeys((FIRST, *OTHERS), 0)
    with elsewhere() as folder:
        otter, nbgrader = export.otter(found, folder), export.nbgrader(found, folder)
        cells = json.loads((nbgrader / "source" / "lesson_04" / "04.ipynb").read_text(encoding="utf-8"))["cells"]
        for source, replaced, wanted in ((adapters.pasted(NUMBER), solved(NUMBER), full), (stub, {}, none)):
            namespace = {}
            exec(source, namespace)
            earned = read_otter(otter, namespace)
            if earned != wanted:
                wrong.append(f"otter: {earned} instead of {wanted}")
            earned = read_nbgrader(cells, replaced)
            if earned != {f"check_{name}": points for name, points in wanted.items()}:
                wrong.append(f"nbgrader: {earned} instead of {wanted}")
    return wrong


# --- a course --------------------------------------------------------------------------------------


def course() -> list[str]:
    """A course made by the command states its conventions, refuses the package's code, and hides its seed."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder, "course")
        make_course(7, 3, out)
        for found in map(lesson, adapters.LESSONS):
            for convention in found.check.CONVENTIONS:
                for page in ("exercise.py", "lesson.md", "lesson.zh.md"):
                    text = (out / "for_students" / "lessons" / found.folder.name / page).read_text(encoding="utf-8")
                    if convention.flipped not in text or convention.standard in text:
                        wrong.append(f"course: {found.number} {page} does not state: {convention.flipped}")
        (out / "my_lessons").mkdir()
        for number in adapters.LESSONS:
            (out / "my_lessons" / f"{number}.py").write_text(adapters.pasted(number))
            command = [sys.executable, "-m", "lessons", "check", number]
            done = _run(command, cwd=out / "for_grading", MINISB_LESSONS=str(out / "my_lessons"))
            if done.returncode != 1:
                wrong.append(f"course: pasted package code in {number}: {done.stdout}{done.stderr}")
        seeds = [
            json.loads((out / who / "lessons/course.json").read_text())["seed"]
            for who in ("for_students", "for_grading")
        ]
        wrong += [] if seeds == [0, 7] else [f"course: seeds {seeds}"]
    return wrong
