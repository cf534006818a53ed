"""Compiles ``csrc/cuda``: with nvcc into ``bertfast._cuda``, and with the C++ compiler, for tests,
into the same module emulated on the CPU (``csrc/emulation``).

It goes with ``csrc/build.py``, which whoever loads this file has loaded as ``csrc_build``.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import csrc_build as build

# Compiled for these, and for what comes later as PTX, which the driver compiles when it loads it.
ARCHITECTURES = ("80", "90a", "90+PTX")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=2",
    "-Xfatbin=-compress-all",
)


@dataclass(frozen=True)
class CudaResult:
    """What :func:`build_cuda` made.

    Attributes:
        path: the extension module.
        compiler: the last line nvcc prints about its version.
        architectures: that were compiled for.
        seconds: how long it took.
    """

    path: Path
    compiler: str
    architectures: tuple[str, ...]
    seconds: float

    def info(self) -> dict[str, object]:
        """The part of this that ``bertfast env`` shows, as plain JSON values."""
        return {
            "built": True,
            "compiler": self.compiler,
            "architectures": list(self.architectures),
        }


def find_nvcc() -> Path:
    """nvcc on PATH, of ``CUDA_HOME``, or of PyPI's ``nvidia-cuda-nvcc``.

    Raises:
        BuildUnavailable: there is none.
    """
    candidates = [shutil.which("nvcc")]
    home = os.environ.get("CUDA_HOME", "").strip()
    candidates += [f"{home}/bin/nvcc"] if home else []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidates += [str(path) for path in sorted(Path(folder).glob("*/bin/nvcc"))]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise build.BuildUnavailable(
        "nvcc was not found (on PATH, in CUDA_HOME, or as PyPI's nvidia-cuda-nvcc)"
    )


def architectures() -> tuple[str, ...]:
    """``BERTFAST_CUDA_ARCHS``, comma-separated: 80, 90a, 90+PTX and the like."""
    asked = [name.strip() for name in os.environ.get("BERTFAST_CUDA_ARCHS", "").split(",")]
    names = tuple(name for name in asked if name) or ARCHITECTURES
    for name in names:
        number = name.removesuffix("+PTX").rstrip("af")
        if not number.isdigit() or int(number) < 80:
            raise ValueError(
                "BERTFAST_CUDA_ARCHS: expected names like 80, 90a or 90+PTX, from 80 on, "
                f"got {name!r}"
            )
    return names


def _gencode(name: str) -> str:
    number = name.removesuffix("+PTX")
    code = f"compute_{number}" if name.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _sources(source_dir: Path) -> list[Path]:
    """The kernels, and last the binding."""
    binding = source_dir / "cuda" / "bindings.cpp"
    if not binding.is_file():
        raise build.BuildUnavailable(f"{source_dir} does not hold cuda/bindings.cpp")
    return [*sorted(binding.parent.glob("*.cu")), binding]


def build_cuda(
    source_dir: Path, out_dir: Path, *, build_dir: Path | None = None, jobs: int | None = None
) -> CudaResult:
    """Compile the CUDA kernels, and link them with the CUDA runtime to ``out_dir/_cuda<suffix>``.

    Raises:
        BuildUnavailable: there is no nvcc, no C++ compiler, no ninja or no headers.
        BuildError: the sources do not compile; the compiler's output is in the message.
    """
    started = time.monotonic()
    source_dir, out_dir = Path(source_dir).resolve(), Path(out_dir).resolve()
    build_dir = Path(build_dir).resolve() if build_dir is not None else out_dir / "obj"
    sources, names, nvcc = _sources(source_dir), architectures(), find_nvcc()
    toolchain, ninja, headers = build._Toolchain.find(), build._find_ninja(), build._header_dirs()
    version = (build._run([str(nvcc), "--version"]).strip() or "unknown").splitlines()[-1]
    for folder in (build_dir, out_dir):
        folder.mkdir(parents=True, exist_ok=True)
    module = out_dir / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Without what only speeds a compiler up, which nvcc does not know.
    host, *rest = (w for w in toolchain.command if Path(w).name not in ("ccache", "sccache"))
    command = [str(nvcc), "-ccbin", host, *(f"-Xcompiler={word}" for word in rest)]
    # Where PyPI's packages have the runtime.
    libraries = nvcc.resolve().parent.parent / "lib"
    where = [f"-L{libraries}"] if (libraries / "libcudart_static.a").is_file() else []
    flags = [*build.COMMON, "-O2", *build.WARNINGS]
    flags += [part for path in headers for part in ("-isystem", str(path))]
    lines = [
        "# Written by csrc/build_cuda.py.",
        "ninja_required_version = 1.5",
        "rule nvcc",
        f"  command = {build._words([*command, *_FLAGS, *map(_gencode, names)])} "
        "-MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cxx",
        f"  command = {build._words([*toolchain.command, *flags])} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {build._words([*command, *where, '-shared', '-cudart=static'])} $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(build_dir / f"{source.stem}.o")
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {build._path(objects[-1])}: {rule} {build._path(source)}")
    lines.append(f"build {build._path(module)}: link {' '.join(map(build._path, objects))}")
    with build._lock(build_dir):
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        build._run_ninja(ninja, build_dir, jobs, "the CUDA kernels")
    return CudaResult(module, version, names, time.monotonic() - started)


def build_emulation(
    source_dir: Path,
    out_dir: Path,
    *,
    sanitize: bool = False,
    jobs: int | None = None,
    build_dir: Path | None = None,
) -> Path:
    """Compile the CUDA kernels for the CPU, emulated, and link them into ``out_dir/_cuda<suffix>``.

    Args:
        sanitize: build with the address and undefined-behaviour sanitizers, as in
            :func:`csrc_build.build_cpu`.

    Raises:
        BuildUnavailable: there is no usable compiler, no ninja or no headers.
        BuildError: the sources do not compile; the compiler's output is in the message.
    """
    source_dir, out_dir = Path(source_dir).resolve(), Path(out_dir).resolve()
    build_dir = Path(build_dir).resolve() if build_dir is not None else out_dir / "obj"
    toolchain, ninja, headers = build._Toolchain.find(), build._find_ninja(), build._header_dirs()
    for folder in (build_dir, out_dir):
        folder.mkdir(parents=True, exist_ok=True)
    module = out_dir / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [*build.COMMON, *(build.SANITIZE if sanitize else ("-O1",)), *build.WARNINGS]
    flags += ["-DBERTFAST_EMULATION", "-x", "c++"]
    flags += [part for path in headers for part in ("-isystem", str(path))]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link_flags = ["-shared", *(["-fsanitize=address,undefined"] if sanitize else [])]
    edges = [(build_dir / f"{source.stem}.o", source, []) for source in _sources(source_dir)]
    with build._lock(build_dir):
        (build_dir / "build.ninja").write_text(
            build._ninja_file(toolchain.command, flags, link_flags, edges, module)
        )
        build._run_ninja(ninja, build_dir, jobs, "the emulated CUDA kernels")
    return module


def emulate(root: Path) -> None:
    """Have the ``cuda`` backend emulated in this process, where bertfast is not imported yet, and
    in those it starts; unless ``BERTFAST_CUDA_EMULATION`` says something already.

    Args:
        root: the repository, whose ``build/emulation`` keeps the module.
    """
    if "BERTFAST_CUDA_EMULATION" in os.environ:
        return
    try:
        module = build_emulation(root / "csrc", root / "build" / "emulation")
    except build.BuildUnavailable as error:
        print(f"the CUDA kernels are not emulated: {error}", file=sys.stderr)
    else:
        os.environ["BERTFAST_CUDA_EMULATION"] = str(module)
