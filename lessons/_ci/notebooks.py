"""Runs notebooks without Jupyter: cells in order, in one namespace, the last expression shown."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from lessons._ci import adapters
from lessons._lib import notebook
from lessons._lib.book import LESSONS, check_lesson, lessons
from lessons._lib.sandbox import StudentFile


def not_rebuilt() -> list[str]:
    """Notebooks that are not, byte for byte, what the texts give."""
    wanted = notebook.books()
    there = set((LESSONS / "colab").glob("*.ipynb"))
    wrong = [p for p, text in wanted.items() if p not in there or p.read_text(encoding="utf-8") != text]
    return [f"{p.name}: python -m lessons._lib.notebook" for p in [*wrong, *(there - set(wanted))]]


def run(cells, replaced: dict[str, str], skipped=("install",)) -> dict[str, object]:
    """Run code cells -> tag: the value of its last expression.  replaced: tag -> other source."""
    namespace, shown = {"In": [""], "__name__": "__main__"}, {}
    for cell in cells:
        if cell["cell_type"] != "code" or cell["metadata"]["tags"][0] in skipped:
            continue
        tag = cell["metadata"]["tags"][0]
        source = replaced.get(tag, "".join(cell["source"]))
        namespace["In"].append(source)
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, tag, "exec"), namespace)
        if last:
            shown[tag] = eval(compile(ast.Expression(last.value), tag, "eval"), namespace)
    return shown


def solved(number: str) -> dict[str, str]:
    """Exercise cells with the package's code in the first of them."""
    names = list(adapters.solutions(number))
    empty = {f"exercise: {name}": f"# exercise: {name}\n" for name in names}
    return empty | {f"exercise: {names[0]}": f"# exercise: {names[0]}\n{adapters.pasted(number)}"}


@contextlib.contextmanager
def elsewhere():
    """A fresh folder to write in, quiet, with the language put back afterwards."""
    kept, here = os.environ.get("MINISB_LANG"), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        kept_lessons, os.environ["MINISB_LESSONS"] = os.environ.get("MINISB_LESSONS"), folder
        try:
            yield Path(folder)
        finally:
            os.chdir(here)
            for name, value in (("MINISB_LANG", kept), ("MINISB_LESSONS", kept_lessons)):
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def failing() -> list[str]:
    """Complaints about notebooks that do not run: as they are, and solved by the adapters."""
    wrong = []
    for found in lessons():
        for ending in (".ipynb", ".zh.ipynb"):
            name = found.folder.name + ending
            cells = json.loads((LESSONS / "colab" / name).read_text(encoding="utf-8"))["cells"]
            if any(cell.get("outputs") for cell in cells):
                wrong.append(f"{name}: has outputs")
            with elsewhere() as folder:
                if not found.functions():
                    wrong += [] if run(cells, {}).get("show") else [f"{name}: no picture"]
                    continue
                if ending == ".ipynb":
                    stubs = run(cells, {})
                    wrong += [
                        f"{name}: {tag} of a stub: {r}" for tag, r in stubs.items() if "check:" in tag and r.written
                    ]
                shown = run(cells, solved(found.number))
                saved = (folder / f"{found.number}.py").read_text(encoding="utf-8")
                with StudentFile(saved, "saved.py", found.refused()) as student:
                    reports = list(check_lesson(found, student))
            wrong += [f"{name}, {tag}: {r}" for tag, r in shown.items() if tag.startswith("check") and not r.passed]
            wrong += [f"{name}, its exported file: {r}" for r in reports if not r.passed]
            if "show" not in shown or shown["show"] is None:
                wrong.append(f"{name}: no picture")
    return wrong
