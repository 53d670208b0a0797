"""What a graded course may change: the seed of every random input, and stated conventions.

A lesson's check.py lists its conventions.  Bit i of the course's variant flips the i-th one; variant 0
is the package's own.  A course's folder holds lessons/course.json (see lessons/_lib/course.py).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COURSE_FILE = Path(__file__).resolve().parents[1] / "course.json"


@dataclass(frozen=True)
class Convention:
    """A choice that the lesson states and a course may flip.

    standard, flipped: the statement as it stands in exercise.py (and in the texts), word for word.
    en, zh: what is different, for the note at the top of the course's text.
    """

    name: str
    standard: str
    flipped: str
    en: str
    zh: str


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    variant: int = 0


_settings: Settings | None = None


def settings() -> Settings:
    global _settings
    if _settings is None:
        _settings = Settings(**json.loads(COURSE_FILE.read_text())) if COURSE_FILE.exists() else Settings()
    return _settings


@contextlib.contextmanager
def using(seed: int = 0, variant: int = 0):
    """Check as a course with these settings would; for tests."""
    global _settings
    kept, _settings = _settings, Settings(seed, variant)
    try:
        yield
    finally:
        _settings = kept


def flipped(conventions, variant: int | None = None) -> set[str]:
    """The names of the conventions that this course flips."""
    variant = settings().variant if variant is None else variant
    return {c.name for i, c in enumerate(conventions) if variant >> i & 1}


def rng(*key: int) -> np.random.Generator:
    """Random numbers of a check: the same on every machine, others in every course."""
    return np.random.default_rng([settings().seed, *key])
