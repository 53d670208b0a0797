"""What the scripts share: one clear line for a mistake, and exit codes that a shell understands."""

from __future__ import annotations

import argparse
import os
import sys

from minisb.errors import MinisbError

BAD_INPUT, INTERRUPTED = 2, 130  # 130 = 128 + SIGINT, what shells report for Ctrl-C


class Parser(argparse.ArgumentParser):
    """argparse, with its mistakes as MinisbError: one line instead of the whole usage."""

    def error(self, message):
        raise MinisbError(f"{message} (see --help)")


def run(main, argv=None) -> int:
    """main(argv) -> its exit code (None is 0); what can go wrong becomes one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" and goes on
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return code
    except MinisbError as error:
        return _fail(str(error), BAD_INPUT)
    except MemoryError:
        return _fail("out of memory: a smaller preset, --batch-size or --seq-len needs less", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has left.  Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}" if code == BAD_INPUT else message, file=sys.stderr)
    return code
