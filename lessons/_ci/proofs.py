"""Adapters pass, mutants fail, stubs fail politely, variants are solvable, limits say the truth."""

from __future__ import annotations

import math
import warnings

from lessons._ci import (
    adapters,
    mutants,
    mutants_spikes,  # noqa: F401  (registers its mutants)
)
from lessons._lib.book import check_lesson, lesson, lessons
from lessons._lib.calls import StudentFailed, careful
from lessons._lib.checks import Result
from lessons._lib.conventions import using
from lessons._lib.sandbox import StudentFile

VARIANTS = range(4)


def exercised():
    return [found for found in lessons() if found.functions()]


def adapters_pass(number: str, variant: int = 0, seed: int = 0) -> list[str]:
    """Complaints about adapters that fail, or that come nearer to a limit than a tenth of it."""
    wrong = []
    found = lesson(number)
    with using(seed, variant):
        for report in check_lesson(found, adapters.solutions(number, variant)):
            if not report.passed:
                wrong.append(f"{number}: the adapter fails, variant {variant}:\n{report}")
            for result in report.results:
                if result.limit and result.error > result.limit.value / 10:
                    wrong.append(f"{number} {report.name}, {result.title}: {result.error} is over a tenth of the limit")
                if result.limit and result.error > result.limit.right:
                    wrong.append(f"{number} {report.name}, {result.title}: {result.error} is over 'right'")
    return wrong


def mutants_fail(number: str) -> list[str]:
    """Complaints about mutants that pass, and about limits whose 'nearest wrong one' is not the nearest."""
    wrong, found = [], lesson(number)
    nearest = {}
    if len(mutants.MUTANTS.get(number, ())) < 5:
        wrong.append(f"{number}: fewer than five mutants")
    for name, what, mutant in mutants.MUTANTS.get(number, ()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed = failing_results(getattr(found.check, name), mutant)
        if not failed:
            wrong.append(f"{number} {name}: passes although {what}")
        for limit in {r.limit for r in failed if isinstance(r, Result) and r.limit}:  # each caught by its worst error
            worst = max(r.error for r in failed if isinstance(r, Result) and r.limit == limit)
            nearest[limit] = min(nearest.get(limit, math.inf), worst)
    for limit, error in nearest.items():
        if not 10 * limit.value <= limit.wrong <= error:
            wrong.append(f"{number}: {limit}: the nearest mutant has {error}")
    missing = set(found.functions()) - {name for name, _, _ in mutants.MUTANTS.get(number, ())}
    return wrong + [f"{number} {name}: no mutant" for name in missing]


def failing_results(check, function) -> list:
    """Every complaint that a check has about function, without stopping at the first."""
    failed = []
    try:
        for result in check.__wrapped__(careful(function)):
            if not result.passed:
                failed.append(result)
    except StudentFailed as error:
        failed.append(error)
    return failed


def stubs_are_polite(number: str) -> list[str]:
    """Every stub, run as a student's file is, must say 'not written yet' and nothing worse."""
    found = lesson(number)
    with StudentFile(found.exercise.read_text(encoding="utf-8"), "exercise.py", found.refused()) as stub:
        return [f"{number}: a stub says\n{r}" for r in check_lesson(found, stub) if r.written or r.passed]


def paste_fails_variants(number: str) -> list[str]:
    """The package's code, pasted into a submission, passes the standard course and no other."""
    found, wrong = lesson(number), []
    with StudentFile(adapters.pasted(number), "pasted.py", found.refused()) as student:
        for variant in VARIANTS:
            with using(7, variant):
                failing = [r for r in check_lesson(found, student) if not r.passed]
            if bool(failing) != bool(variant):
                said = "\n".join(map(str, failing)) or "passes"
                wrong.append(f"{number}: pasted package code under variant {variant}: {said}")
    return wrong


def prove(number: str) -> list[str]:
    wrong = adapters_pass(number)
    for variant in VARIANTS:
        wrong += adapters_pass(number, variant, seed=7)
    return wrong + mutants_fail(number) + stubs_are_polite(number) + paste_fails_variants(number)
