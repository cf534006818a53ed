"""csrc/build.py, and what must hold of the sources and objects it makes."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import csrc_build
import pytest

from .conftest import ROOT, run, write_toy

X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "csrc")


def test_builds_a_module_that_loads(toy: Path, tmp_path: Path) -> None:
    result = csrc_build.build_cpu(toy, tmp_path / "out", werror=True)
    assert csrc_build.load(result.path).answer() == 41
    assert set(result.isas) | set(result.skipped_isas) == set(csrc_build.known_isas())
    assert set(result.objects) == set(result.isas)
    for paths in result.objects.values():
        assert sorted(path.stem for path in paths) == ["answer", "other"]
    assert result.info()["isas"] == list(result.isas)


def test_a_changed_copy_in_the_same_build_folder(toy: Path, tmp_path: Path) -> None:
    """The way mutation tests build: in place, objects shared, each module somewhere new."""
    answers = []
    for index, text in enumerate(("41", "42", "43")):
        header = toy / "cpu" / "answer.h"
        header.write_text(f"constexpr int kAnswer = {text};\n")
        result = csrc_build.build_cpu(
            toy, tmp_path / str(index), build_dir=tmp_path / "obj", isas=["baseline"]
        )
        answers.append(csrc_build.load(result.path).answer())
    assert answers == [41, 42, 43]


def test_the_compilers_words_are_in_the_error(toy: Path, tmp_path: Path) -> None:
    (toy / "cpu" / "other.cpp").write_text("int other() { return unknown_thing; }\n")
    with pytest.raises(csrc_build.BuildError, match="unknown_thing") as caught:
        csrc_build.build_cpu(toy, tmp_path / "out")
    assert not isinstance(caught.value, csrc_build.BuildUnavailable)


def test_warnings_are_errors_only_when_asked(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy / "cpu" / "other.cpp"
    source.write_text(
        "namespace BERTFAST_ISA { int other(); int other() { int unused; return 1; } }"
    )
    monkeypatch.delenv("BERTFAST_WERROR", raising=False)
    csrc_build.build_cpu(toy, tmp_path / "out", isas=["baseline"])
    monkeypatch.setenv("BERTFAST_WERROR", "1")
    with pytest.raises(csrc_build.BuildError, match="unused"):
        csrc_build.build_cpu(toy, tmp_path / "out", isas=["baseline"])


def test_a_missing_or_broken_compiler_is_named(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(csrc_build.BuildUnavailable, match="/nonexistent/g"):
        csrc_build.build_cpu(toy, tmp_path / "out")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(csrc_build.BuildUnavailable, match="does not run"):
        csrc_build.build_cpu(toy, tmp_path / "out")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag")
    with pytest.raises(csrc_build.BuildUnavailable, match="no-such-flag"):
        csrc_build.build_cpu(toy, tmp_path / "out")


MAIN = """\
#include <omp.h>
#include <cstdio>
#include "answer.h"
namespace bertfast { namespace baseline { int answer(); } }
int main() {
  int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
  threads += 1;
  std::printf("%d %d\\n", bertfast::baseline::answer(), threads);
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no static programs")
def test_builds_a_program_that_runs_alone(toy: Path, tmp_path: Path) -> None:
    main = tmp_path / "main.cpp"
    main.write_text(MAIN)
    result = csrc_build.build_program(toy, main, tmp_path / "out" / "program", werror=True)
    assert result.path == tmp_path / "out" / "program"
    done = subprocess.run([result.path], env={}, check=True, capture_output=True, text=True)
    assert done.stdout == "41 2\n"
    assert sorted(path.stem for path in result.objects["baseline"]) == ["answer", "other"]
    # Static: a machine of another architecture has none of this one's libraries.
    segments = subprocess.run(
        ["readelf", "-lW", result.path], check=True, capture_output=True, text=True
    ).stdout
    assert "INTERP" not in segments
    # And up to date when one source is changed in place.
    (toy / "cpu" / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    csrc_build.build_program(toy, main, result.path, werror=True)
    done = subprocess.run([result.path], check=True, capture_output=True, text=True)
    assert done.stdout == "42 2\n"


def test_a_program_is_built_by_the_compiler_asked_for(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = tmp_path / "main.cpp"
    main.write_text(MAIN)
    monkeypatch.setenv("CXX", refusing_compiler(tmp_path, "-fopenmp"))
    # What would ship without threads is no program for the gates.
    with pytest.raises(csrc_build.BuildError, match="fopenmp"):
        csrc_build.build_program(toy, main, tmp_path / "program")
    monkeypatch.setenv("CXX", "/nonexistent/aarch64-g++")
    with pytest.raises(csrc_build.BuildUnavailable, match="/nonexistent/aarch64-g"):
        csrc_build.build_program(toy, main, tmp_path / "program")


def refusing_compiler(folder: Path, *flags: str) -> str:
    """A compiler that knows everything but some flags."""
    real = shutil.which("g++") or shutil.which("c++")
    cases = "|".join(flags)
    path = folder / "refuses"
    path.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do case "$word" in {cases})\n'
        "  echo \"error: unrecognized command-line option '$word'\" >&2; exit 1;; esac; done\n"
        f'exec {real} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not X86, reason="other architectures have one instruction set")
def test_a_refused_instruction_set_is_left_out_with_the_reason(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", refusing_compiler(tmp_path, "-mavx512bf16"))
    result = csrc_build.build_cpu(toy, tmp_path / "out")
    assert result.isas == ("baseline", "avx2", "avx512")
    assert "-mavx512bf16" in result.skipped_isas["avx512_bf16"]
    with pytest.raises(csrc_build.BuildUnavailable, match="mavx512bf16"):
        csrc_build.build_cpu(toy, tmp_path / "out", isas=["avx512_bf16"])


def test_without_openmp_it_builds_single_threaded_and_says_so(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", refusing_compiler(tmp_path, "-fopenmp"))
    result = csrc_build.build_cpu(toy, tmp_path / "out", isas=["baseline"])
    assert not result.openmp
    assert "-fopenmp" in result.openmp_reason
    assert result.info()["openmp_reason"] == result.openmp_reason
    assert csrc_build.load(result.path).answer() == 41


def test_a_sanitized_module_catches_an_overrun(toy: Path, tmp_path: Path) -> None:
    try:
        preload = csrc_build.sanitizer_preload()
    except csrc_build.BuildUnavailable as error:
        pytest.skip(str(error))
    (toy / "cpu" / "answer.cpp").write_text(
        "#include <cstdlib>\n"
        "namespace bertfast { namespace BERTFAST_ISA {\n"
        "int answer();\n"
        "int answer() { int* p = new int[3]; volatile int i = 3; int x = p[i]; delete[] p;\n"
        "               return x; }\n"
        "} }\n"
    )
    result = csrc_build.build_cpu(toy, tmp_path / "out", sanitize=True, isas=["baseline"])
    done = run(
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(result.path.parent)!r}); import _cpu; _cpu.answer()",
        cwd=tmp_path,
        check=False,
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout


def test_unknown_arguments_are_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="avx1024"):
        csrc_build.build_cpu(toy, tmp_path / "out", isas=["avx1024"])
    with pytest.raises(ValueError, match="jobs"):
        csrc_build.build_cpu(toy, tmp_path / "out", jobs=0)
    with pytest.raises(csrc_build.BuildUnavailable, match=r"bindings\.cpp"):
        csrc_build.build_cpu(tmp_path / "nowhere", tmp_path / "out")


def test_no_source_includes_torch() -> None:
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)[/.]')
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    assert [str(path) for path in sources if pattern.search(path.read_text())] == []


def shipped_objects(unpacked: Path) -> dict[str, list[Path]]:
    """The object files that the wheel's build left, by instruction set."""
    (folder,) = (unpacked / "build").glob("cpu-*")
    return {
        name: sorted((folder / name).glob("*.o"))
        for name in csrc_build.known_isas()
        if (folder / name).is_dir()
    }


def test_objects_share_no_weak_symbols(wheel: Path, unpacked: Path) -> None:
    """Of a weak symbol that two instruction sets' objects define, the linker keeps one."""
    objects = shipped_objects(unpacked)
    assert objects["baseline"]
    assert csrc_build.weak_symbols([path for paths in objects.values() for path in paths]) == {}


def test_a_weak_symbol_would_be_seen(tmp_path: Path) -> None:
    """The test above bites: an inline function at namespace scope in a shipped kernel is found."""
    source = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", source, ignore=shutil.ignore_patterns("__pycache__"))
    first, *others = sorted(
        (p for p in (source / "cpu").glob("*.cpp") if p.name != "bindings.cpp"),
        key=lambda path: path.stat().st_size,
    )
    for path in others:
        path.unlink()
    with first.open("a") as file:
        file.write(
            "\nnamespace bertfast {\n"
            "inline float shared_by_accident(float x) { return x * 2.0f; }\n"
            "float (*keeps_it)(float) = shared_by_accident;\n"
            "}\n"
        )
    result = csrc_build.build_cpu(source, tmp_path / "out", isas=["baseline"], link=False)
    assert result.path is None
    (names,) = csrc_build.weak_symbols(result.objects["baseline"]).values()
    assert "bertfast::shared_by_accident(float)" in names


@pytest.mark.skipif(not X86, reason="other architectures have one instruction set")
def test_the_baseline_has_no_newer_instructions(wheel: Path, unpacked: Path) -> None:
    objects = shipped_objects(unpacked)
    (bindings,) = (unpacked / "build").glob("cpu-*/bindings.o")

    def registers(paths: list[Path]) -> set[str]:
        code = subprocess.run(
            ["objdump", "-d", *map(str, paths)], check=True, capture_output=True, text=True
        ).stdout
        return set(re.findall(r"%([xyz])mm", code))

    assert registers([*objects["baseline"], bindings]) == {"x"}
    if "avx2" in objects:
        assert "y" in registers(objects["avx2"])
        assert "z" not in registers(objects["avx2"])
    if "avx512" in objects:
        assert "z" in registers(objects["avx512"])
