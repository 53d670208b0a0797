"""Loading natives: what is stale or foreign is left out, with a reason."""

import pytest

from minisb import native
from minisb.backend import choose
from minisb.errors import MinisbError


def test_a_build_for_another_processor_is_not_run(tmp_path):
    note, cpuinfo = tmp_path / "built_for.txt", tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : sse2 sse4_2 avx avx2 fma\n")
    assert native._lacking(note, cpuinfo) == ""  # a wheel leaves no note
    note.write_text(" sse2 avx avx2 fma ht")
    assert native._lacking(note, cpuinfo) == ""  # ht is no instruction set
    note.write_text(" sse2 avx avx2 avx512f fma")
    assert native._lacking(note, cpuinfo) == "avx512f"


def test_an_unknown_native_is_refused():
    with pytest.raises(MinisbError, match="unknown native 'glaa'"):
        choose("cpu", "gla,glaa")


def test_every_native_has_twins_of_known_operations():
    import minisb.ops.gla  # noqa: F401

    for name, module in native.load("all").items():
        assert module.TWINS or name == "linear", f"minisb.cpu.{name} gives nothing"
