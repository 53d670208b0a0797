"""CUDA kernels from source to machine code: where they lie, what they take, NVRTC, the cache of cubins.

Nothing here needs a GPU.  `python -m minisb.kernels` compiles every kernel for every element type and
architecture, and says what each takes in registers: a check that runs anywhere (extra `cuda-check`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minisb.cache import atomic_write, cache_folder
from minisb.errors import MinisbError

#: How activations may be stored, by NumPy's name; gradient checks need float64.
ELEMENTS = ("float32", "float64", "bfloat16", "float16")
HALVES = ("bfloat16", "float16")
#: What the check compiles for: from the T4 of a free notebook (75) to Hopper, whose own instructions need the `a`.
#: At both ends all; between them only what the sources tell apart (bfloat16's rounding and tensor cores begin with
#: sm_80), and a sample where they do not.
ARCHITECTURES = {
    "sm_75": ELEMENTS,
    "sm_80": HALVES,
    "sm_86": ("bfloat16",),
    "sm_89": ("bfloat16",),
    "sm_90a": ELEMENTS,
}
#: Files that a run in two bytes uses in float32 too: plans, sums, the loss, the optimizer's step.
MIXED = ("adamw", "cross_entropy", "moe", "moe_plan", "reduce", "sinks")
#: Files whose names begin so are of use to some models only, and wait for the first of them.
SPECIAL = ("moe", "w8aspike")
COMMON, TENSOR_CORES = "common.cuh", "tensor_cores.cuh"
#: Profilers want to know the line of every instruction; that costs a tenth of the compiler's time.
OPTIONS = ("--std=c++17", *(["-lineinfo"] if os.environ.get("MINISB_NVTX") else []))
INCLUDE = r'^#include "(\w+\.cuh)"$'
KERNEL = r'extern "C" __global__ void\s+(?:__launch_bounds__\([\d, ]+\)\s+)?(\w+)\s*\(([^)]*)\)'
JOBS = 16  # files compiled at once, at most


def element(name: str):
    """The NumPy dtype of an element type by its name; bfloat16 is one of the package ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


# --- sources


def source_folder() -> Path:
    """The folder of the .cu files: $MINISB_CUDA_DIR, the installed package's, or the checkout's.

    A folder counts only if it holds common.cuh.  Raises MinisbError if none does.
    """
    package = Path(__file__).parent
    asked = os.environ.get("MINISB_CUDA_DIR")
    for folder in (Path(asked),) if asked else (package / "cuda", package.parent / "cuda"):
        if (folder / COMMON).exists():
            return folder
    where = f"$MINISB_CUDA_DIR, {asked}," if asked else "this installation"
    raise MinisbError(f"{where} has no {COMMON}, so there are no CUDA kernels: reinstall minisb from its checkout.")


@functools.cache
def files() -> dict[str, Path]:
    """File stem -> path of every kernel file."""
    return {path.stem: path for path in sorted(source_folder().glob("*.cu"))}


@functools.cache
def assembled(stem: str) -> str:
    """common.cuh, for NAME_fast.cu also tensor_cores.cuh, the headers that the file includes, and the file as one
    text.  #line makes the compiler's errors name the reader's files.

    Prepended and not included, because a cache must see every change of it.
    """
    path = files()[stem]
    shared = (COMMON, TENSOR_CORES) if stem.endswith("_fast") else (COMMON,)
    included = re.findall(INCLUDE, path.read_text("utf-8"), re.MULTILINE)
    parts = (*(path.with_name(name) for name in (*shared, *included)), path)
    texts = {part.name: re.sub(INCLUDE, "", part.read_text("utf-8"), flags=re.MULTILINE) for part in parts}
    return "".join(f'#line 1 "cuda/{name}"\n{text}\n' for name, text in texts.items())


@functools.cache
def has_code(stem: str, element: str, target: str) -> bool:
    """Whether a file has code of its own for an element type and architecture.

    Without `real` and `wide` it says the same for all types, and float32 stands for them.  The kernels of NAME_fast.cu
    are empty but for two-byte types from sm_80 on (TENSOR_CORES), and those with hopper.cuh but for sm_90a (HOPPER).
    """
    text = re.sub(r"//.*", "", files()[stem].read_text("utf-8"))
    if not re.search(r"\b(real|wide)\b", text):
        return element == "float32"
    if "hopper.cuh" in re.findall(INCLUDE, text, re.MULTILINE):
        return element in HALVES and target == "sm_90a"
    return not stem.endswith("_fast") or (element in HALVES and int(target.strip("sm_a")) >= 80)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its element type as written (real, wide, int, ...), and whether it is an array."""

    name: str
    type: str
    array: bool


@functools.cache
def signatures() -> dict[str, tuple[str, tuple[Parameter, ...]]]:
    """Kernel name -> file stem and parameters, as the sources declare them."""
    found = {}
    for stem, path in files().items():
        text = re.sub(r"//.*", "", path.read_text("utf-8"))
        for name, inside in re.findall(KERNEL, text):
            found[name] = stem, tuple(_parameter(part) for part in inside.split(","))
    return found


def _parameter(text: str) -> Parameter:
    declared, star, name = re.fullmatch(r"\s*(?:const )?(\w+)\s*(\*?)\s*(\w+)\s*", text).groups()
    return Parameter(name, declared, bool(star))


# --- the compiler, through either of two packages


class CupyNvrtc:
    """NVRTC as CuPy found it: what a machine with a GPU uses."""

    def __init__(self):
        from cupy.cuda import nvrtc

        self.nvrtc, self.version = nvrtc, tuple(nvrtc.getVersion())

    def architectures(self) -> list[int]:
        return list(self.nvrtc.getSupportedArchs())

    def compile(self, source: str, name: str, options) -> tuple[bytes, str]:
        program = self.nvrtc.createProgram(source, name, (), ())
        try:
            self.nvrtc.compileProgram(program, tuple(options))
            return self.nvrtc.getCUBIN(program), self.nvrtc.getProgramLog(program)
        except self.nvrtc.NVRTCError as error:
            raise CompileError(self.nvrtc.getProgramLog(program)) from error
        finally:
            self.nvrtc.destroyProgram(program)


class BindingsNvrtc:
    """NVRTC through NVIDIA's own `cuda-bindings`: works without a driver."""

    def __init__(self):
        from cuda.bindings import nvrtc

        self.nvrtc = nvrtc
        self.version = self._checked(nvrtc.nvrtcVersion())

    def architectures(self) -> list[int]:
        return list(self._checked(self.nvrtc.nvrtcGetSupportedArchs())[0])

    def compile(self, source: str, name: str, options) -> tuple[bytes, str]:
        nvrtc = self.nvrtc
        (program,) = self._checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
        try:
            (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            log = bytes(self._checked(nvrtc.nvrtcGetProgramLogSize(program))[0])
            self._checked(nvrtc.nvrtcGetProgramLog(program, log))
            log = log.rstrip(b"\0 ").decode("utf-8", "replace")
            if failed:
                raise CompileError(log)
            cubin = bytes(self._checked(nvrtc.nvrtcGetCUBINSize(program))[0])
            self._checked(nvrtc.nvrtcGetCUBIN(program, cubin))
            return cubin, log
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _checked(self, answer):
        if answer[0]:
            raise MinisbError(f"NVRTC failed: {answer[0].name}.")
        return answer[1:]


class CompileError(MinisbError):
    """What the compiler said."""


# --- cubins


def architecture(capability: str, supported: list[int]) -> str:
    """The target for a GPU of compute capability "90", "86", ...: its own, or the nearest older one of
    its generation, whose machine code it runs too.  Raises MinisbError if the compiler knows none."""
    number = int(capability)
    if number not in supported:
        older = [s for s in supported if s // 10 == number // 10 and s < number]
        if not older:
            raise MinisbError(
                f"this GPU has compute capability {number / 10:.1f}, which the installed CUDA compiler does not "
                "know: `python -m minisb doctor` says which CuPy fits."
            )
        number = max(older)
    return "sm_90a" if number == 90 else f"sm_{number}"


def cubin(compiler, stem: str, element: str, target: str) -> Path:
    """The compiled file, from the cache or compiled now and put there whole.

    Its name depends on everything that went into it: text, options, compiler, architecture.
    """
    options = (*OPTIONS, f"--gpu-architecture={target}", f"-DREAL_{element}")
    version = ".".join(map(str, compiler.version))
    text = assembled(stem)
    key = hashlib.sha256("\0".join((text, *options, version)).encode()).hexdigest()[:20]
    path = cache_folder() / "cubins" / f"{stem}-{element}-{target}-{key}.cubin"
    if not path.exists():
        code, _ = compiler.compile(text, f"cuda/{stem}.cu", options)
        with atomic_write(path) as temporary:
            temporary.write_bytes(code)
    return path


def family(stem: str) -> str:
    """Which of SPECIAL a file belongs to; "" for what every model needs."""
    return next((name for name in SPECIAL if stem.startswith(name)), "")


def first_files(element: str, target: str, kind: str = "") -> list[tuple[str, str]]:
    """(File stem, element type) of what a process may need of a family that computes in `element`."""
    stems = [stem for stem in files() if family(stem) == kind]
    own = [(stem, element) for stem in stems if has_code(stem, element, target)]
    return own + [(stem, "float32") for stem in MIXED if element in HALVES and stem in stems]


def compile_files(compiler, wanted, target: str) -> dict[tuple[str, str], Path]:
    """Several (file stem, element type) at once, each in a thread: NVRTC does not hold Python's lock.

    Long files first, so that none is left running alone.
    """
    wanted = sorted(wanted, key=lambda one: -files()[one[0]].stat().st_size)
    with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
        return dict(zip(wanted, pool.map(lambda one: cubin(compiler, *one, target), wanted), strict=True))


# --- the check without a GPU


@dataclass(frozen=True)
class Use:
    """What one kernel takes, as the assembler reports it."""

    kernel: str
    registers: int
    stack: int  # bytes of local memory a thread: arrays indexed at run time, or spills
    spilled: int  # bytes


def uses(log: str) -> list[Use]:
    pattern = r"properties for (\w+)\s[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill[^\n]*\n[^\n]*Used (\d+) reg"
    return [Use(kernel, int(n), int(stack), int(spilled)) for kernel, stack, spilled, n in re.findall(pattern, log)]


def has_compiler() -> bool:
    """Whether the packages of the extra `cuda-check` are here."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def combinations(targets=None, elements=ELEMENTS, stems=None) -> list[tuple[str, str, str]]:
    """(target, element, stem) of what is to be compiled: whatever has code, and without `targets` what ARCHITECTURES
    says."""
    return [
        (target, element, stem)
        for target in targets or ARCHITECTURES
        for element in elements
        for stem in stems or files()
        if has_code(stem, element, target) and (targets or element in ARCHITECTURES[target])
    ]


def check(tasks, jobs: int = 2):
    """Compile `tasks`, combinations(), `jobs` at a time.  Yields (target, element, stem, uses); raises CompileError."""
    compiler = BindingsNvrtc()

    def one(task):
        target, element, stem = task
        options = (*OPTIONS, "--ptxas-options=-v", f"--gpu-architecture={target}", f"-DREAL_{element}")
        try:
            return *task, uses(compiler.compile(assembled(stem), f"cuda/{stem}.cu", options)[1])
        except CompileError as error:
            raise CompileError(f"{stem}.cu, {element}, {target}: {error}") from error

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, tasks)


def summary(tasks) -> str:
    """One sentence: how many files were compiled for what, architectures with the same element types together."""
    types = {target: ", ".join(dict.fromkeys(e for t, e, _ in tasks if t == target)) for target, _, _ in tasks}
    together = {its: ", ".join(t for t in types if types[t] == its) for its in types.values()}
    what = "; ".join(f"{targets} in {its}" for its, targets in together.items())
    files = {stem for _, _, stem in tasks}
    return f"{len(files)} files compiled, {len(tasks)} combinations with code of their own ({what})"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minisb.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", metavar="sm_XX", help="default: all, as ARCHITECTURES says")
    parser.add_argument("--dtype", nargs="+", metavar="T", default=ELEMENTS, choices=ELEMENTS, help=", ".join(ELEMENTS))
    parser.add_argument(
        "--file", nargs="+", metavar="NAME", choices=list(files()), help=f"default: all of {', '.join(files())}"
    )
    parser.add_argument("--verbose", action="store_true", help="registers and local memory of every kernel")
    args = parser.parse_args(argv)
    if not has_compiler():
        print('error: the compiler is not installed: pip install -e ".[cuda-check]"', file=sys.stderr)
        return 2
    began, heavy = time.perf_counter(), set()
    tasks = combinations(args.arch, args.dtype, args.file)
    try:
        for target, element, stem, found in check(tasks):
            for use in found:
                taken = f"{use.registers:>5} registers{use.stack:>6} bytes of stack{use.spilled:>6} spilled"
                if use.spilled:
                    heavy.add(use.kernel)
                if args.verbose or use.spilled:
                    print(f"{target:<8}{element:<10}{stem:<15}{use.kernel:<24}{taken}")
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{summary(tasks)} in {time.perf_counter() - began:.0f} s; spilling: {', '.join(sorted(heavy)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
