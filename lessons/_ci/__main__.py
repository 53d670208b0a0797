"""python -m lessons._ci [--strict]: everything that must hold, without network, GPU or Jupyter.

--strict: a translation older than its original is a failure, too, not only a report.
"""

from __future__ import annotations

import sys
import time

from lessons._ci import exports, fences, notebooks, proofs, texts


def sections():
    """Pairs (what must hold, a function that returns complaints)."""
    for found in proofs.exercised():
        yield f"{found.number}: adapters pass, mutants fail, stubs are polite", lambda n=found.number: proofs.prove(n)
    yield "the package's answers are out of reach", fences.refusals
    yield "time, memory and crashes are survived", fences.limits
    yield "symbols and links resolve", texts.unresolved
    yield "the texts' examples run", texts.broken_examples
    yield "code is equal in both languages, exercises and hints are complete", texts.differing_code
    yield "notebooks are rebuilt byte for byte", notebooks.not_rebuilt
    yield "notebooks run, as stubs and solved", notebooks.failing
    yield "the Gradescope export grades right, wrong, hanging and nosy submissions", exports.gradescope
    yield "Gradescope's results are written after every test", exports.unfinished
    yield "the pytest export grades right, wrong and hanging submissions", exports.pytest
    yield "otter's and nbgrader's files, read by small readers", exports.notebook_graders
    yield "a course states its conventions and refuses pasted code", exports.course
    yield "every text is there in Chinese", texts.missing_translations


def main(arguments=None) -> int:
    strict = "--strict" in (sys.argv[1:] if arguments is None else arguments)
    failed, begun = 0, time.monotonic()
    for what, complaints in sections():
        start = time.monotonic()
        wrong = complaints()
        print(f"{'FAIL' if wrong else 'ok':<5}{what}  ({time.monotonic() - start:.1f} s)", flush=True)
        for text in wrong:
            print(f"     {text}")
        failed += bool(wrong)
    old = texts.stale()
    print(f"{'STALE' if old else 'ok':<5} translations" + "".join(f"\n     {text}" for text in old))
    failed += bool(old) and strict
    print(f"lessons: {'all holds' if not failed else f'{failed} sections failed'}, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
