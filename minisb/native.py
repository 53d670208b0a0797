"""Loading the compiled twins in minisb/cpu, and saying in a sentence why one is not there."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path

from minisb.errors import MinisbError

#: One module per operation; each has a table TWINS of operation name -> function.
MODULES = (
    "linear", "ffn", "spike", "norm", "rope", "heads", "swiglu", "cross_entropy", "gla", "attention", "adamw", "gate",
    "embedding", "w8aspike", "moe", "sinks", "decode",
)  # fmt: skip


def _lacking(note: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first vector instruction set that the build used and this processor has not, or ""."""
    if not note.exists() or not cpuinfo.exists():
        return ""
    built_for, here = set(note.read_text().split()), set(cpuinfo.read_text().split())
    vector = ("sse4_2", "avx", "fma", "bmi2", "avx2", "avx_vnni", "avx512")
    return next((flag for flag in sorted(built_for - here) if flag.startswith(vector)), "")


@functools.cache
def _load(module: str):
    """(module, "") or (None, the reason)."""
    found = importlib.util.find_spec(f"minisb.cpu.{module}")
    if found is None or found.origin is None:
        return None, "not compiled"
    compiled = Path(found.origin)
    source = Path(__file__).parent / "cpu" / f"{module}.pyx"
    if source.exists() and source.stat().st_mtime > compiled.stat().st_mtime + 1:
        return None, f"older than {source.name}: run `pip install -e .` again"
    lacking = _lacking(compiled.parent / "built_for.txt")
    if lacking:
        return None, f"built for another processor (this one lacks {lacking}): run `pip install -e .` again"
    try:
        return importlib.import_module(f"minisb.cpu.{module}"), ""
    except (ImportError, OSError) as error:
        return None, f"cannot be loaded here ({error})"


def chosen(select: str, modules) -> list[str]:
    """The names in `select`: "all", "none" or a comma-separated list of `modules`.

    Raises MinisbError for another name.
    """
    names = list(modules) if select == "all" else [n for n in select.split(",") if n and n != "none"]
    unknown = [n for n in names if n not in modules]
    if unknown:
        raise MinisbError(f"unknown native {unknown[0]!r}; choose from all, none, {', '.join(modules)}.")
    return names


def load(select: str = "all") -> dict:
    """The natives named by `select` ("all" or a comma-separated list of MODULES).

    Missing ones are left out; a stale or foreign one is named in a warning.  Raises MinisbError
    for a name that is not in MODULES.
    """
    loaded = {}
    for name in chosen(select, MODULES):
        module, reason = _load(name)
        if module is not None:
            loaded[name] = module
        elif reason != "not compiled":
            warnings.warn(f"minisb.cpu.{name} is skipped: {reason}.", stacklevel=2)
    return loaded


def status() -> dict[str, str]:
    """Module name -> "" if it is loaded, else the reason."""
    return {name: _load(name)[1] for name in MODULES}


def why_missing() -> str:
    reasons = {reason for reason in status().values() if reason}
    return f"the natives are {' and '.join(sorted(reasons))} (see `python -m minisb doctor`)"
