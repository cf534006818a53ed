"""Builds bertfast's native modules beside what pyproject.toml says.

The package installs with or without them; what was compiled, and why something was not, goes into
``bertfast/_build_info.json`` for ``bertfast env``. The environment says otherwise where it must:

- ``BERTFAST_BUILD_CPU=0``: do not compile the CPU kernels.
- ``BERTFAST_REQUIRE_CPU=1``: not compiling them is an error.
- ``BERTFAST_BUILD_ISAS=baseline,avx2``: compile these instruction sets only.
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


def _load_build():
    # Under build isolation this folder is not on sys.path.
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["csrc_build"] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def _build_cpu() -> tuple[Path | None, dict[str, object]]:
    """The compiled module, or None, and what ``_build_info.json`` says about it."""
    if not build.flag("BERTFAST_BUILD_CPU", default=True):
        return None, {"built": False, "reason": "BERTFAST_BUILD_CPU=0 when it was installed"}
    isas = [name.strip() for name in os.environ.get("BERTFAST_BUILD_ISAS", "").split(",")]
    work = ROOT / "build" / f"cpu-{sysconfig.get_config_var('SOABI') or 'unknown'}"
    try:
        result = build.build_cpu(
            ROOT / "csrc", work, build_dir=work, isas=[name for name in isas if name] or None
        )
    except build.BuildError as error:
        if build.flag("BERTFAST_REQUIRE_CPU"):
            raise SystemExit(f"bertfast: BERTFAST_REQUIRE_CPU=1, but {error}") from None
        missing = isinstance(error, build.BuildUnavailable)
        reason = str(error) if missing else "the compiler failed"
        info: dict[str, object] = {"built": False, "reason": reason}
        if not missing:
            info["output"] = str(error).splitlines()[-40:]
        print(
            f"bertfast: WARNING: the CPU kernels are not built: {error}\n"
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
        module, info = _build_cpu()
        target = where / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        if module is None:
            target.unlink(missing_ok=True)
        else:
            _replace(module, target)
        record = where / "_build_info.json"
        record.write_text(json.dumps({"cpu": info, "cuda": build.cuda_info()}, indent=2) + "\n")
        self._made = [str(record), *([str(target)] if module else [])]

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
