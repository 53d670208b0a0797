"""From CUDA source to machine code, without a GPU: what is found, what is cached, what compiles."""

import inspect
from pathlib import Path

import pytest
from test_ops import references

from minisb import kernels, launchers, native
from minisb.errors import MinisbError
from minisb.kernels import Parameter

NO_COMPILER = "not run: no NVRTC (pip install -e '.[cuda-check]')"


needs_compiler = pytest.mark.skipif(not kernels.has_compiler(), reason=NO_COMPILER)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of sources of our own; whatever was read from another is forgotten."""
    for function in (kernels.files, kernels.assembled, kernels.signatures):
        function.cache_clear()
    (tmp_path / "common.cuh").write_text("typedef float real;\n")
    (tmp_path / "twice.cu").write_text(
        "// doubles\n"
        'extern "C" __global__ void twice(\n    const real* x, real* y,  // both (N,)\n    int N, i64 step)\n{\n}\n'
    )
    monkeypatch.setenv("MINISB_CUDA_DIR", str(tmp_path))
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for function in (kernels.files, kernels.assembled, kernels.signatures):
        function.cache_clear()


class Compiler:
    """Counts what it is asked for."""

    version = (13, 0)

    def __init__(self):
        self.asked = []

    def compile(self, source, name, options):
        self.asked.append((source, name, options))
        return b"code", ""


def test_a_folder_counts_if_it_holds_the_common_file(folder, monkeypatch):
    assert kernels.source_folder() == folder
    (folder / "common.cuh").unlink()
    with pytest.raises(MinisbError, match=r"common\.cuh"):
        kernels.source_folder()
    monkeypatch.delenv("MINISB_CUDA_DIR")
    assert (kernels.source_folder() / "gla.cu").exists()


def test_errors_name_the_readers_file_and_line(folder):
    lines = kernels.assembled("twice").splitlines()
    assert lines[0] == '#line 1 "cuda/common.cuh"'
    assert lines[lines.index('#line 1 "cuda/twice.cu"') + 1] == "// doubles"


def test_parameters_are_read_from_the_source(folder):
    stem, parameters = kernels.signatures()["twice"]
    assert stem == "twice" and parameters == (
        Parameter("x", "real", True), Parameter("y", "real", True),
        Parameter("N", "int", False), Parameter("step", "i64", False),
    )  # fmt: skip


def test_machine_code_is_compiled_once_and_anew_after_any_change(folder):
    compiler = Compiler()
    first = kernels.cubin(compiler, "twice", "float32", "sm_80")
    assert first.read_bytes() == b"code" and kernels.cubin(compiler, "twice", "float32", "sm_80") == first
    assert len(compiler.asked) == 1
    assert {"--gpu-architecture=sm_80", "-DREAL_float32"} <= set(compiler.asked[0][2])
    others = {
        kernels.cubin(compiler, "twice", "float64", "sm_80"),
        kernels.cubin(compiler, "twice", "float32", "sm_86"),
    }
    compiler.version = (13, 1)
    others.add(kernels.cubin(compiler, "twice", "float32", "sm_80"))
    compiler.version = (13, 0)
    (folder / "common.cuh").write_text("typedef double real;\n")
    kernels.assembled.cache_clear()
    others.add(kernels.compile_files(compiler, ["twice"], "float32", "sm_80")["twice"])
    assert len(others | {first}) == 5


@pytest.mark.parametrize(
    "capability, target", [("90", "sm_90a"), ("86", "sm_86"), ("87", "sm_86"), ("121", "sm_120"), ("75", "sm_75")]
)
def test_the_target_of_a_gpu(capability, target):
    assert kernels.architecture(capability, [75, 80, 86, 89, 90, 100, 120]) == target


def test_a_gpu_that_the_compiler_does_not_know():
    for capability in ("70", "130"):
        with pytest.raises(MinisbError, match=f"compute capability {int(capability) / 10}"):
            kernels.architecture(capability, [75, 80, 86, 89, 90])


def test_the_assemblers_report_is_understood():
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_80'\nptxas info    : Function properties for f\n"
        "ptxas         .     512 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 0 barriers\n"
    )
    assert kernels.uses(log) == [kernels.Use("f", 72, 512, 16)]


def test_every_kernel_is_launched_and_every_launch_has_a_kernel():
    source = "".join(path.read_text("utf-8") for path in Path(launchers.__file__).parent.glob("*.py"))
    for name in kernels.signatures():
        assert f'"{name}"' in source, name


def test_cuda_twins_take_what_the_references_take():
    known = references()
    assert set(launchers.MODULES) <= set(native.MODULES)
    for twin in (twin for twins in launchers.MODULES.values() for twin in twins):
        ours, theirs = (inspect.signature(f).parameters.values() for f in (twin, known[twin.__name__]))
        assert [(p.name, p.default is p.empty) for p in ours] == [(p.name, p.default is p.empty) for p in theirs], twin


def test_without_the_compiler_the_check_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "has_compiler", lambda: False)
    assert kernels.main([]) == 2
    assert "cuda-check" in capsys.readouterr().err


@needs_compiler
@pytest.mark.parametrize("target", ["sm_75", "sm_90a"])
def test_a_small_file_compiles_for_every_element_type(target, capsys):
    assert kernels.main(["--arch", target, "--file", "spike", "--verbose"]) == 0
    report = capsys.readouterr().out
    assert all(element in report for element in kernels.ELEMENTS) and "4 files compiled" in report


@needs_compiler
def test_a_mistake_is_reported_with_its_place(folder, capsys):
    (folder / "twice.cu").write_text('extern "C" __global__ void twice(real* x)\n{\n    x[0] = y;\n}\n')
    assert kernels.main(["--arch", "sm_80", "--dtype", "float32"]) == 1
    assert "cuda/twice.cu(3): error" in capsys.readouterr().err
