"""Messages in English or Chinese: both stand side by side where they are said."""

from __future__ import annotations

import locale
import os

LANGUAGES = ("en", "zh")


def language() -> str:
    """MINISB_LANG if it is set (zh..., anything else is en), else the locale's language."""
    wanted = os.environ.get("MINISB_LANG") or _locale()
    return "zh" if wanted.lower().startswith(("zh", "chinese")) else "en"


def _locale() -> str:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if os.environ.get(name):
            return os.environ[name]
    return locale.getlocale()[0] or ""  # Windows and macOS applications have no LANG


def say(en: str, zh: str) -> str:
    """The sentence in the reader's language."""
    return zh if language() == "zh" else en
