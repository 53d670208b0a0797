"""Calling a student's function: what may go wrong, said in one sentence, and nothing of ours in it.

Used on both sides: in a notebook the check calls the function directly; from the command line and
in graders the function lives in a process of its own (lessons/_lib/sandbox.py).
"""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import traceback
import types

import numpy as np

from lessons._lib.language import say

KINDS = {
    "not written": ("not written yet", "还没有写"),
    "raised": ("it raised an error", "运行时出错"),
    "nothing": ("it returned nothing", "没有返回值"),
    "changed": ("it changed its inputs", "改动了输入"),
    "slow": ("it took too long", "运行时间太长"),
    "memory": ("it ran out of memory", "内存不足"),
    "refused": ("it asked for what this lesson writes", "用到了本课要你自己写的东西"),
    "missing": ("it is not in your file", "你的文件里没有它"),
    "stopped": ("its process stopped", "进程中途退出"),
}


class StudentFailed(Exception):
    """The student's code did not give a value.  kind: one of KINDS.  text: details for the student."""

    def __init__(self, kind: str, text: str = ""):
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def title(self) -> str:
        return say(*KINDS[self.kind])


def careful(function):
    """function, with its failures as StudentFailed and its inputs protected."""
    if getattr(function, "is_careful", False):
        return function

    def call(*args):
        return call_carefully(function, args)

    call.is_careful = True
    return call


def call_carefully(function, args):
    args = copy.deepcopy(args)
    kept = copy.deepcopy(args)
    try:
        value = function(*args)
    except NotImplementedError as error:
        raise StudentFailed("not written", str(error)) from None
    except MemoryError:
        raise StudentFailed("memory") from None
    except Exception as error:
        kind = "refused" if getattr(error, "is_refusal", False) else "raised"
        raise StudentFailed(kind, describe(error)) from None
    if value is None:
        raise StudentFailed("nothing", say("Does every path end in `return`?", "每条路径都以 return 结束吗？"))
    for place, (before, after) in enumerate(zip(kept, args, strict=True)):
        if isinstance(before, np.ndarray) and not np.array_equal(before, after, equal_nan=True):
            raise StudentFailed(
                "changed",
                say(
                    f"argument {place + 1} is not what it was.  `x *= y` writes into x; `x = x * y` makes a new array.",
                    f"第 {place + 1} 个参数被改动了。`x *= y` 写进 x 本身；`x = x * y` 才是新数组。",
                ),
            )
    return value


class TimeIsUp(BaseException):
    """Raised in the middle of the student's code; no `except Exception` of theirs holds it."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """StudentFailed("slow") if what is inside takes longer; for graders without a process for the student.

    Needs the main thread of a system with alarms (Linux, macOS); elsewhere there is no limit.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TimeIsUp:
        raise too_slow(seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def too_slow(seconds: float) -> StudentFailed:
    text = say(
        f"stopped after {seconds:g} s.  Which loop never ends, or works too often?",
        f"{seconds:g} 秒后被停止。哪个循环不会结束，或者做了太多次？",
    )
    return StudentFailed("slow", text)


def used_by(function, among: dict) -> set[str]:
    """Names of the functions of `among` that function refers to, itself or through another one of them."""
    found, open_ones = set(), [getattr(function, "__code__", None)]
    while open_ones:
        code = open_ones.pop()
        if not isinstance(code, types.CodeType):
            continue
        open_ones += code.co_consts  # loops in brackets and inner functions are code of their own
        for name in set(code.co_names) - found:
            inner = getattr(among.get(name), "__code__", None)
            if isinstance(inner, types.CodeType):
                found.add(name)
                open_ones.append(inner)
    return found


def describe(error: BaseException) -> str:
    """The error and the lines of the student's own file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = ("lessons/_lib", "lessons\\_lib")
    lines = [f"line {f.lineno}, in {f.name}: {f.line}" for f in frames if not any(o in f.filename for o in ours)]
    return "\n".join([f"{type(error).__name__}: {error}", *lines[:4], *_advice(error)])


def _advice(error) -> list[str]:
    """A word on what the message of an error does not say to a beginner."""
    if "truth value of an array" in str(error):
        return [
            say(
                "`if`, `max` and `and` want one number; for every entry at once: np.where, np.maximum, a mask.",
                "`if`、`max`、`and` 只认一个数；要对每个元素同时判断，用 np.where、np.maximum 或掩码。",
            )
        ]
    if isinstance(error, ValueError) and ("shape" in str(error) or "dimension" in str(error)):
        return [
            say(
                "Print the shapes of both sides on that line and compare them with the docstring.",
                "在那一行打印两边的形状，与文档字符串对照。",
            )
        ]
    return []
