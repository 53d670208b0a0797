"""The lessons on disk: their texts, exercises, checks and hints."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lessons._lib.calls import StudentFailed, time_limit, used_by
from lessons._lib.checks import Report, Result
from lessons._lib.language import language, say

LESSONS = Path(__file__).resolve().parents[1]
#: Modules that no exercise may use: they map exercises to answers.
ANSWERS = ("lessons._ci",)
SECONDS = float(os.environ.get("MINISB_SECONDS", 15))  # for all calls of one check together


class LessonError(Exception):
    """One clear sentence about something the reader can mend."""


@dataclass(frozen=True)
class Lesson:
    folder: Path

    @property
    def number(self) -> str:
        return self.folder.name[:2]

    @property
    def exercise(self) -> Path:
        return self.folder / "exercise.py"

    def text_file(self, lang: str | None = None) -> Path:
        return self.folder / ("lesson.zh.md" if (lang or language()) == "zh" else "lesson.md")

    def title(self, lang: str | None = None) -> str:
        text = self.text_file(lang).read_text(encoding="utf-8")
        return re.search(r"^# \d\d (.+)$", text, re.MULTILINE).group(1)

    @functools.cached_property
    def check(self):
        """The lesson's check.py as a module."""
        name = f"lessons_check_{self.number}"
        spec = importlib.util.spec_from_file_location(name, self.folder / "check.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    def functions(self) -> list[str]:
        """What the student writes, in the order of the exercise."""
        return [name for name, f in vars(self.check).items() if getattr(f, "is_exercise", False)]

    def refused(self) -> tuple[str, ...]:
        return (*self.check.REFUSED, *ANSWERS)

    def hints(self, lang: str | None = None) -> dict[str, list[str]]:
        """Function -> its three hints.  hints.md: a heading a function, numbered lines below it."""
        path = self.folder / ("hints.zh.md" if (lang or language()) == "zh" else "hints.md")
        found, name = {}, None
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if line.startswith("## "):
                name = line[3:].strip()
                found[name] = []
            elif re.match(r"\d\. ", line):
                found[name].append(line[3:])
            elif name and line.strip() and found[name]:
                found[name][-1] += "\n" + line.strip()
        return found


def lessons() -> list[Lesson]:
    return [Lesson(path) for path in sorted(LESSONS.glob("[0-9][0-9]_*")) if (path / "lesson.md").exists()]


def lesson(number: str) -> Lesson:
    wanted = number.zfill(2)[:2]
    for found in lessons():
        if found.number == wanted:
            return found
    there = ", ".join(found.number for found in lessons())
    raise LessonError(say(f"there is no lesson {number}; there are {there}.", f"没有第 {number} 课；现有 {there}。"))


def check_lesson(found: Lesson, functions):
    """Yield the Report of each exercise.  functions: name -> callable, or a StudentFile."""
    broken = []
    for name in found.functions():
        if isinstance(functions, dict):
            given, uses = functions.get(name), lambda name: used_by(functions.get(name), functions)
        else:
            given, uses = functions.function(name), functions.used_by
        report = getattr(found.check, name)(given or _missing(name))
        if not report.passed:
            report.waits_for = next((earlier for earlier in broken if earlier in uses(name)), "")
            broken.append(name)
        yield report


def _missing(name):
    def call(*_):
        raise StudentFailed("missing", name)

    call.is_careful = True
    return call


def check_notebook(number: str, name: str, namespace: dict) -> Report:
    """The report of the function `name` among a notebook's variables, stopped if it takes too long."""
    found, given, report = lesson(number), namespace.get(name), Report(name)
    try:
        with time_limit(SECONDS):
            report = getattr(found.check, name)(given if callable(given) else _missing(name))
    except StudentFailed as failed:
        report.results.append(Result(failed.title(), False, failed.text))
    if not report.passed:
        earlier = found.functions()[: found.functions().index(name)]
        used = used_by(given, namespace)
        broken = (n for n in earlier if n in used and not check_notebook(number, n, namespace).passed)
        report.waits_for = next(broken, "")
    return report


__all__ = [
    "LESSONS",
    "Lesson",
    "LessonError",
    "Report",
    "Result",
    "check_lesson",
    "check_notebook",
    "lesson",
    "lessons",
]
