"""Builds bertfast's native modules beside what pyproject.toml says.

The package installs with or without them; what was compiled, and why something was not, goes into
``bertfast/_build_info.json`` for ``bertfast env``. The environment says otherwise where it must:

- ``BERTFAST_BUILD_CPU=0``, ``BERTFAST_BUILD_CUDA=0``: do not compile the CPU or CUDA kernels.
- ``BERTFAST_REQUIRE_CPU=1``, ``BERTFAST_REQUIRE_CUDA=1``: not compiling them is an error.
- ``BERTFAST_BUILD_ISAS=baseline,avx2``: compile these instruction sets only.
- ``BERTFAST_CUDA_ARCHS=80,90a,90+PTX``: compile the CUDA kernels for these.
- ``BERTFAST_WERROR=1``: compiler warnings are errors.
- ``CXX``, ``CXXFLAGS``, ``LDFLAGS``: as everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _load(name: str, file: str):
    # Under build isolation this folder is not on sys.path.
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


build = _load("csrc_build", "build.py")
build_cuda = _load("csrc_build_cuda", "build_cuda.py")


def _cpu(work: Path):
    isas = [name.strip() for name in os.environ.get("BERTFAST_BUILD_ISAS", "").split(",")]
    isas = [name for name in isas if name] or None
    return build.build_cpu(ROOT / "csrc", work, build_dir=work, isas=isas)


def _cuda(work: Path):
    return build_cuda.build_cuda(ROOT / "csrc", work, build_dir=work)


def _build(name: str, compile_in) -> tuple[Path | None, dict[str, object]]:
    """The compiled module, or None, and what ``_build_info.json`` says about it."""
    if not build.flag(f"BERTFAST_BUILD_{name}", default=True):
        return None, {"built": False, "reason": f"BERTFAST_BUILD_{name}=0 when it was installed"}
    work = ROOT / "build" / f"{name.lower()}-{sysconfig.get_config_var('SOABI') or 'unknown'}"
    try:
        result = compile_in(work)
    except ValueError as error:  # of a variable in the environment
        raise SystemExit(f"bertfast: {error}") from None
    except build.BuildError as error:
        if build.flag(f"BERTFAST_REQUIRE_{name}"):
            raise SystemExit(f"bertfast: BERTFAST_REQUIRE_{name}=1, but {error}") from None
        missing = isinstance(error, build.BuildUnavailable)
        reason = str(error) if missing else "the compiler failed"
        info: dict[str, object] = {"built": False, "reason": reason}
        if not missing:
            info["output"] = str(error).splitlines()[-40:]
        # Most machines have no nvcc, which is no reason to warn.
        if not (name == "CUDA" and missing):
            print(
                f"bertfast: WARNING: the {name} kernels are not built: {error}\n"
                "bertfast: WARNING: everything works, more slowly; `bertfast env` repeats this.",
                file=sys.stderr,
                flush=True,
            )
        return None, info
    return result.path, result.info()


class BuildNative(build_ext):
    """Compiles with ninja instead of distutils, and leaves a record."""

    def run(self) -> None:
        where = ROOT / "bertfast" if self.inplace else Path(self.build_lib) / "bertfast"
        where.mkdir(parents=True, exist_ok=True)
        record = where / "_build_info.json"
        information, self._made = {}, [str(record)]
        for name, compile_in in (("CPU", _cpu), ("CUDA", _cuda)):
            module, information[name.lower()] = _build(name, compile_in)
            target = where / f"_{name.lower()}{sysconfig.get_config_var('EXT_SUFFIX')}"
            if module is None:
                target.unlink(missing_ok=True)
            else:
                _replace(module, target)
                self._made.append(str(target))
        record.write_text(json.dumps(information, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return getattr(self, "_made", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Starts from an empty folder: setuptools would ship modules that were deleted since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "bertfast", ignore_errors=True)
        super().run()


def _replace(source: Path, target: Path) -> None:
    """Copy in one step: a process that has the old module loaded keeps it whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


setup(
    # Only the name is used: it marks the wheel as one for this platform.
    ext_modules=[Extension("bertfast._cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
