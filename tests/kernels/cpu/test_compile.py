"""Kernels in C: built once, kept, built again where damaged, and done without where they cannot be."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_train.kernels.cpu import compile

BUILDS = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(not BUILDS, reason="no C compiler here")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new C file, an empty cache folder, and a processor with all flags."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compile.SWITCH, raising=False)
    monkeypatch.setattr(compile, "processor_flags", lambda: frozenset(compile._REQUIRED_FLAGS))
    monkeypatch.setattr(compile, "_FLAG_OPTIONS", ())
    monkeypatch.setattr(compile, "_compiler", compile._compiler.__wrapped__)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    return folder / "answer.c"


def built(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "moe_train" / "kernels").iterdir())


def answer(source: Path) -> int | None:
    library = compile.library.__wrapped__(source)
    return None if library is None else library.answer()


@needs_compiler
def test_built_once_and_anew_when_a_text_changes(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (first,) = built(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert answer(source) == 42 and first.stat().st_mtime_ns == stamp
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert answer(source) == 43
    assert len(built(tmp_path)) == 2


@needs_compiler
def test_a_damaged_library_is_built_again(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "moe_train" / "kernels"
    command = compile._compiler()
    assert command is not None
    compile._load_or_build(source, command)
    (first,) = built(tmp_path)
    name = first.name
    shutil.rmtree(folder)  # a loaded file must not be written over
    folder.mkdir(mode=0o700)
    (folder / name).write_bytes(b"cut")
    assert answer(source) == 42


@needs_compiler
def test_a_place_where_others_may_write_is_not_used(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "moe_train" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert answer(source) == 42
    assert built(tmp_path) == []


@needs_compiler
def test_what_does_not_compile_is_said(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("int answer(void) { return FORTY; }\n")
    with caplog.at_level(logging.WARNING):
        assert answer(source) is None
    assert "answer.c could not be built" in caplog.text and "FORTY" in caplog.text


def test_without_a_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert answer(source) is None
    assert "there is no C compiler" in caplog.text and f"{compile.SWITCH}=off" in caplog.text


def test_switched_off_and_on_other_processors_nothing_is_said(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for word in ("off", "0", "False"):
        with monkeypatch.context() as patch:
            patch.setenv(compile.SWITCH, word)
            assert answer(source) is None
    monkeypatch.setattr(compile, "processor_flags", lambda: frozenset({"avx2"}))
    assert answer(source) is None
    assert not caplog.records


@needs_compiler
@pytest.mark.parametrize("name", ["amx_linear", "amx_mlp", "attention", "dropout", "segment_sum", "smoothed_loss"])
def test_the_kernels_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    """On any x86-64 machine with a compiler that knows the unit, whether the processor has it or not."""
    if platform.machine() != "x86_64":
        pytest.skip("the kernels are for x86-64")
    compiler = compile._compiler.__wrapped__()
    assert compiler is not None
    command = [*compiler, *compile._FLAGS, *compile._FLAG_OPTIONS, f"-I{compile._HEADERS}"]
    if subprocess.run([*command, "-E", "-x", "c", os.devnull], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} does not know AMX")
    source = str(compile._HEADERS / f"{name}.c")
    built = [*command, "-Wall", "-Wextra", "-Werror", source, "-o", str(tmp_path / "kernel.so")]
    done = subprocess.run(built, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_processes_that_build_at_once(source: Path, tmp_path: Path) -> None:
    command = compile._compiler()
    assert command is not None
    with ThreadPoolExecutor(4) as four:
        libraries = list(four.map(lambda _: compile._load_or_build(source, command), range(4)))
    assert [library.answer() for library in libraries] == [42] * 4
    assert len(built(tmp_path)) == 1


@needs_compiler
def test_library_for_bf16_on_cpu_only(source: Path) -> None:
    """For bf16 on the CPU, unless torch's operators are traced."""
    rows = torch.zeros(1, dtype=torch.bfloat16)
    assert compile.library_for(rows, source) is not None
    assert compile.library_for(rows.float(), source) is None
    assert compile.library_for(rows.to("meta"), source) is None
    with FlopCounterMode(display=False):
        assert compile.library_for(rows, source) is None
