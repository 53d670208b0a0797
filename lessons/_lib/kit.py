"""What a grader needs of this project, in one folder: one lesson, its machinery, and the package as NumPy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lessons._lib.book import LESSONS, Lesson
from lessons._lib.conventions import COURSE_FILE, Settings

PACKAGE = LESSONS.parent / "minisb"


def copy(lessons: list[Lesson], folder: Path, settings: Settings | None = None):
    """Make folder/lessons and folder/minisb.  settings: of a course, in place of this folder's own."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(PACKAGE, folder / "minisb", ignore=_only_python, dirs_exist_ok=True)
    target = folder / "lessons"
    target.mkdir(exist_ok=True)
    for file in LESSONS.glob("*.py"):
        shutil.copy(file, target)
    shutil.copytree(LESSONS / "_lib", target / "_lib", ignore=_no_caches, dirs_exist_ok=True)
    for lesson in lessons:
        shutil.copytree(lesson.folder, target / lesson.folder.name, ignore=_no_caches, dirs_exist_ok=True)
    if settings is not None:
        (target / "course.json").write_text(json.dumps(vars(settings)))
    elif COURSE_FILE.exists():
        shutil.copy(COURSE_FILE, target)


def _no_caches(folder, names):
    return [name for name in names if name == "__pycache__"]


def _only_python(folder, names):
    """Leave out what is compiled, and data: the lessons run on the readable reference."""
    return [n for n in names if n == "__pycache__" or (Path(folder, n).is_file() and not n.endswith(".py"))]
