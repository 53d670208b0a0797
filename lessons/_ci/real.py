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
from pathlib import Path

from lessons._ci import adapters
from lessons._ci.exports import NUMBER, POINTS
from lessons._ci.notebooks import solved
from lessons._lib import export
from lessons._lib.book import lesson

FUNCTIONS = len(adapters.solutions(NUMBER))


def run(*command, cwd: Path) -> str:
    # The package under test is the one that the export carries, also in the kernels that are started.
    environment = {**os.environ, "PYTHONPATH": str(cwd / "files"), "MINISB_LANG": "en"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def otter(folder: Path) -> list[str]:
    """otter check, on the stub and on the package's own code."""
    wrong = []
    made = export.otter(lesson(NUMBER), folder)
    sources = {"solved.py": adapters.pasted(NUMBER), "stub.py": lesson(NUMBER).exercise.read_text(encoding="utf-8")}
    for name, source in sources.items():
        (made / name).write_text(source, encoding="utf-8")
        said = run(sys.executable, "-m", "otter", "check", name, "-t", "tests", cwd=made)
        print(f"otter check {name}: {said.strip().splitlines()[0]}")
        if ("All tests passed" in said) != (name == "solved.py"):
            wrong.append(f"otter check {name}: {said}")
    return wrong


def nbgrader(folder: Path) -> list[str]:
    """generate_assignment, two submissions, autograde, and the scores out of the gradebook."""
    made = export.nbgrader(lesson(NUMBER), folder)
    name = f"lesson_{NUMBER}"
    run(sys.executable, "-m", "nbgrader", "generate_assignment", name, cwd=made)
    for student, replaced in (("right", solved(NUMBER)), ("stub", {})):
        submitted = made / "submitted" / student / name
        shutil.copytree(made / "release" / name, submitted)
        file = submitted / f"{NUMBER}.ipynb"
        book = json.loads(file.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            marks = cell["metadata"].get("nbgrader", {})
            if marks.get("solution") and f"exercise: {marks['grade_id']}" in replaced:
                cell["source"] = replaced[f"exercise: {marks['grade_id']}"]
        file.write_text(json.dumps(book), encoding="utf-8")
    run(sys.executable, "-m", "nbgrader", "autograde", name, cwd=made)
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{made / 'gradebook.db'}") as gradebook:
        scores = {s.student.id: s.score for s in gradebook.assignment_submissions(name)}
    print(f"nbgrader: {scores}")
    return [] if scores == {"right": FUNCTIONS * POINTS, "stub": 0} else [f"nbgrader: {scores}"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wrong = otter(Path(folder)) + nbgrader(Path(folder))
    print("\n".join(wrong) or "exports: graded by otter and nbgrader as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
