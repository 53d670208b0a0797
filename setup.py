"""Builds the natives in minisb/cpu.  Everything else about the package stands in pyproject.toml.

Without a compiler the package installs all the same and runs on NumPy alone: every extension is
optional.  An editable install is built for this very machine (-march=native); a wheel is plain.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVES = sorted(path.stem for path in Path("minisb/cpu").glob("*.pyx"))
SHARED = "minisb/cpu/_shared.c"

if sys.platform == "win32":
    FLAGS, LINK = ["/O2", "/openmp"], []
elif sys.platform == "darwin":  # Apple's clang has no OpenMP of its own: one thread
    FLAGS, LINK = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"], []
else:
    # Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
    FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-fopenmp"]
    # Our rows are short: a call of memset costs more than the row it clears.
    FLAGS += ["-fno-tree-loop-distribute-patterns", "-g0"]
    # Python's own flags make integers wrap round; then the compiler cannot simplify an index.
    FLAGS += ["-fno-wrapv"]
    FLAGS += ["-w"]  # looking for what to warn of takes 8 % of the time
    LINK = ["-fopenmp"]

# W8ASpike promises the same bits on every machine: its sums keep the order in which they are written.
# The shared module has no loop of ours: it asks arrays for their addresses.
SPECIAL = {"w8aspike": ["-ffp-contract=off", "-fno-associative-math"], "_shared": ["-O1"]}
if sys.platform == "win32":
    SPECIAL = {}

# What Python calls, and a module's start, by the names that Cython gives them: they turn objects into pointers.
GLUE = re.compile(r"^(static (?:CYTHON_SMALL_CODE )?(?:PyObject ?\*|int )__pyx_(?:pw|pf|pymod_exec)_.*)$", re.MULTILINE)
LESS = '__attribute__((optimize("O1")))' if sys.platform.startswith("linux") else ""


def note_processor(here):
    """Write down what this processor can do, so that a copy of the folder on another one is not run there."""
    note = Path("minisb/cpu/built_for.txt")
    note.unlink(missing_ok=True)
    if here and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        note.write_text(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), ""))


def translate(extensions):
    """Cython to C, several modules at once.  A file that is up to date stays."""
    from Cython import __version__
    from Cython.Build import cythonize

    # What Cython needs for its array views is compiled once, in a module that the others share:
    # a copy in each would take four times as long.
    shared = Path(SHARED)
    up_to_date = shared.exists() and __version__ in shared.open().readline()
    command = [sys.executable, "-m", "cython", f"--generate-shared={SHARED}"]
    meanwhile = None if up_to_date else subprocess.Popen(command)
    checks = bool(os.environ.get("MINISB_CHECK"))  # MINISB_CHECK=1 pip install -e .  turns checks on
    cythonize(
        [extension for extension in extensions if extension.sources != [SHARED]],
        language_level=3,
        quiet=True,
        force=checks,
        nthreads=os.cpu_count(),
        shared_utility_qualified_name="minisb.cpu._shared",
        compiler_directives={
            "boundscheck": checks,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )
    if meanwhile and meanwhile.wait():
        raise subprocess.CalledProcessError(meanwhile.returncode, command)
    for extension in extensions:
        source = Path(extension.sources[0]).with_suffix(".c")
        mark_glue(source)
        extension.sources = [str(source)]


def mark_glue(path):
    """Most of a module's C is glue that runs a few hundred times a step: optimised to the full it takes a quarter of
    the compiler's time and saves 0.2 us a call at most.  The loops are functions of their own and stay as they are."""
    text = path.read_text(encoding="utf-8")
    if "MINISB_GLUE" not in text:
        path.write_text(GLUE.sub(r"MINISB_GLUE \1", text), encoding="utf-8")


class BuildNatives(build_ext):
    """Compile several modules at once, and for this machine if the install is editable."""

    def run(self):
        here = self.inplace or getattr(self, "editable_mode", False)
        note_processor(here)
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS + (["-march=native"] if here and sys.platform != "win32" else [])
            extension.extra_compile_args += SPECIAL.get(extension.name.rsplit(".", 1)[-1], [])
            extension.define_macros = [("MINISB_GLUE", LESS)]
            extension.extra_link_args = LINK
        self.parallel = self.parallel or os.cpu_count()
        super().run()

    def build_extensions(self):
        """Translates here, not when setup.py is read: pip reads it three times and builds once."""
        try:
            translate(self.extensions)
        except ImportError:  # no Cython
            self.extensions = []
        # The longest first, so that no core idles while another is left with it.
        self.extensions.sort(key=lambda extension: -Path(extension.sources[0]).stat().st_size)
        super().build_extensions()


def extensions():
    sources = {name: f"minisb/cpu/{name}.pyx" for name in NATIVES} | {"_shared": SHARED}
    return [
        Extension(f"minisb.cpu.{name}", [source], include_dirs=["minisb/cpu"], optional=True)
        for name, source in sources.items()
    ]


if __name__ == "__main__":  # Cython's processes may read this file again
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNatives},
        packages=["minisb", "minisb.ops", "minisb.cpu", "minisb.launchers", "minisb.cuda"],
        package_dir={"minisb.cuda": "cuda"},
        package_data={
            "minisb": ["assets/*"],
            "minisb.cpu": ["*.pyx", "*.pxd", "*.h"],
            "minisb.cuda": ["*.cu", "*.cuh"],
        },
    )
