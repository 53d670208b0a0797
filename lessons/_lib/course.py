"""python -m lessons course: the lessons with a seed and conventions of a course's own."""

from __future__ import annotations

from pathlib import Path

from lessons._lib import kit, notebook
from lessons._lib.book import LessonError, lessons
from lessons._lib.conventions import Settings, flipped
from lessons._lib.language import say

NOTE = {
    "en": "> **This course changes {count} of the lesson's conventions.** Where the text, a hint or the package "
    "does it differently, this box and the exercise hold:\n",
    "zh": "> **本课程改变了这一课的 {count} 个约定。** 课文、提示或代码包与此不同之处，以本框和练习文件为准：\n",
}


def make_course(seed: int, variant: int, out) -> str:
    """Two folders: out/for_students (public seed 0) and out/for_grading (the secret seed), same variant."""
    if not 0 <= variant <= 3:
        raise LessonError(say(f"variants are 0 to 3, got {variant}.", f"变体是 0 到 3，得到 {variant}。"))
    out = Path(out)
    if out.exists():
        raise LessonError(say(f"{out} is already there.", f"{out} 已经存在。"))
    for name, used in (("for_students", 0), ("for_grading", seed)):
        folder = out / name
        kit.copy(lessons(), folder, Settings(used, variant))
        for lesson in lessons():
            restate(lesson, folder / "lessons" / lesson.folder.name, variant)
        notebook.write(folder / "lessons")
    return say(
        f"{out / 'for_students'}: to hand out\n{out / 'for_grading'}: keep it; export autograders there",
        f"{out / 'for_students'}：发给学生\n{out / 'for_grading'}：自己保留，在其中导出评分包",
    )


def restate(lesson, folder: Path, variant: int):
    """Write the flipped conventions into the copied exercise and texts."""
    conventions = [c for c in lesson.check.CONVENTIONS if c.name in flipped(lesson.check.CONVENTIONS, variant)]
    if not conventions:
        return
    for file in ("exercise.py", "lesson.md", "lesson.zh.md"):
        text = (folder / file).read_text(encoding="utf-8")
        for convention in conventions:
            if file == "exercise.py" and convention.standard not in text:
                raise LessonError(f"{lesson.exercise} does not state: {convention.standard}")
            text = text.replace(convention.standard, convention.flipped)
        lang = "zh" if ".zh." in file else "en"
        if file.endswith(".md"):
            title, rest = text[text.index("# ") :].split("\n", 1)
            colon = {"en": ": ", "zh": "："}[lang]
            points = "".join(f"> - {getattr(c, lang)}{colon}`{c.flipped}`\n" for c in conventions)
            text = f"{title}\n\n{NOTE[lang].format(count=len(conventions))}>\n{points}{rest}"
        (folder / file).write_text(text, encoding="utf-8")
