"""What runs inside a notebook: its checks, its picture, and the file that it hands in."""

from __future__ import annotations

from pathlib import Path

from lessons._lib import pictures
from lessons._lib.book import SECONDS, check_notebook, lesson
from lessons._lib.calls import StudentFailed, careful, time_limit
from lessons._lib.language import say


class Notebook:
    def __init__(self, number: str, namespace: dict):
        self.lesson, self.namespace = lesson(number), namespace

    def function(self, name: str):
        """The function of that name among the notebook's variables, as one that checks can call."""
        if not callable(self.namespace.get(name)):
            raise StudentFailed("missing", name)
        return careful(self.namespace[name])

    def show(self):
        """The picture of the lesson; text where there is no matplotlib or a function is not written."""
        plt = pictures.pyplot()
        try:
            with time_limit(SECONDS):
                drawn = self.lesson.check.show(self.function, plt)
        except StudentFailed as failed:
            print(failed.title())
            return None
        if plt is None and isinstance(drawn, str):
            print(drawn)
            return None
        return drawn

    def save(self, path: str, executed: list[str]):
        """Write the exercise cells, each as it was run last, into a file.  executed: the notebook's In."""
        cells = {}
        for source in executed:
            if source.startswith("# exercise: "):
                cells[source.splitlines()[0]] = source
        Path(path).write_text("\n\n\n".join(cells.values()) + "\n", encoding="utf-8")
        print(say("written: ", "已写入：") + str(Path(path).resolve()))


class Checks:
    """check.gla_step(gla_step) -> Report, stopped if it takes too long."""

    def __init__(self, number: str, namespace: dict):
        self._number, self._namespace = number, namespace

    def __getattr__(self, name: str):
        if name not in lesson(self._number).functions():
            raise AttributeError(name)
        return lambda function: check_notebook(self._number, name, {**self._namespace, name: function})


def open_lesson(number: str, namespace: dict):
    """-> the notebook's own commands, the lesson's checks."""
    return Notebook(number, namespace), Checks(number, namespace)
