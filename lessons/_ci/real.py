"""make exports: the otter and nbgrader exports, run by the real packages (not part of CI: they are large).

python -m lessons._ci.real, where otter-grader and nbgrader are installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lessons._ci.exports import FIRST, NUMBER, OTHERS, POINTS, submissions
from lessons._lib import export
from lessons._lib.book import lesson

KINDS = ("right", "wrong", "hanging", "stub")
FULL = POINTS * (1 + len(OTHERS))
#: What each submission earns: the wrong and the hanging one have only their first function broken.
WANTED = {"right": FULL, "wrong": FULL - POINTS, "hanging": FULL - POINTS, "stub": 0}
SECONDS = 6  # for a hanging function, in place of the lessons' 15


def source(kind: str) -> str:
    return lesson(NUMBER).exercise.read_text(encoding="utf-8") if kind == "stub" else submissions()[kind]


def run(*command, cwd: Path) -> str:
    # The package under test is the one that the export carries, also in the kernels that are started; and graders
    # start programs of this environment by name.
    environment = {**os.environ, "PYTHONPATH": str(cwd / "files"), "MINISB_LANG": "en", "MINISB_SECONDS": str(SECONDS)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, env=environment, capture_output=True, text=True)
    print(f"  {' '.join(map(str, command))}: {time.monotonic() - begun:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def answered(file: Path, kind: str):
    """Write the submission into a notebook's exercise cells: all of it into the first, as a student may."""
    if kind == "stub":
        return
    book = json.loads(file.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        what, _, name = cell["metadata"].get("tags", [""])[0].partition(": ")
        if what == "exercise" and name != "imports":
            cell["source"] = f"# exercise: {name}\n" + (source(kind) if name == FIRST else "")
    file.write_text(json.dumps(book), encoding="utf-8")


def otter_check(made: Path) -> dict[str, float]:
    """otter check of a file: a function for each test that passes."""
    earned = {}
    for kind in KINDS:
        (made / f"{kind}.py").write_text(source(kind), encoding="utf-8")
        said = run("otter", "check", f"{kind}.py", "-t", "tests", cwd=made)
        passed = [name for name in (FIRST, *OTHERS) if f"{name} results: All test cases passed" in said]
        earned[kind] = FULL if "All tests passed" in said else POINTS * len(passed)
    return earned


def otter_run(made: Path) -> dict[str, float]:
    """otter generate makes the autograder's zip, otter run grades notebooks with it."""
    earned = {}
    run(
        "otter",
        "generate",
        "-t",
        "../tests",
        "-o",
        "../autograder.zip",
        "--no-environment",
        "lessons",
        "minisb",
        cwd=made / "files",
    )
    for kind in KINDS:
        folder = made / kind
        folder.mkdir()
        file = shutil.copy(made / f"{NUMBER}.ipynb", folder)
        answered(Path(file), kind)
        run("otter", "run", "-a", "../autograder.zip", "--no-logo", f"{NUMBER}.ipynb", cwd=folder)
        tests = json.loads((folder / "results.json").read_text())["tests"]
        earned[kind] = sum(test.get("score", 0) for test in tests)
    return earned


def nbgrader(made: Path) -> dict[str, float]:
    """generate_assignment, four submissions, autograde, and the scores out of the gradebook."""
    name = f"lesson_{NUMBER}"
    run("nbgrader", "generate_assignment", name, cwd=made)
    for kind in KINDS:
        submitted = made / "submitted" / kind / name
        shutil.copytree(made / "release" / name, submitted)
        answered(submitted / f"{NUMBER}.ipynb", kind)
    run("nbgrader", "autograde", name, cwd=made)
    run("nbgrader", "generate_feedback", name, cwd=made)
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{made / 'gradebook.db'}") as gradebook:
        return {s.student.id: s.score for s in gradebook.assignment_submissions(name)}


def main() -> int:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        otter = export.otter(lesson(NUMBER), folder)
        for grade, made in (
            (otter_check, otter),
            (otter_run, otter),
            (nbgrader, export.nbgrader(lesson(NUMBER), folder)),
        ):
            earned = grade(made)
            wrong += earned != WANTED
            print(f"{grade.__name__}: {earned}" + ("" if earned == WANTED else f", not {WANTED}"), flush=True)
    print("exports: " + ("not graded as they should be" if wrong else "graded by otter and nbgrader as they should be"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
