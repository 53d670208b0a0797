"""`python -m minisb doctor`: what this machine has, what is slow or missing, and what mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from minisb import blas, gpu, native
from minisb.backend import Backend, CpuBackend, choose, default_threads
from minisb.config import Config
from minisb.errors import MinisbError
from minisb.model import SpikingBrain
from minisb.ops.swiglu import swiglu_forward

HELP = "what this machine has, what is slow or missing, and the command that mends it"

PACKAGE = Path(__file__).parent
NEEDED = ("numpy", "tiktoken", "tqdm", "safetensors")
#: Instruction sets that the natives or BLAS gain from, as /proc/cpuinfo spells them.
USEFUL_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")
#: The step that is timed with and without natives: nano, two of its layers, an eighth of its vocabulary.
PROBE = Config(layers=2, vocab=512, batch_size=2)
#: That step is timed in so many rounds, with and without natives in turn: a busy moment spoils a round, not the answer.
ROUNDS = 3
#: In turn, a product and a loop may cost this many times what they cost apart before we complain.
SPIN_LIMIT = 2.0


@dataclass
class Line:
    """One finding.  A problem has the one command that mends it; `fatal` means no training at all."""

    topic: str
    text: str
    mend: str = ""
    fatal: bool = False


def add_arguments(parser):
    pass


def main(args) -> int:
    """-> 0 if this machine can train, else 1."""
    problems = examine()
    if any(line.fatal for line in problems):
        print("\nThis machine cannot train yet.")
        return 1
    print("\nAll is well: python train_small.py" if not problems else "\nThis machine can train: python train_small.py")
    return 0


def examine() -> list[Line]:
    """Prints each finding as soon as it is known -> the problems among them."""
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about skipped natives: they are lines of their own here
        for check in CHECKS:
            for line in check():
                lines.append(line)
                print(_shown(line), flush=True)
    return [line for line in lines if line.mend]


def _shown(line: Line) -> str:
    mark = " !" if line.mend else "  "
    mended = f"\n{'':14}mend it with: {line.mend}" if line.mend else ""
    return f"{mark}{line.topic:<12}{line.text}{mended}"


# --- the machine


def check_python():
    yield Line("python", f"{platform.python_version()} ({platform.python_implementation()}) in {sys.prefix}")
    yield Line("platform", platform.platform())


def check_cpu():
    name, flags = processor()
    useful = " ".join(flag for flag in USEFUL_FLAGS if flag in flags) or "no vector extensions known"
    cores = default_threads()
    yield Line("cpu", f"{name}, {cores} core{'s' * (cores != 1)} to use; {useful}")


def processor() -> tuple[str, set[str]]:
    """Name and flags of the processor, as far as the system tells."""
    if sys.platform.startswith("linux"):
        try:
            rows = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        except OSError:
            rows = []
        pairs = dict(reversed([map(str.strip, row.split(":", 1)) for row in rows if ":" in row]))
        flags = set((pairs.get("flags") or pairs.get("Features") or "").split())
        return pairs.get("model name") or platform.machine(), flags
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or name
    return name, {"asimd"} if platform.machine().lower() in ("arm64", "aarch64") else set()


def check_packages():
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            yield Line("package", f"{name} is not installed", f"pip install {name}", fatal=True)
    threads = "thread count can be set" if blas.set_threads(default_threads()) else "sets its own thread count"
    found = "its gemm was found" if blas.gemm_addresses()[0] else "its gemm was not found: our own loop multiplies"
    yield Line("numpy", f"{np.__version__}, BLAS {blas.name()}: {found}; {threads}")


# --- the natives


def check_natives():
    status = native.status()
    loaded = [name for name, reason in status.items() if not reason]
    missing = {name: reason for name, reason in status.items() if reason}
    if loaded:
        yield Line("natives", ", ".join(loaded))
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        yield Line("natives", f"without {names}: {reason}", build_command())
    yield from _shadowed(bool(missing))
    yield _speed()


def build_command() -> str:
    """What compiles the natives here, the compiler included if there is none."""
    build = "pip install -e ." if (PACKAGE.parent / "setup.py").exists() else "pip install -e CHECKOUT_OF_MINISB"
    compiler = any(map(shutil.which, ("cc", "gcc", "clang", "cl")))
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if compiler and headers:
        return build
    return f"{_compiler_command()} && {build}"


def _compiler_command() -> str:
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return "winget install Microsoft.VisualStudio.2022.BuildTools"
    if shutil.which("dnf"):
        return "sudo dnf install gcc python3-devel"
    if shutil.which("pacman"):
        return "sudo pacman -S gcc"
    if shutil.which("apk"):
        return "sudo apk add build-base python3-dev"
    return "sudo apt install build-essential python3-dev"


def _shadowed(missing: bool, folders: list[str] | None = None):
    """A plain `pip install .` compiles into site-packages, and a script beside a checkout's minisb
    folder imports that folder instead: slow, with nothing to see."""
    if not missing:
        return
    for folder in sys.path if folders is None else folders:
        other = Path(folder or ".", "minisb", "cpu")
        if other.resolve() == (PACKAGE / "cpu").resolve():
            continue
        if any(found for suffix in EXTENSION_SUFFIXES for found in other.glob(f"*{suffix}")):
            text = f"this minisb is the folder {PACKAGE}; the compiled one in {other.parent} is hidden by it"
            yield Line("install", text, "pip uninstall -y minisb && pip install -e .")
            return


def _speed() -> Line:
    """One training step with and without natives: the best of several rounds, in turn."""
    if not CpuBackend().modules:
        slow = _step_ms(Backend())
        text = f"a small training step takes {slow:.0f} ms without natives; with them it would be several times faster"
        return Line("speed", text)
    # Each round makes its backend anew: the one with natives sets BLAS to one thread, the other to all.
    rounds = [(_step_ms(CpuBackend()), _step_ms(Backend())) for _ in range(ROUNDS)]
    fast, slow = map(min, zip(*rounds, strict=True))
    text = f"a small training step takes {fast:.0f} ms with these natives, {slow:.0f} ms without any"
    if fast <= slow:
        return Line("speed", text)
    text += ": natives should be faster, so other programs may hold the cores they wait for"
    return Line("speed", text, "python train_small.py --threads 1")


def _step_ms(be) -> float:
    model = SpikingBrain(PROBE, be)
    model.store.initialise(0)
    tokens = np.random.default_rng(0).integers(0, PROBE.vocab, (PROBE.batch_size, PROBE.seq_len + 1))
    x, y = be.xp.asarray(tokens[:, :-1]), be.xp.asarray(tokens[:, 1:])
    return _best_ms(lambda: float(model.loss_and_backward(x, y)), 3)  # float: a GPU has then finished


# --- threads that wait by spinning


def check_spinning():
    """NumPy's BLAS and OpenMP keep a pool of threads each; a pool that waits by spinning holds the
    cores that the other one needs.  Apart they are fast, in turn they are not."""
    be = CpuBackend()
    if "swiglu_forward" not in be.natives:
        return
    apart, in_turn = spin_times(be)
    text = f"a product and a loop: {apart:.2f} ms apart, {in_turn:.2f} ms in turn"
    if in_turn <= SPIN_LIMIT * apart:
        yield Line("threads", text)
        return
    # Our own gemm runs in OpenMP's pool; without it BLAS has a second one, and compiling is the cure.
    mend = "export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0" if "linear" in be.modules else build_command()
    yield Line("threads", f"{text}: two pools of threads are in each other's way, or the machine is busy", mend)


def spin_times(be, calls: int = 30) -> tuple[float, float]:
    """Milliseconds of a matrix product plus those of an OpenMP loop, and of the two in turn.

    Medians of single calls: a machine that is busy for a moment is not a machine that spins.
    """
    a, b = np.ones((512, 256), np.float32), np.ones((256, 768), np.float32)
    gate_up = np.ones((512, 768), np.float32)
    product, loop = (lambda: be.gemm(a, b)), (lambda: swiglu_forward(be, gate_up))
    apart = _median_ms(product, calls) + _median_ms(loop, calls)
    return apart, _median_ms(lambda: (product(), loop()), calls)


# --- what else there is


def check_gpu():
    smi = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    known = gpu.driver()
    cuda = f"; the driver knows CUDA {known[0] // 1000}.{known[0] % 1000 // 10}" if known else ""
    seen = smi.replace("\n", "; ") or "no NVIDIA driver (nvidia-smi is not there or sees no GPU)"
    yield Line("gpu", f"{seen}{cuda}")
    wheels = ", ".join(f"{name} {version}" for name, version in gpu.installed().items())
    yield Line("cupy", wheels or "not installed (only a GPU needs it)")
    reason, mend = gpu.trouble()
    if mend:
        yield Line("gpu", f"not used: {reason}", mend)
    elif not reason:
        yield from _gpu_at_work()


def _gpu_at_work():
    """Compile (or take from the cache), launch, multiply: one training step on the GPU."""
    try:
        be, why = choose("cuda")
        yield Line("kernels", f"{why}; the same small training step takes {_step_ms(be):.1f} ms")
    except Exception as error:  # whatever stands in the way is the finding
        yield Line("kernels", f"do not run: {' '.join(str(error).split())[:300]}", "python train_small.py --device cpu")


def check_files():
    try:  # here, so that a missing package is a finding and not a traceback
        from minisb.cache import cache_folder
        from minisb.data import PACKAGED
        from minisb.tokenizer import Tokenizer
    except ImportError as error:
        yield Line("package", f"{error}", f"pip install {' '.join(NEEDED)}", fatal=True)
        return
    folder = cache_folder()
    yield Line("cache", f"{folder}, {_folder_bytes(folder) / 1e6:.1f} MB")
    probe = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(probe, os.W_OK):
        yield Line("cache", f"{probe} cannot be written", "export MINISB_CACHE=FOLDER_YOU_MAY_WRITE", fatal=True)
    try:
        yield Line("tokenizer", f"{Tokenizer.load(PACKAGED).vocab_size} tokens in {PACKAGED.name}")
    except MinisbError as error:
        yield Line("tokenizer", str(error), build_command())


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a temporary file that has just been renamed
            continue
    return total


CHECKS = (check_python, check_cpu, check_packages, check_natives, check_spinning, check_gpu, check_files)


# --- helpers


def _output(*command: str) -> str:
    """What a command prints, or nothing if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _times(call, calls: int) -> list[float]:
    call()
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def _best_ms(call, calls: int) -> float:
    return min(_times(call, calls))


def _median_ms(call, calls: int) -> float:
    return float(np.median(_times(call, calls)))
