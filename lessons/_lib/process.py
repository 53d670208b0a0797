"""The student's process: `python -m lessons._lib.process`, started by lessons/_lib/sandbox.py.

It loads the student's file and calls its functions, one a line of JSON.  It never sees an expected
value: those stay with the runner, so there is nothing here to find, and nothing to forge either.
What the student prints goes to stderr, because stdout belongs to the conversation with the runner.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import types

import numpy as np

from lessons._lib import guard, wire
from lessons._lib.calls import StudentFailed, call_carefully, describe, used_by
from lessons._lib.language import say


def main():
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    np.random.default_rng(0)  # imports its parts now, while they can be read
    answers.write(wire.line({}))  # ready: what comes now is the student's time
    answers.flush()
    settings = wire.read(requests.readline())
    limit_memory(settings["memory_mb"])
    drop_root(settings["user"])
    guard.refuse(tuple(settings["refused"]))
    student, answer = types.ModuleType("student"), {}
    sys.modules["student"] = student
    try:
        load(student, settings["name"], settings["source"])
        answer = {"uses": wire.pack(uses(student))}
    except BaseException as error:  # SystemExit too: exit() at the top of a file
        answer = failed(error)
    answers.write(wire.line(answer))
    answers.flush()
    for request in requests:
        answers.write(wire.line(call(student, wire.read(request))))
        answers.flush()


def load(module, name: str, source: str):
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks show lines
    module.__file__ = name
    exec(compile(source, name, "exec"), module.__dict__)


def uses(module) -> dict[str, list[str]]:
    """Function -> the functions of the same file that it calls: so that a failure can name where it begins."""
    there = dict(vars(module))
    return {name: sorted(used_by(f, there) - {name}) for name, f in there.items() if hasattr(f, "__code__")}


def call(module, request) -> dict:
    function = getattr(module, request["name"], None)
    if not callable(function):
        text = say(
            f"define {request['name']} at the top level, with this very name",
            f"请在顶层定义 {request['name']}，名字不要改",
        )
        return {"failed": "missing", "text": text}
    try:
        value = call_carefully(function, wire.unpack(request["args"]))
        return {"value": wire.pack(value)}
    except TypeError as error:  # a value that cannot travel
        return {"failed": "raised", "text": say(f"it returned {error}; return arrays", f"它返回了 {error}；请返回数组")}
    except BaseException as error:
        return failed(error)


def failed(error: BaseException) -> dict:
    if isinstance(error, StudentFailed):
        return {"failed": error.kind, "text": error.text}
    if isinstance(error, MemoryError):
        return {"failed": "memory", "text": ""}
    kind = "refused" if getattr(error, "is_refusal", False) else "raised"
    return {"failed": kind, "text": describe(error)}


def limit_memory(megabytes: int):
    try:
        import resource
    except ImportError:  # Windows: the time limit remains
        return
    with contextlib.suppress(ValueError, OSError):  # macOS has the limit but does not let it be set
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def drop_root(user: int | None):
    """In graders: the student's code runs as nobody, from a folder that holds nothing."""
    if user is None:
        return
    os.chdir("/")
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


if __name__ == "__main__":
    main()
