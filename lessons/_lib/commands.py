"""python -m lessons COMMAND: what a student types, from the project's root."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

from lessons._lib import desk, export, pictures
from lessons._lib.book import Lesson, LessonError, check_lesson, lesson, lessons
from lessons._lib.calls import StudentFailed
from lessons._lib.language import language, say
from lessons._lib.sandbox import ROOT, StudentFile

OK, NOT_YET, BAD_INPUT = 0, 1, 2


def main(arguments=None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Chinese letters shows "?" and goes on
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return BAD_INPUT
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except LessonError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return OK


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m lessons", description=say("The lessons of minisb.", "minisb 的课程。")
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, run, help, number=True):
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        if number:
            made.add_argument("number", metavar="LESSON", help=say("its number, 04 for instance", "课程编号，例如 04"))
        return made

    command("doctor", doctor, say("is this machine ready?", "这台机器准备好了吗？"), number=False)
    command("list", list_lessons, say("the lessons, and how far you are", "课程列表与你的进度"), number=False)
    command("start", start, say("copy the exercise into my_lessons/", "把练习复制到 my_lessons/"))
    checking = command("check", check, say("check your file", "检查你的文件"))
    checking.add_argument("--watch", action="store_true", help=say("again at every save", "每次保存后重新检查"))
    hinting = command("hint", hint, say("a hint for the next open function", "给下一个未完成的函数一条提示"))
    hinting.add_argument("step", nargs="?", type=int, choices=(1, 2, 3), default=1, help=say("how strong", "提示强度"))
    hinting.add_argument("--for", dest="function", metavar="FUNCTION", help=say("of this function", "指定函数"))
    command("show", show, say("a picture of your result beside the reference", "画出你的结果与参考结果"))
    command("reset", reset, say("start again; your file is kept under another name", "重新开始；你的文件会改名保留"))
    exporting = command("export", export_lesson, say("an autograder for this lesson", "导出本课的自动评分包"))
    exporting.add_argument("--to", choices=(*export.EXPORTERS, "all"), default="all")
    exporting.add_argument(
        "--out", metavar="DIR", help=say("where to write (default: export/)", "输出目录（默认 export/）")
    )
    making = command("course", course, say("the lessons for a graded course", "为计分课程生成一套课程"), number=False)
    making.add_argument("--seed", type=int, required=True, help=say("of every random input", "所有随机输入的种子"))
    making.add_argument(
        "--variant", type=int, required=True, help=say("which conventions to flip: 0-3", "翻转哪些约定：0-3")
    )
    making.add_argument("--out", metavar="DIR", default="course")
    return parser


def doctor(args) -> int:
    from minisb.doctor import examine

    problems = examine()
    for name, text in lesson_findings():
        print(f"  {name:<12}{text}")
    if any(line.fatal for line in problems):
        print(say("\nThis machine is not ready yet.", "\n这台机器还没有准备好。"))
        return NOT_YET
    print(
        say(
            "\nStart: read lessons/00_know_your_machine/lesson.md, then python -m lessons start 04",
            "\n开始：先读 lessons/00_know_your_machine/lesson.zh.md，再运行 python -m lessons start 04",
        )
    )
    return OK


def lesson_findings():
    """What the lessons themselves need -> pairs (topic, text)."""
    yield (
        "lessons",
        say(
            f"{len(lessons())} here, language {language()} (MINISB_LANG=zh for Chinese)",
            f"共 {len(lessons())} 课，语言 {language()}（MINISB_LANG=en 换成英文）",
        ),
    )
    drawn = importlib.util.find_spec("matplotlib") is not None
    yield (
        "pictures",
        "matplotlib"
        if drawn
        else say(
            'show prints text; for pictures: pip install -e ".[lessons]"',
            'show 只打印文字；要图片请运行：pip install -e ".[lessons]"',
        ),
    )
    with StudentFile("def answer(x):\n    return x + 1\n", "probe.py") as probe:
        try:
            works = probe.function("answer")(1) == 2
        except StudentFailed as failed:
            works = failed.title()
    yield (
        "your code",
        (
            say("runs in a process of its own, with limits", "在独立进程中运行，有时间和内存限制")
            if works is True
            else f"! {works}"
        ),
    )
    yield "your files", f"{desk.folder()}"


def list_lessons(args) -> int:
    done = desk.passed()
    for found in lessons():
        names = found.functions()
        count = sum(name in done.get(found.number, {}) for name in names)
        state = f"{count}/{len(names)}" if names else say("read", "阅读")
        print(f"{found.number}  [{state:^5}]  {found.title()}")
        print(f"             {found.text_file().relative_to(ROOT)}" + (f"   {', '.join(names)}" if names else ""))
    return OK


def start(args) -> int:
    found = lesson(args.number)
    path, new = desk.start(found)
    if not new:
        print(
            say(
                f"{path} is already there, and was left alone (reset starts again).",
                f"{path} 已经存在，没有改动（要重来请用 reset）。",
            )
        )
    print(say("read   ", "阅读  ") + f"{found.text_file()}")
    print(say("write  ", "编写  ") + f"{path}")
    print(say("check  ", "检查  ") + f"python -m lessons check {found.number} --watch")
    return OK


def check(args) -> int:
    found = lesson(args.number)
    if not found.functions():
        return found.check.run()
    path = desk.need(found)
    return watch(found, path) if args.watch else check_file(found, path)


def watch(found: Lesson, path) -> int:
    """Check at every save, until Ctrl-C -> the last result."""
    code = NOT_YET
    try:
        while True:
            seen = stamp(path)  # before the check: a save during it is not missed
            try:
                code = check_file(found, path)
            except LessonError as error:
                code = BAD_INPUT
                print(f"error: {error}")
            print(say("\nwaiting for the next save (Ctrl-C ends)", "\n等待下一次保存（Ctrl-C 结束）"), flush=True)
            while stamp(path) in (seen, None):
                time.sleep(0.3)
            print("\033[2J\033[H" if sys.stdout.isatty() else "", end="")
    except KeyboardInterrupt:
        print()
        return code


def stamp(path):
    """Changes when the file is saved.  None while it is away: some editors put a new file in its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_file(found: Lesson, path) -> int:
    print(say("testing ", "正在检查 ") + str(path), flush=True)
    reports = []
    with open_student(found, path) as student:
        for report in check_lesson(found, student):
            reports.append(report)
            print(report, flush=True)
    desk.note(found, reports)
    open_ones = [r for r in reports if not r.passed]
    print(
        say(
            f"\n{len(reports) - len(open_ones)} of {len(reports)} functions pass.",
            f"\n{len(reports)} 个函数中 {len(reports) - len(open_ones)} 个通过。",
        )
    )
    if not open_ones:
        print(say(f"See it: python -m lessons show {found.number}", f"看图：python -m lessons show {found.number}"))
        return OK
    print(
        say(
            f"Next: {open_ones[0].name}.  A hint: python -m lessons hint {found.number}",
            f"下一个：{open_ones[0].name}。提示：python -m lessons hint {found.number}",
        )
    )
    return NOT_YET


def open_student(found: Lesson, path) -> StudentFile:
    return StudentFile(read(path), str(path), found.refused())


def read(path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LessonError(
            say(f"{path} cannot be read as UTF-8 text: {error}", f"{path} 不能按 UTF-8 文本读取：{error}")
        ) from None


def hint(args) -> int:
    found = lesson(args.number)
    hints = found.hints()
    if not hints:
        raise LessonError(say("this lesson has nothing to write, so no hints.", "本课不用写代码，也就没有提示。"))
    done = desk.passed().get(found.number, {})
    name = args.function or next((n for n in hints if n not in done), None)
    if name is None:
        print(say("everything passes already.", "已经全部通过。"))
        return OK
    if name not in hints:
        raise LessonError(
            say(f"no function {name} here; there are {', '.join(hints)}.", f"没有函数 {name}；有 {', '.join(hints)}。")
        )
    print(f"{name}  {args.step}/3\n{hints[name][args.step - 1]}")
    return OK


def show(args) -> int:
    found = lesson(args.number)
    plt = pictures.pyplot()
    source = ""
    if found.functions():
        path = desk.need(found)
        source = read(path)
        print(say("showing ", "正在画出 ") + str(path))
    with StudentFile(source, f"{found.number}.py", found.refused()) as student:
        try:
            drawn = found.check.show(student.function, plt)
        except StudentFailed as failed:
            print(failed.title() + (f"\n{failed.text}" if failed.text else ""))
            return NOT_YET
        except (ValueError, TypeError, IndexError):  # an array of another shape, say
            command = f"python -m lessons check {found.number}"
            print(say(f"what came cannot be drawn; {command} says more", f"得到的结果画不出来；详情见 {command}"))
            return NOT_YET
    if plt is None:
        print(drawn)
        print(say('(for a picture: pip install -e ".[lessons]")', '（要图片请运行：pip install -e ".[lessons]"）'))
        return OK
    desk.folder().mkdir(parents=True, exist_ok=True)
    picture = desk.folder() / f"{found.number}.png"
    drawn.savefig(picture)
    plt.close(drawn)
    print(say("picture ", "图片 ") + str(picture))
    return OK


def reset(args) -> int:
    path, kept = desk.reset(lesson(args.number))
    print(
        say(f"{path} is fresh", f"{path} 已恢复为初始状态")
        + (say(f"; yours is kept in {kept}", f"；你原来的文件在 {kept}") if kept else "")
    )
    return OK


def export_lesson(args) -> int:
    found = lesson(args.number)
    if not found.functions():
        raise LessonError(say("this lesson has nothing to grade.", "本课没有需要评分的内容。"))
    for name in export.EXPORTERS if args.to == "all" else (args.to,):
        print(f"{name:<12}{export.EXPORTERS[name](found, args.out or 'export')}")
    return OK


def course(args) -> int:
    from lessons._lib.course import make_course

    print(make_course(args.seed, args.variant, args.out))
    return OK
