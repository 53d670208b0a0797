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


def forget():
    for function in (kernels.files, kernels.assembled, kernels.signatures, kernels.has_code):
        function.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of sources of our own; whatever was read from another is forgotten."""
    forget()
    (tmp_path / "common.cuh").write_text("typedef float real;\n")
    (tmp_path / "twice.cu").write_text(
        "// doubles\n"
        'extern "C" __global__ void twice(\n    const real* x, real* y,  // both (N,)\n    int N, i64 step)\n{\n}\n'
    )
    monkeypatch.setenv("MINISB_CUDA_DIR", str(tmp_path))
    monkeypatch.setenv("MINISB_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    forget()


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
    others |= set(kernels.compile_files(compiler, [("twice", "float32")], "sm_80").values())
    assert len(others | {first}) == 5


def test_what_has_code_of_its_own(folder):
    hopper = '#include "hopper.cuh"\nreal x'
    texts = {"plain": "real x", "halves_fast": "real x", "hopper": hopper, "ints": "int x // real"}
    (folder / "moe_thing.cu").write_text('real x;\nextern "C" __global__ void moe_thing(int n)\n{\n}\n')
    for stem, text in texts.items():
        (folder / f"{stem}.cu").write_text(f'{text};\nextern "C" __global__ void {stem}(int n)\n{{\n}}\n')
    (folder / "twice.cu").unlink()
    forget()
    own = {
        (element, target): [stem for stem in texts if kernels.has_code(stem, element, target)]
        for element in kernels.ELEMENTS
        for target in ("sm_75", "sm_80", "sm_90a", "sm_120")
    }
    for (element, target), stems in own.items():
        fast = element in kernels.HALVES and target != "sm_75"
        of_hopper = element in kernels.HALVES and target == "sm_90a"
        assert stems == ["plain"] + fast * ["halves_fast"] + of_hopper * ["hopper"] + (element == "float32") * ["ints"]
    assert kernels.first_files("float16", "sm_75") == [("plain", "float16")]
    assert kernels.first_files("float16", "sm_75", "moe") == [("moe_thing", "float16")]


def test_what_is_compiled_without_being_asked(folder):
    (folder / "ints.cu").write_text('extern "C" __global__ void ints(int n)\n{\n}\n')
    (folder / "twice_fast.cu").write_text((folder / "twice.cu").read_text())
    forget()
    tasks = kernels.combinations()
    assert len(tasks) == 5 + 4 + 2 + 2 + 7 and {task for task in tasks if task[0] in ("sm_75", "sm_89")} == {
        *(("sm_75", element, "twice") for element in kernels.ELEMENTS), ("sm_75", "float32", "ints"),
        ("sm_89", "bfloat16", "twice"), ("sm_89", "bfloat16", "twice_fast"),
    }  # fmt: skip
    assert kernels.summary(tasks) == (
        "3 files compiled, 20 combinations with code of their own (sm_75, sm_90a in float32, float64, bfloat16, "
        "float16; sm_80 in bfloat16, float16; sm_86, sm_89 in bfloat16)"
    )
    assert len(kernels.combinations(["sm_89"])) == 7  # who asks gets all


def test_sources_tell_architectures_apart_in_two_ways_only():
    """What that rests on: nothing differs between sm_80 and sm_89, and what may be empty says so in its name."""
    for path in kernels.source_folder().glob("*.cu*"):
        for line in path.read_text("utf-8").splitlines():
            asked = "__CUDA_ARCH" in line
            assert not asked or "__CUDA_ARCH__ >= 800" in line or "__CUDA_ARCH_FEAT_SM90_ALL" in line, line
    for stem, path in kernels.files().items():
        text = path.read_text("utf-8")
        assert ("#if TENSOR_CORES" in text) == stem.endswith("_fast")
        assert ("#if HOPPER" in text) == ("hopper.cuh" in text)


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
    assert all(element in report for element in kernels.ELEMENTS) and "1 files compiled, 4 combinations" in report


@needs_compiler
def test_a_mistake_is_reported_with_its_place(folder, capsys):
    (folder / "twice.cu").write_text('extern "C" __global__ void twice(real* x)\n{\n    x[0] = y;\n}\n')
    assert kernels.main(["--arch", "sm_80", "--dtype", "float32"]) == 1
    assert "cuda/twice.cu(3): error" in capsys.readouterr().err
