"""Notebooks from a lesson's text and exercise: `python -m lessons._lib.notebook` writes lessons/colab/.

The text is cut at its exercise marks; at each come the stub and a cell that checks it.  Pictures are
inside, outputs are not, and the same text gives the same bytes.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import minisb
from lessons._lib.book import LESSONS, Lesson, lessons

MARK = re.compile(r"^<!-- exercise: (\w+) -->\n", re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([\w.]+\.png)\)")
CELL = re.compile(r"^# %% (\w+)\n", re.MULTILINE)
VERSION = minisb.__version__

INSTALL = """\
# In a checkout there is nothing to install.  Elsewhere (Colab) the lessons come with minisb's source, pinned to
# {version}: from the package index, or from minisb-{version}.tar.gz if you have put that file beside this notebook.
import os
import subprocess
import sys
from pathlib import Path

VERSION = "{version}"
home = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "lessons" / "_lib").is_dir()), None)
if home is None:
    home = Path.cwd() / f"minisb-{{VERSION}}"
    pip = [sys.executable, "-m", "pip"]
    if not Path(f"minisb-{{VERSION}}.tar.gz").exists():
        source = ["download", "-q", "--no-deps", "--no-binary", "minisb", f"minisb=={{VERSION}}"]
        subprocess.run([*pip, *source], check=True)
    subprocess.run(["tar", "xf", f"minisb-{{VERSION}}.tar.gz"], check=True)
    subprocess.run([*pip, "install", "-q", "-e", f"{{home}}[lessons]"], check=True)
os.chdir(home)
sys.path.insert(0, str(home))"""
SETUP = """\
import os

os.environ["MINISB_LANG"] = "{lang}"
from lessons._lib.notebook_side import open_lesson

notebook, check = open_lesson("{number}", globals())"""
SAVE = """\
# Your functions as a file, to keep or to hand in.
notebook.save("{number}.py", In)"""
NOTES = {
    "en": "*You are reading the notebook of this lesson: write in its cells and run the cell below each. "
    "Commands that begin with `python -m lessons` are for those who work with an editor.*",
    "zh": "*这是本课的笔记本版：在单元格里写代码，再运行它下面的那一格。"
    "以 `python -m lessons` 开头的命令是给用编辑器的人准备的。*",
}


def build(lesson: Lesson, lang: str = "en") -> dict:
    """The lesson as a notebook (nbformat 4.5) without outputs."""
    text = re.sub(r"^<!-- translates .*-->\s*", "", lesson.text_file(lang).read_text(encoding="utf-8"))
    first, *rest = MARK.split(text)
    cells = [
        markdown(first.rstrip() + "\n\n" + NOTES[lang], lesson.folder),
        code(INSTALL.format(version=VERSION), "install"),
        code(SETUP.format(lang=lang, number=lesson.number), "setup"),
    ]
    stubs = exercise_cells(lesson)
    if stubs:
        cells.append(code(stubs["imports"], "exercise: imports"))
    for name, following in zip(rest[::2], rest[1::2], strict=True):
        cells.append(code(stubs[name], f"exercise: {name}"))
        cells.append(code(f"check.{name}({name})", f"check: {name}"))
        cells.append(markdown(following.strip(), lesson.folder))
    cells.append(code("notebook.show()", "show"))
    if stubs:
        cells.append(code(SAVE.format(number=lesson.number), "export"))
    return notebook(cells)


def exercise_cells(lesson: Lesson) -> dict[str, str]:
    """Cell name -> its source, each beginning with a mark by which `notebook.save` knows it again."""
    if not lesson.exercise.exists():
        return {}
    _, *parts = CELL.split(lesson.exercise.read_text(encoding="utf-8").split("# %% [markdown]\n", 1)[1])
    sources = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: f"# exercise: {name}\n{source.strip()}" for name, source in sources.items()}


def markdown(text: str, folder: Path) -> dict:
    """A text cell; its pictures travel inside it."""
    attachments = {}
    for _, name in PICTURE.findall(text):
        attachments[name] = {"image/png": base64.b64encode((folder / name).read_bytes()).decode()}
    cell = {"cell_type": "markdown", "metadata": {}, "source": PICTURE.sub(r"![\1](attachment:\2)", text)}
    return cell | ({"attachments": attachments} if attachments else {})


def code(source: str, tag: str, **metadata) -> dict:
    metadata = {"tags": [tag], **metadata}
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": [], "source": source}


def notebook(cells: list[dict]) -> dict:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02d}"
        cell["source"] = cell["source"].splitlines(keepends=True)
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def as_text(made: dict) -> str:
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def books(folder: Path = LESSONS) -> dict[Path, str]:
    """Path -> content of every notebook that belongs to the lessons in `folder`."""
    found = [Lesson(path) for path in sorted(folder.glob("[0-9][0-9]_*"))] if folder != LESSONS else lessons()
    endings = {"en": ".ipynb", "zh": ".zh.ipynb"}
    return {
        folder / "colab" / (one.folder.name + ending): as_text(build(one, lang))
        for one in found
        for lang, ending in endings.items()
    }


def write(folder: Path = LESSONS):
    for path, text in books(folder).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
