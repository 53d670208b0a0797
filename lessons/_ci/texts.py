"""The texts: symbols resolve, code is equal in both languages, translations know what they translate."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import re
import warnings
from pathlib import Path

from lessons._lib.book import LESSONS, lessons

ROOT = LESSONS.parent
SYMBOL = re.compile(r"`([\w./]+\.(?:py|pyx|cu|cuh))::([\w.]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXERCISE = re.compile(r"^<!-- exercise: (\w+) -->$", re.MULTILINE)
TRANSLATES = re.compile(r"^<!-- translates \S+ sha256:([0-9a-f]{12}) -->")


def pages() -> list[Path]:
    return sorted([*LESSONS.glob("*.md"), *LESSONS.glob("[0-9][0-9]_*/*.md")])


def translated() -> list[tuple[Path, Path]]:
    """(English, Chinese) for every page that stands in both languages."""
    return [(page, page.with_suffix(".zh.md")) for page in pages() if page.with_suffix(".zh.md").exists()]


def unresolved() -> list[str]:
    """References to code that is not there, and links to files that are not."""
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for file, symbol in SYMBOL.findall(text):
            if not defines(ROOT / file, symbol):
                wrong.append(f"{page.relative_to(ROOT)}: {file}::{symbol} is not there")
        for target in LINK.findall(FENCE.sub("", text)):
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target} is not there")
    return wrong


def defines(path: Path, symbol: str) -> bool:
    """Does the file define symbol (a function, a class, Class.method or a constant)?"""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":  # Cython and CUDA: any definition-like line
        return re.search(rf"\b{re.escape(symbol)}\s*\(", text) is not None
    names, body = symbol.split("."), ast.parse(text).body
    for depth, name in enumerate(names):
        found = next((node for node in body if name in _names(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", []) if depth + 1 < len(names) else []
    return True


def _names(node) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]


def differing_code() -> list[str]:
    """Pages whose fenced code, exercise marks or code references differ between the languages."""
    wrong = []
    for english, chinese in translated():
        en, zh = (page.read_text(encoding="utf-8") for page in (english, chinese))
        for what, pattern in (("fenced code", FENCE), ("exercise marks", EXERCISE)):
            if pattern.findall(en) != pattern.findall(zh):
                wrong.append(f"{chinese.relative_to(ROOT)}: its {what} is not that of {english.name}")
        if sorted(SYMBOL.findall(en)) != sorted(SYMBOL.findall(zh)):
            wrong.append(f"{chinese.relative_to(ROOT)}: refers to other symbols than {english.name}")
    for found in lessons():
        if EXERCISE.findall(found.text_file("en").read_text(encoding="utf-8")) != found.functions():
            wrong.append(f"{found.number}: the text does not place each exercise once, in order")
        for lang in ("en", "zh"):
            hints = found.hints(lang)
            if list(hints) != found.functions() or any(len(steps) != 3 for steps in hints.values()):
                wrong.append(f"{found.number}: hints ({lang}) are not three for each function")
    return wrong


def broken_examples() -> list[str]:
    """Examples of the texts (fences marked python) that do not run.  One page's run in order, in one namespace."""
    wrong = []
    for page in pages():
        namespace = {}
        for example in EXAMPLE.findall(page.read_text(encoding="utf-8")) if ".zh." not in page.name else ():
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(example, namespace)
            except Exception as error:
                wrong.append(f"{page.relative_to(ROOT)}: an example fails: {error!r}\n{example}")
    return wrong


def missing_translations() -> list[str]:
    there = {english for english, _ in translated()}
    single = [p for p in pages() if ".zh." not in p.name and p.name != "GLOSSARY.md" and p not in there]
    return [f"{page.relative_to(ROOT)}: no Chinese text" for page in single]


def stale() -> list[str]:
    """Translations of an English text that has changed since."""
    report = []
    for english, chinese in translated():
        found = TRANSLATES.match(chinese.read_text(encoding="utf-8"))
        if found is None:
            report.append(f"{chinese.relative_to(ROOT)}: its first line does not name the text that it translates")
        elif found.group(1) != text_hash(english):
            report.append(f"{chinese.relative_to(ROOT)}: {english.name} has changed since it was translated")
    return report


def text_hash(path: Path) -> str:
    return hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()[:12]


def mark(chinese: Path):
    """Write into a translation that it is up to date: python -m lessons._ci.texts lessons/.../lesson.zh.md"""
    english = chinese.with_name(chinese.name.replace(".zh.md", ".md"))
    text = TRANSLATES.sub("", chinese.read_text(encoding="utf-8"), count=1).lstrip("\n")
    line = f"<!-- translates {english.name} sha256:{text_hash(english)} -->"
    chinese.write_text(f"{line}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        mark(Path(name))
