"""Compiles ``csrc/cpu`` into the extension module ``bertfast._cpu``: once per instruction set.

``setup.py`` calls :func:`build_cpu` when the package is built, and the tests call it on changed
copies of the sources. It needs the standard library, pybind11's headers and ninja; never torch.

Every ``cpu/*.cpp`` except ``bindings.cpp`` is compiled once for each :data:`ISAS` entry with
``-DBERTFAST_ISA=<name>`` (the namespace its code lives in) and that entry's flags. ``bindings.cpp``
is compiled once for the baseline machine with ``-DBERTFAST_HAVE_<NAME>`` for each set that was
compiled, and chooses among them at run time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType


class BuildError(Exception):
    """The sources did not compile; the message ends with what the compiler said."""


class BuildUnavailable(BuildError):
    """Nothing was compiled, because this machine lacks something a build needs."""


@dataclass(frozen=True)
class Isa:
    """One instruction set: the compiler flags that turn it on and a program that proves they do."""

    flags: tuple[str, ...] = ()
    probe: str = ""


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")

X86_ISAS: dict[str, Isa] = {
    "baseline": Isa(),
    "avx2": Isa(
        _AVX2,
        "#include <immintrin.h>\n__m256 probe(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n",
    ),
    "avx512": Isa(
        _AVX512,
        "#include <immintrin.h>\n__m512 probe(__m512 a) { return _mm512_fmadd_ps(a, a, a); }\n",
    ),
    "avx512_bf16": Isa(
        _AVX512_BF16,
        "#include <immintrin.h>\n__m512bh probe(__m512 a) { return _mm512_cvtne2ps_pbh(a, a); }\n",
    ),
}


def known_isas() -> dict[str, Isa]:
    """The instruction sets this architecture's sources are compiled for, weakest first."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_ISAS
    return {"baseline": Isa()}


WARNINGS = ("-Wall", "-Wextra")
# -ffast-math is left out on purpose: NaN and infinity must pass through the kernels unharmed.
OPTIMISATION = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# Two pybind11 modules in one process must not share types, hence hidden symbols throughout.
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")


@dataclass(frozen=True)
class BuildResult:
    """What :func:`build_cpu` or :func:`build_program` made.

    Attributes:
        path: the extension module or program; with ``link=False`` there is none and this is None.
        compiler: the first line the compiler prints about its version.
        isas: instruction sets compiled in, weakest first.
        skipped_isas: instruction sets left out, with the reason for each.
        openmp: whether the kernels are threaded.
        openmp_reason: why not, else "".
        objects: the object files of each instruction set.
        seconds: how long it took.
    """

    path: Path | None
    compiler: str
    isas: tuple[str, ...]
    skipped_isas: dict[str, str]
    openmp: bool
    openmp_reason: str
    objects: dict[str, tuple[Path, ...]] = field(repr=False)
    seconds: float

    def info(self) -> dict[str, object]:
        """The part of this that ``bertfast env`` shows, as plain JSON values."""
        info: dict[str, object] = {
            "built": True,
            "compiler": self.compiler,
            "isas": list(self.isas),
            "skipped_isas": dict(self.skipped_isas),
            "openmp": self.openmp,
        }
        if not self.openmp:
            info["openmp_reason"] = self.openmp_reason
        return info


def build_cpu(
    source_dir: Path,
    out_dir: Path,
    *,
    isas: Sequence[str] | None = None,
    sanitize: bool = False,
    jobs: int | None = None,
    build_dir: Path | None = None,
    link: bool = True,
    werror: bool | None = None,
) -> BuildResult:
    """Compile the CPU kernels and link them into ``out_dir/_cpu<suffix>``.

    A build directory that is used again is brought up to date: only what changed is compiled. To
    build many variants of the sources quickly, change one copy of ``csrc`` in place and give every
    call the same ``build_dir`` and its own ``out_dir`` (a loaded module is never read again from
    the same path).

    Args:
        source_dir: the ``csrc`` folder, or a changed copy of it.
        out_dir: where the module goes; created when missing.
        isas: instruction sets to compile, from :func:`known_isas`; None for all that the compiler
            knows. A set that is asked for by name and refused by the compiler is an error.
        sanitize: build with the address and undefined-behaviour sanitizers. The process that loads
            the result needs :func:`sanitizer_preload` in ``LD_PRELOAD``.
        jobs: compilers at a time; None for one per usable core.
        build_dir: where objects and the ninja file are kept; default ``out_dir/obj``.
        link: False compiles the per-set objects only, without ``bindings.cpp`` and the module.
        werror: warnings are errors; None reads ``BERTFAST_WERROR``.

    Raises:
        BuildUnavailable: there is no usable compiler, or no Python or pybind11 headers, or no
            ninja.
        BuildError: the sources do not compile; the compiler's output is in the message.
    """
    started = time.monotonic()
    source_dir, out_dir = Path(source_dir).resolve(), Path(out_dir).resolve()
    build_dir = Path(build_dir).resolve() if build_dir is not None else out_dir / "obj"
    if not (source_dir / "cpu" / "bindings.cpp").is_file():
        raise BuildUnavailable(f"{source_dir} does not hold cpu/bindings.cpp")
    if isas is not None:
        for name in isas:
            if name not in known_isas():
                known = ", ".join(known_isas())
                raise ValueError(f"isas: expected names among {known}, got {name!r}")
        if not isas:
            raise ValueError("isas: expected at least one name, got none")
    if werror is None:
        werror = flag("BERTFAST_WERROR")

    toolchain = _Toolchain.find()
    ninja = _find_ninja()
    headers = _header_dirs() if link else []
    build_dir.mkdir(parents=True, exist_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)

    with _lock(build_dir):
        probes = toolchain.probe(build_dir)
        chosen: dict[str, Isa] = {}
        skipped: dict[str, str] = {}
        for name, isa in known_isas().items():
            if isas is not None and name not in isas:
                skipped[name] = "not asked for"
            elif probes[name]:
                skipped[name] = f"the compiler refuses its flags: {probes[name]}"
            else:
                chosen[name] = isa
        refused = [name for name in isas or () if name not in chosen]
        if refused:
            raise BuildUnavailable("; ".join(f"{name}: {skipped[name]}" for name in refused))

        openmp_reason = probes["openmp"]
        flags = _compile_flags(
            source_dir, sanitize=sanitize, werror=werror, openmp=not openmp_reason
        )
        link_flags = ["-shared", *([] if openmp_reason else ["-fopenmp"])]
        link_flags += ["-fsanitize=address,undefined"] if sanitize else []
        link_flags += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        link_flags += shlex.split(os.environ.get("LDFLAGS", ""))

        edges: list[_Edge] = []
        objects: dict[str, tuple[Path, ...]] = {}
        for name, isa in chosen.items():
            own_edges = _kernel_edges(source_dir, build_dir, name, isa)
            objects[name] = tuple(target for target, _, _ in own_edges)
            edges += own_edges
        module: Path | None = None
        if link:
            own = [f"-DBERTFAST_HAVE_{name.upper()}" for name in chosen]
            # -isystem: warnings in other people's headers are not ours to fix.
            own += [part for path in headers for part in ("-isystem", str(path))]
            edges.append((build_dir / "bindings.o", source_dir / "cpu" / "bindings.cpp", own))
            module = out_dir / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        (build_dir / "build.ninja").write_text(
            _ninja_file(toolchain.command, flags, link_flags, edges, module)
        )
        _run_ninja(ninja, build_dir, jobs)

    return BuildResult(
        path=module,
        compiler=toolchain.version,
        isas=tuple(chosen),
        skipped_isas=skipped,
        openmp=not openmp_reason,
        openmp_reason=openmp_reason,
        objects=objects,
        seconds=time.monotonic() - started,
    )


def build_program(
    source_dir: Path,
    main: Path,
    program: Path,
    *,
    build_dir: Path | None = None,
    jobs: int | None = None,
    werror: bool | None = None,
) -> BuildResult:
    """Compile the baseline kernels and ``main`` into the static executable ``program``.

    It needs neither Python nor pybind11, so the compiler in ``CXX`` may be one for another
    architecture: this is how the gates reach kernels for a machine that is not there.

    Args:
        source_dir: the ``csrc`` folder, or a changed copy of it.
        main: a C++ source with a ``main``. It may include ``bindings.cpp``, with headers from its
            own folder in the place of Python's and pybind11's.
        program: the file to make.
        build_dir: where objects and the ninja file are kept; default ``obj`` beside ``program``. It
            may be used again as in :func:`build_cpu`.
        jobs: compilers at a time; None for one per usable core.
        werror: warnings are errors; None reads ``BERTFAST_WERROR``.

    Raises:
        BuildUnavailable: there is no usable compiler or no ninja.
        BuildError: the sources do not compile; the compiler's output is in the message.
    """
    started = time.monotonic()
    source_dir, main, program = (Path(path).resolve() for path in (source_dir, main, program))
    build_dir = Path(build_dir or program.parent / "obj").resolve()
    if werror is None:
        werror = flag("BERTFAST_WERROR")
    toolchain = _Toolchain.find()
    ninja = _find_ninja()
    for folder in (build_dir, program.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # Without threads it would not be the code that ships, so there is no fallback.
    flags = _compile_flags(source_dir, sanitize=False, werror=werror, openmp=True)
    link_flags = ["-static", "-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))]
    with _lock(build_dir):
        edges = _kernel_edges(source_dir, build_dir, "baseline", Isa())
        objects = tuple(target for target, _, _ in edges)
        own = [f"-I{main.parent}", "-DBERTFAST_HAVE_BASELINE"]
        edges.append((build_dir / "main.o", main, own))
        (build_dir / "build.ninja").write_text(
            _ninja_file(toolchain.command, flags, link_flags, edges, program)
        )
        _run_ninja(ninja, build_dir, jobs)
    return BuildResult(
        path=program,
        compiler=toolchain.version,
        isas=("baseline",),
        skipped_isas={},
        openmp=True,
        openmp_reason="",
        objects={"baseline": objects},
        seconds=time.monotonic() - started,
    )


def load(path: Path, name: str = "_cpu") -> ModuleType:
    """Import an extension module from ``path``, beside whatever ``_cpu`` is loaded already."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What compilers add for exceptions: a data pointer, and two calls that end the program. Neither
# holds code of the instruction set.
_HARMLESS = ("DW.ref.", "__clang_call_terminate")


def weak_symbols(objects: Sequence[Path]) -> dict[str, list[str]]:
    """For each object file that defines weak or unique symbols, their demangled names.

    The linker keeps one copy of such a symbol for the whole module. When objects of several
    instruction sets define it, code for a newer machine may end up behind the baseline's call.
    """
    nm = shutil.which("nm")
    if nm is None:
        raise BuildUnavailable("nm (binutils) is not on PATH")
    found: dict[str, list[str]] = {}
    for path in objects:
        output = subprocess.run(
            [nm, "--defined-only", "-C", str(path)], check=True, capture_output=True, text=True
        ).stdout
        names = []
        for line in output.splitlines():
            fields = line.split(maxsplit=2)
            if len(fields) == 3 and fields[1] in "WwVvu" and not fields[2].startswith(_HARMLESS):
                names.append(fields[2])
        if names:
            found[str(path)] = names
    return found


def sanitizer_preload() -> str:
    """The runtime library that ``LD_PRELOAD`` must name to load a ``sanitize=True`` module."""
    command = _Toolchain.find().command
    found = subprocess.run(
        [*command, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        raise BuildUnavailable("the compiler has no libasan.so")
    return os.path.realpath(found)


def flag(name: str, default: bool = False) -> bool:
    """The environment variable ``name`` as a yes or no."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return default
    if value in ("0", "no", "off", "false"):
        return False
    if value in ("1", "yes", "on", "true"):
        return True
    raise ValueError(f"{name}: expected 0 or 1, got {value!r}")


_OPENMP_PROBE = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
_CXX17_PROBE = "#include <optional>\nint probe() { return std::optional<int>(1).value(); }\n"


@dataclass(frozen=True)
class _Toolchain:
    command: list[str]
    version: str

    @staticmethod
    def find() -> _Toolchain:
        if sys.platform == "win32":
            raise BuildUnavailable("the CPU kernels need GCC or Clang; Windows is not supported")
        asked = os.environ.get("CXX", "").strip()
        if asked:
            command = shlex.split(asked)
            if shutil.which(command[0]) is None:
                raise BuildUnavailable(f"CXX={asked}: no such compiler")
        else:
            names = ("g++", "c++", "clang++")
            found = next((path for path in map(shutil.which, names) if path), None)
            if found is None:
                raise BuildUnavailable(f"no C++ compiler on PATH (looked for {', '.join(names)})")
            command = [found]
        try:
            output = _run([*command, "--version"])
        except BuildError as error:
            raise BuildUnavailable(f"{command[0]} does not run: {error}") from None
        return _Toolchain(command, (output.strip() or "unknown").splitlines()[0])

    def probe(self, build_dir: Path) -> dict[str, str]:
        """For OpenMP and each instruction set: "" when the compiler can, else its complaint."""
        path = Path(shutil.which(self.command[0]) or self.command[0])
        flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        names = list(known_isas())
        key = hashlib.sha256(
            json.dumps(
                [self.command, self.version, path.stat().st_mtime_ns, flags, link_flags, names]
            ).encode()
        ).hexdigest()
        cache = build_dir / "probes.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            cached = json.loads(cache.read_text())
            if cached["key"] == key:
                return dict(cached["probes"])

        with tempfile.TemporaryDirectory() as folder:
            base = ["-std=c++17", "-fPIC", *flags]
            shared = ["-shared", *link_flags]
            if sys.platform == "darwin":
                shared += ["-undefined", "dynamic_lookup"]
            tries = {
                "c++17": (_CXX17_PROBE, [*base, *shared]),
                "openmp": (_OPENMP_PROBE, [*base, "-fopenmp", *shared]),
            }
            for name, isa in known_isas().items():
                tries[name] = (isa.probe, [*base, *isa.flags, "-c"])

            def attempt(name: str) -> str:
                text, arguments = tries[name]
                source = Path(folder) / f"{name}.cpp"
                source.write_text(text)
                try:
                    _run([*self.command, str(source), *arguments, "-o", f"{source}.out"])
                except BuildError as error:
                    return _last_error(str(error))
                return ""

            with ThreadPoolExecutor(max_workers=_cores()) as pool:
                probes = dict(zip(tries, pool.map(attempt, tries), strict=True))
        broken = probes.pop("c++17")
        if broken:
            raise BuildUnavailable(f"{self.version} cannot build a C++17 library: {broken}")
        cache.write_text(json.dumps({"key": key, "probes": probes}))
        return probes


def _run(command: list[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise BuildError(str(error)) from None
    if done.returncode != 0:
        raise BuildError(done.stdout)
    return done.stdout


def _last_error(output: str) -> str:
    """The line of a compiler's output that says what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "not found" in line]
    chosen = (errors or lines or ["it said nothing"])[0]
    # "/tmp/x/avx2.cpp:1:2: error: ..." -> from "error" on: the path is a temporary one.
    return chosen[chosen.index("error:") + 7 :] if "error:" in chosen else chosen


def _header_dirs() -> list[Path]:
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise BuildUnavailable(
            f"Python's C headers are not installed (no {python / 'Python.h'}); "
            "on Debian they are in python3-dev"
        )
    try:
        import pybind11
    except ImportError:
        raise BuildUnavailable("pybind11 is not installed in the building environment") from None
    return [python, Path(pybind11.get_include())]


def _find_ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.is_file():
            return str(path)
    found = shutil.which("ninja") or shutil.which("ninja-build")
    if found is None:
        raise BuildUnavailable("ninja is neither a Python package here nor on PATH")
    return found


# An object, its source, and the flags that are its own.
_Edge = tuple[Path, Path, list[str]]


def _ninja_file(
    compiler: list[str],
    flags: list[str],
    link_flags: list[str],
    edges: list[_Edge],
    module: Path | None,
) -> str:
    lines = [
        "# Written by csrc/build.py.",
        "ninja_required_version = 1.5",
        f"cxx = {_words(compiler)}",
        f"flags = {_words(flags)}",
        f"link_flags = {_words(link_flags)}",
        "rule compile",
        "  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $cxx $in $link_flags -o $out",
        "  description = $out",
    ]
    for target, source, own in edges:
        lines.append(f"build {_path(target)}: compile {_path(source)}")
        lines.append(f"  own = {_words(own)}")
    if module is not None:
        inputs = " ".join(_path(target) for target, _, _ in edges)
        lines.append(f"build {_path(module)}: link {inputs}")
    return "\n".join(lines) + "\n"


def _compile_flags(source_dir: Path, *, sanitize: bool, werror: bool, openmp: bool) -> list[str]:
    flags = [*COMMON, *(SANITIZE if sanitize else OPTIMISATION), *WARNINGS]
    flags += ["-Werror"] if werror else []
    flags += ["-fopenmp"] if openmp else []
    flags += [f"-I{path}" for path in (source_dir, source_dir / "cpu")]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def _kernel_edges(source_dir: Path, build_dir: Path, name: str, isa: Isa) -> list[_Edge]:
    """One instruction set's objects."""
    sources = sorted(p for p in (source_dir / "cpu").glob("*.cpp") if p.name != "bindings.cpp")
    own = [*isa.flags, f"-DBERTFAST_ISA={name}"]
    return [(build_dir / name / f"{source.stem}.o", source, own) for source in sources]


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _run_ninja(
    ninja: str, build_dir: Path, jobs: int | None, what: str = "the CPU kernels"
) -> None:
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    command = [ninja, "-C", str(build_dir), "-j", str(jobs or _cores())]
    try:
        output = _run(command)
    except BuildError as error:
        tail = "\n".join(str(error).splitlines()[-80:])
        raise BuildError(f"{what} do not compile:\n{tail}") from None
    if flag("BERTFAST_VERBOSE_BUILD") or "warning:" in output:
        print(output, flush=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _lock(build_dir: Path) -> Iterator[None]:
    """Keeps a second build out of the same directory: ninja does not."""
    with open(build_dir / ".lock", "w") as handle:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
