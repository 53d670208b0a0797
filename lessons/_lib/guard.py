"""Keeps a lesson's answers out of reach of the code that is to find them.

Two layers, installed in the student's process before their file runs, when no part of minisb has
been imported there:
  - an importer that refuses the lesson's modules by name.  Whatever imports them in turn (through
    minisb.layers, say) meets the same refusal;
  - an audit hook, which Python cannot take out again.  It refuses to open those files under any
    name, and to start other programs, where no hook would watch.

A fence, not a wall: the package is public, and who wants to copy can.  Graded courses change the
conventions (lessons/_lib/course.py), so that a copy fails.
"""

from __future__ import annotations

import importlib.abc
import os
import re
import sys

from lessons._lib.language import say

#: Starting a program or a copy of this process would leave the hook behind.
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
#: Events whose arguments are names of files.
FILES = ("open", "import", "ctypes.dlopen", "os.link", "os.symlink", "os.rename", "shutil.copyfile")


class Refusal(ImportError):
    is_refusal = True


def refuse(modules: tuple[str, ...]):
    """From now on `modules` cannot be imported, opened or run in this process."""
    # What can list, copy and read modules lazily is imported first, so that the hook meets only new requests.
    sys.meta_path.insert(0, _Importer(modules))
    files = _pattern(modules)

    def hook(event, args):
        if event in PROGRAMS:
            raise Refusal(
                say(f"the lessons refuse to start other programs ({event})", f"课程不允许启动其他程序（{event}）")
            )
        if event in FILES:
            for name in args:
                if isinstance(name, (str, bytes)) and files.search(os.path.realpath(os.fsdecode(name))):
                    raise Refusal(_reason(os.path.basename(os.fsdecode(name))))

    sys.addaudithook(hook)


class _Importer(importlib.abc.MetaPathFinder):
    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        if any(name == m or name.startswith(m + ".") for m in self.modules):
            raise Refusal(_reason(name))
        return None


def _reason(name: str) -> str:
    return say(
        f"the lessons refuse {name} here: it holds what this exercise is about.  Compare with it once yours passes.",
        f"课程在这里拒绝导入 {name}：它正是本题要写的内容。通过之后再与它比较。",
    )


def _pattern(modules):
    """Matches source, bytecode and compiled files of `modules`: a/b/c.py, a/b/__pycache__/c.cpython-311.pyc, ..."""
    each = []
    for module in modules:
        *folders, name = map(re.escape, module.split("."))
        each.append(r"[/\\]".join([*folders, rf"(__pycache__[/\\])?{name}([./\\]|$)"]))
    return re.compile("|".join(each) or r"(?!)")
