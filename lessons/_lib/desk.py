"""The student's folder, my_lessons/: copies of the exercises, progress, pictures.  Git never sees it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

from lessons._lib.book import Lesson, LessonError
from lessons._lib.language import say
from lessons._lib.sandbox import ROOT


def folder() -> Path:
    """my_lessons in the project's root, or where MINISB_LESSONS says."""
    return Path(os.environ.get("MINISB_LESSONS") or ROOT / "my_lessons")


def student_file(lesson: Lesson) -> Path:
    return folder() / f"{lesson.number}.py"


def start(lesson: Lesson) -> tuple[Path, bool]:
    """The student's copy of the exercise, made if it is not there yet -> (path, whether it is new)."""
    if not lesson.exercise.exists():
        raise LessonError(
            say(
                f"lesson {lesson.number} has nothing to write: read {lesson.text_file()}.",
                f"第 {lesson.number} 课不用写代码：请读 {lesson.text_file()}。",
            )
        )
    path = student_file(lesson)
    if path.exists():
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lesson.exercise, path)
    return path, True


def reset(lesson: Lesson) -> tuple[Path, Path | None]:
    """A fresh stub.  What was there is kept beside it -> (path, the kept copy or None)."""
    path = student_file(lesson)
    kept = None
    if path.exists():
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        kept = path.with_name(f"{lesson.number}-{stamp}.py")
        path.replace(kept)
    progress = passed()
    progress.pop(lesson.number, None)  # a fresh stub passes nothing, and hints go by what passes
    _write(progress)
    return start(lesson)[0], kept


def need(lesson: Lesson) -> Path:
    """The student's file; LessonError if the lesson has not been started."""
    path = student_file(lesson)
    if not path.exists():
        command = f"python -m lessons start {lesson.number}"
        raise LessonError(say(f"there is no {path} yet: {command}", f"还没有 {path}：请先运行 {command}"))
    return path


def passed() -> dict[str, dict[str, str]]:
    """Lesson number -> function -> the day on which it first passed."""
    path = folder() / "progress.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def note(lesson: Lesson, reports):
    """Write down which functions pass now; one that passed before and fails today loses its mark."""
    progress = passed()
    mine = progress.setdefault(lesson.number, {})
    for report in reports:
        if report.passed:
            mine.setdefault(report.name, datetime.date.today().isoformat())
        else:
            mine.pop(report.name, None)
    _write(progress)


def _write(progress: dict):
    path = folder() / "progress.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(progress, indent=1, sort_keys=True), encoding="utf-8")
    temporary.replace(path)
