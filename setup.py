"""Builds the natives in minisb/cpu.  Everything else about the package stands in pyproject.toml.

Without a compiler the package installs all the same and runs on NumPy alone: every extension is
optional.  An editable install is built for this very machine (-march=native); a wheel is plain.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVES = sorted(path.stem for path in Path("minisb/cpu").glob("*.pyx"))

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
    LINK = ["-fopenmp"]

# W8ASpike promises the same bits on every machine: its sums keep the order in which they are written.
EXACT = {} if sys.platform == "win32" else {"w8aspike": ["-ffp-contract=off", "-fno-associative-math"]}


def note_processor(here):
    """Write down what this processor can do, so that a copy of the folder on another one is not run there."""
    note = Path("minisb/cpu/built_for.txt")
    note.unlink(missing_ok=True)
    if here and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        note.write_text(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), ""))


class BuildNatives(build_ext):
    """Compile several modules at once, and for this machine if the install is editable."""

    def run(self):
        here = self.inplace or getattr(self, "editable_mode", False)
        note_processor(here)
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS + (["-march=native"] if here and sys.platform != "win32" else [])
            extension.extra_compile_args += EXACT.get(extension.name.rsplit(".", 1)[-1], [])
            extension.extra_link_args = LINK
        self.parallel = self.parallel or os.cpu_count()
        super().run()


def extensions():
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    # What Cython needs for its array views is compiled once, in a module that the others share:
    # a copy in each would take four times as long.
    shared = "minisb/cpu/_shared.c"
    subprocess.run([sys.executable, "-m", "cython", f"--generate-shared={shared}"], check=True)
    sources = [
        Extension(f"minisb.cpu.{name}", [f"minisb/cpu/{name}.pyx"], include_dirs=["minisb/cpu"]) for name in NATIVES
    ]
    built = cythonize(
        sources,
        language_level=3,
        quiet=True,
        shared_utility_qualified_name="minisb.cpu._shared",
        compiler_directives={
            "boundscheck": bool(os.environ.get("MINISB_CHECK")),  # MINISB_CHECK=1 pip install -e .  turns checks on
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )
    built.append(Extension("minisb.cpu._shared", [shared]))
    for extension in built:
        extension.optional = True  # cythonize drops it
    return built


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
