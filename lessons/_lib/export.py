"""Autograders for one lesson: Gradescope, plain pytest, otter, nbgrader.

Each function  exporter(lesson, out) -> path  writes below the folder `out`.  What runs the student's
code, and with which limits, is said in lessons/TEACHING.md.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from lessons._lib import kit, notebook
from lessons._lib.book import Lesson

#: The newest NumPy that still runs on Python 3.10, which is what graders' images often have.
NUMPY = "numpy==2.2.6"
POINTS = 10

SETUP = f"""\
#!/bin/sh
# Gradescope runs this once, as root, when it builds the image.
set -eu
apt-get update
apt-get install -y python3 python3-pip
python3 -m pip install {NUMPY} || python3 -m pip install --break-system-packages {NUMPY}
"""
RUN = """\
#!/bin/sh
# Gradescope runs this for each submission.  Only root reads the checks, the seed and the results; the
# student's code runs as nobody.
set -eu
root=${{AUTOGRADER:-/autograder}}
mkdir -p "$root/results"
if [ "$(id -u)" = 0 ]; then chmod -R go-rwx "$root/source" "$root/submission" "$root/results"; fi
cd "$root/source"
exec "${{PYTHON:-python3}}" -m lessons._lib.grade {number} "$root/submission" "$root/results/results.json"
"""
PYTEST = '''\
"""One test for each function of lesson {number}:  SUBMISSION=path/to/{number}.py python -m pytest"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from lessons._lib.book import lesson  # noqa: E402
from lessons._lib.sandbox import StudentFile  # noqa: E402

LESSON = lesson("{number}")


@pytest.fixture(scope="module")
def student():
    file = Path(os.environ.get("SUBMISSION", HERE / "{number}.py"))
    with StudentFile(file.read_text(encoding="utf-8"), file.name, LESSON.refused()) as opened:
        yield opened


@pytest.mark.parametrize("name", {names})
def test_function(student, name):
    report = getattr(LESSON.check, name)(student.function(name))
    assert report.passed, f"\\n{{report}}"
'''
OTTER = """\
OK_FORMAT = True

test = {{
    "name": "{name}",
    "points": {points},
    "suites": [
        {{
            "cases": [
                {{
                    "code": r\"\"\"
                    >>> from lessons._lib.book import check_notebook
                    >>> report = check_notebook("{number}", "{name}", globals())
                    >>> print("passes" if report.passed else report)
                    passes
                    \"\"\",
                    "hidden": False,
                    "locked": False,
                }}
            ],
            "scored": True,
            "setup": "",
            "teardown": "",
            "type": "doctest",
        }}
    ],
}}
"""


def gradescope(lesson: Lesson, out) -> Path:
    """A zip to upload as the autograder of a programming assignment."""
    folder = _empty(Path(out) / f"gradescope_{lesson.number}")
    kit.copy([lesson], folder)
    (folder / "setup.sh").write_text(SETUP)
    (folder / "run_autograder").write_text(RUN.format(number=lesson.number))
    made = folder.with_suffix(".zip")
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            packed.write(path, path.relative_to(folder))
    shutil.rmtree(folder)
    return made


def pytest(lesson: Lesson, out) -> Path:
    """A folder with a test file."""
    folder = _empty(Path(out) / f"pytest_{lesson.number}")
    kit.copy([lesson], folder)
    text = PYTEST.format(number=lesson.number, names=lesson.functions())
    (folder / f"test_{lesson.number}.py").write_text(text)
    return folder


def otter(lesson: Lesson, out) -> Path:
    """The student's notebook, tests/, and in files/ what the tests import."""
    folder = _empty(Path(out) / f"otter_{lesson.number}")
    kit.copy([lesson], folder / "files")
    (folder / "tests").mkdir()
    for name in lesson.functions():
        text = OTTER.format(name=name, number=lesson.number, points=POINTS)
        (folder / "tests" / f"{name}.py").write_text(text)
    (folder / "requirements.txt").write_text(NUMPY + "\n")
    (folder / f"{lesson.number}.ipynb").write_text(notebook.as_text(notebook.build(lesson)), encoding="utf-8")
    return folder


def nbgrader(lesson: Lesson, out) -> Path:
    """A course folder with source/lesson_NN/: a notebook with locked tests, and beside it what they import."""
    folder = _empty(Path(out) / f"nbgrader_{lesson.number}")
    assignment = folder / "source" / f"lesson_{lesson.number}"
    kit.copy([lesson], assignment)
    made = notebook.build(lesson)
    for cell in made["cells"]:
        _for_nbgrader(cell)
    (assignment / f"{lesson.number}.ipynb").write_text(notebook.as_text(made), encoding="utf-8")
    (folder / "nbgrader_config.py").write_text("c = get_config()\nc.CourseDirectory.course_id = 'minisb'\n")
    return folder


def _for_nbgrader(cell: dict):
    """Mark what the student writes and what is graded; the rest stays an ordinary cell."""
    what, _, name = cell["metadata"].get("tags", [""])[0].partition(": ")
    common = {"schema_version": 3, "task": False}
    if what == "exercise" and name != "imports":
        lines = "".join(cell["source"]).splitlines()
        at = next(i for i, line in enumerate(lines) if "raise NotImplementedError" in line)
        lines[at : at + 1] = ["    ### BEGIN SOLUTION", lines[at], "    ### END SOLUTION"]
        cell["source"] = "\n".join(lines).splitlines(keepends=True)
        marks = {"grade": False, "solution": True, "locked": False, "grade_id": name}
    elif what == "check":
        test = f"report = check.{name}({name})\nprint(report)\nassert report.passed"
        cell["source"] = test.splitlines(keepends=True)
        marks = {"grade": True, "solution": False, "locked": True, "grade_id": f"check_{name}", "points": POINTS}
    else:
        return
    cell["metadata"]["nbgrader"] = common | marks


def _empty(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


EXPORTERS = {"gradescope": gradescope, "pytest": pytest, "otter": otter, "nbgrader": nbgrader}
