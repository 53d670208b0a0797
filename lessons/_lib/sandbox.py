"""The runner's side of the student's process: start it, call into it, stop it when it takes too long."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lessons._lib import wire
from lessons._lib.book import SECONDS
from lessons._lib.calls import StudentFailed, too_slow
from lessons._lib.language import language, say

ROOT = Path(__file__).resolve().parents[2]
STARTUP = 120  # for Python and NumPy to be there, which is not the student's matter
MEMORY_MB = 1024  # of address space, of which NumPy alone maps a third
NOBODY = 65534


class StudentFile:
    """The student's file, in a process of its own that is started when it is first needed.

    refused: modules of the package that the file may not use.
    stderr: where the student's prints go, as subprocess takes it; None shows them.
    as_nobody: give up root's rights in that process (graders run as root).
    """

    def __init__(
        self, source: str, name: str, refused=(), seconds: float = SECONDS, as_nobody: bool = False, stderr=None
    ):
        self.seconds, self.process, self.stderr, self.uses = seconds, None, stderr, {}
        nobody = NOBODY if as_nobody and hasattr(os, "geteuid") and os.geteuid() == 0 else None
        self.settings = {
            "name": name,
            "source": source,
            "refused": list(refused),
            "memory_mb": MEMORY_MB,
            "user": nobody,
        }
        self.deadline = time.monotonic() + seconds

    def function(self, name: str):
        """The student's function of that name, as one that a check can call.  Its time starts now."""
        self.deadline = time.monotonic() + self.seconds

        def call(*args):
            if self.process is None:
                self._start()
            return wire.unpack(self._ask({"name": name, "args": wire.pack(args)})["value"])

        call.is_careful = True
        return call

    def used_by(self, name: str) -> set[str]:
        """The file's other functions that the function of that name calls, as far as the file has told."""
        told = self.uses.get(name, ()) if isinstance(self.uses, dict) else ()
        return set(told) if isinstance(told, tuple) and all(isinstance(n, str) for n in told) else set()

    def close(self):
        if self.process is None:
            return
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdin.close()
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self):
        one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lessons._lib.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            cwd=ROOT,
            env={**os.environ, **one_thread, "MINISB_LANG": language()},
            start_new_session=True,
        )
        self.answers = queue.Queue()
        threading.Thread(target=_read_lines, args=(self.process.stdout, self.answers), daemon=True).start()
        try:
            self.answers.get(timeout=STARTUP)
        except queue.Empty:
            self.close()
            text = say(
                "Python did not start in time: is this machine very busy?", "Python 没能及时启动：机器是不是很忙？"
            )
            raise StudentFailed("stopped", text) from None
        self.deadline = time.monotonic() + self.seconds
        loaded = self._ask(self.settings)
        with contextlib.suppress(Exception):  # what it tells is for messages only, and may be anything
            self.uses = wire.unpack(loaded["uses"])

    def _ask(self, message: dict) -> dict:
        try:
            self.process.stdin.write(wire.line(message))
            self.process.stdin.flush()
            answer = self.answers.get(timeout=max(self.deadline - time.monotonic(), 0.01))
        except queue.Empty:
            self.close()
            raise too_slow(self.seconds) from None
        except (BrokenPipeError, OSError):
            answer = None
        if answer is None:
            self.close()
            raise StudentFailed("stopped")
        if "failed" in answer:
            if "source" in message:  # the file itself did not load: the next call has to try again
                self.close()
            raise StudentFailed(answer["failed"], answer["text"])
        return answer


def _read_lines(pipe, answers):
    """Answers as they come, then None.  Nothing that comes is trusted: a broken line ends the talk."""
    with pipe:
        for text in pipe:
            try:
                answer = wire.read(text)
            except ValueError:
                break
            answers.put(answer if isinstance(answer, dict) else None)
    answers.put(None)
