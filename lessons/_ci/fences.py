"""Ways round the import hook that a student may try: each must be refused; limits must hold."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

from lessons._lib.calls import StudentFailed
from lessons._lib.sandbox import ROOT, StudentFile

MODULE = "minisb.ops.gla"
FILE = ROOT / "minisb" / "ops" / "gla.py"
WAYS = {
    "import": "import minisb.ops.gla",
    "from the package": "from minisb.ops import gla",
    "from the module": "from minisb.ops.gla import gla_step",
    "importlib": "import importlib; importlib.import_module('minisb.ops.gla')",
    "__import__": "__import__('minisb.ops.gla')",
    "through a layer": "import minisb.layers",
    "through the model": "from minisb.model import SpikingBrain",
    "its compiled twin": "import minisb.cpu.gla",
    "the adapters": "from lessons._ci import adapters",
    "after sys.modules is emptied": """import sys
for n in [n for n in sys.modules if n.startswith('minisb')]:
    del sys.modules[n]
import minisb.ops.gla""",
    "without the importer": "import sys; sys.meta_path.pop(0)\nimport minisb.ops.gla",
    "with fresh importers": """import sys, importlib.machinery as m
sys.meta_path[:] = [m.BuiltinImporter, m.FrozenImporter, m.PathFinder]
from minisb.ops.gla import gla_step""",
    "a loader for the file": """import importlib.util as u
s = u.spec_from_file_location('x', {file!r})
m = u.module_from_spec(s)
s.loader.exec_module(m)""",
    "its text": "exec(open({file!r}).read())",
    "its text by a relative path": "import os; os.chdir({folder!r}); open('gla.py').read()",
    "its text by pathlib": "import pathlib; pathlib.Path({file!r}).read_text()",
    "a link to it": "import os; os.symlink({file!r}, '/tmp/minisb-lessons-link.py')",
    "another Python": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import minisb.ops.gla'])",
    "a shell": "import os; os.system('cat {file}')",
    "a fork": "import os; os.fork()",
}
LATER = "def f():\n    import importlib\n    return importlib.import_module('minisb.ops.gla')"


def refusals() -> list[str]:
    """Complaints about ways that are not refused."""
    wrong = []
    sources = {way: code.format(file=str(FILE), folder=str(FILE.parent)) for way, code in WAYS.items()}
    sources = {way: code + "\ndef f(): return 1" for way, code in sources.items()} | {"inside a function": LATER}
    for way, kind in zip(sources, failures(sources.values()), strict=True):
        if kind != "refused":
            wrong.append(f"not refused: {way} ({kind})")
    return wrong


def limits() -> list[str]:
    """Complaints about limits that do not hold and failures that are not polite."""
    expected = {
        "def f():\n    while True: pass": "slow",
        "while True: pass": "slow",
        "def f():\n    import numpy as np\n    return np.ones((1 << 14, 1 << 14))": "memory",
        "def f():\n    import os\n    os._exit(0)": "stopped",
        "exit()": "raised",
        "def f():\n    return 1 / 0": "raised",
        "def f(": "raised",
        "def f():\n    pass": "nothing",
        "def g():\n    return 1": "missing",
        "def f():\n    raise NotImplementedError": "not written",
        "def f():\n    return object()": "raised",
        "def f():\n    print('x' * 100000)\n    input()": "raised",
    }
    came = dict(zip(expected, failures(expected), strict=True))
    return [f"{kind} expected, {came[code]} came: {code}" for code, kind in expected.items() if came[code] != kind]


def failures(sources) -> list[str]:
    """failure() of each; most of the time goes into starting processes, so a few at once."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(failure, sources))


def failure(source: str) -> str:
    """How calling f() of a student's file with this source fails."""
    refused = (MODULE, "minisb.cpu.gla", "lessons._ci")
    seconds = 2 if "while True" in source else 15
    with StudentFile(source, "student.py", refused, seconds, stderr=subprocess.DEVNULL) as student:
        try:
            student.function("f")()
        except StudentFailed as failed:
            return failed.kind
    return "nothing failed"
