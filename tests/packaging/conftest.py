"""Clean environments for the packaging tests, and the few ways they run things in them."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = str(ROOT / "constraints.txt")

# A source folder of csrc's shape that compiles in a moment: no pybind11, one kernel, one header.
TOY = {
    "cpu/answer.h": "constexpr int kAnswer = 41;\n",
    "cpu/answer.cpp": """\
#include "answer.h"
namespace bertfast { namespace BERTFAST_ISA {
int answer();
int answer() { return kAnswer; }
} }
""",
    "cpu/other.cpp": "namespace BERTFAST_ISA { int other(); int other() { return 1; } }\n",
    "cpu/bindings.cpp": """\
#include <Python.h>
namespace bertfast { namespace baseline { int answer(); } }
static PyObject* answer(PyObject*, PyObject*) {
    return PyLong_FromLong(bertfast::baseline::answer());
}
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
""",
}


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what would change a build or an import."""
    dropped = (
        "BERTFAST_",
        "PIP_BUILD_CONSTRAINT",
        "PYTHONPATH",
        "TRITON_",
        "CXX",
        "CXXFLAGS",
        "LDFLAGS",
        "VIRTUAL_ENV",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "PIP_CONSTRAINT": CONSTRAINTS, **extra}


def run(
    *command: str | Path, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a clean environment; a failure shows all it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} gave {done.returncode}:\n{done.stdout[-6000:]}")
    return done


def pip(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, **environment).stdout


@dataclass
class Environment:
    """A fresh virtual environment that has bertfast's dependencies and not bertfast."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def install(self, *arguments: str | Path, **environment: str) -> str:
        return pip(
            "--python", self.python, "install", "--no-deps", *arguments,
            cwd=self.path, **environment,
        )  # fmt: skip

    def evaluate(self, code: str, **environment: str) -> Any:
        """What ``code`` prints, as JSON; run outside the source tree."""
        done = run(self.python, "-c", code, cwd=self.path, **environment)
        return json.loads(done.stdout.splitlines()[-1])

    def bertfast(self, *arguments: str, **environment: str) -> str:
        return run(self.path / "bin" / "bertfast", *arguments, cwd=self.path, **environment).stdout


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that shows the running environment's packages, except any bertfast."""
    folder = tmp_path_factory.mktemp("dependencies")
    for place in {sysconfig.get_path("purelib"), *site.getsitepackages()}:
        for entry in Path(place).iterdir():
            hidden = "bertfast" in entry.name.lower() or entry.suffix == ".pth"
            if not hidden and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path: Path, dependencies: Path) -> Environment:
    return make_environment(tmp_path / "environment", dependencies)


def make_environment(path: Path, dependencies: Path) -> Environment:
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    (packages,) = path.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return Environment(path)


def copy_tree(target: Path) -> Path:
    """A copy of the repository, without what git ignores."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "venv", "build", "dist", "bertfast-demo", "results", "*.egg-info",
        "__pycache__", ".*_cache", ".hypothesis", "*.so", "_build_info.json",
    )  # fmt: skip
    # csrc/build.py is a file; only folders called build are left out.
    shutil.copytree(ROOT, target, ignore=lambda d, names: ignored(d, names) - {"build.py"})
    return target


def toy_tree(target: Path) -> Path:
    """The same with :data:`TOY` in the place of the kernels."""
    copy_tree(target)
    for name in ("cpu", "cuda"):
        shutil.rmtree(target / "csrc" / name)
    write_toy(target / "csrc")
    return target


def write_toy(csrc: Path) -> Path:
    for name, text in TOY.items():
        path = csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return csrc


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a tree that has leftovers of earlier builds in it."""
    tree = copy_tree(tmp_path_factory.mktemp("tree") / "bertfast")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tree / "bertfast" / f"_cpu{suffix}").write_bytes(b"stale")
    (tree / "bertfast" / "_build_info.json").write_text("{}")
    out = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, tree, cwd=tree
    )  # fmt: skip
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(sdist, tmp_path_factory.mktemp("unpacked"))


def unpack(sdist: Path, target: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="session")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution in build isolation."""
    stale = unpacked / "build" / "lib" / "bertfast"
    for folder in (stale, *(stale.parent.with_name(n) / "bertfast" for n in _library_names())):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deleted_long_ago.py").write_text("raise AssertionError\n")
    out = tmp_path_factory.mktemp("wheel")
    pip(
        "wheel", "--no-deps", "--wheel-dir", out, unpacked, cwd=out,
        BERTFAST_REQUIRE_CPU="1", PIP_BUILD_CONSTRAINT=CONSTRAINTS, BERTFAST_CUDA_ARCHS="90a",
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


def _library_names() -> list[str]:
    """Where setuptools gathers a platform wheel: build/lib.<platform>-<interpreter>."""
    return [f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"]


@pytest.fixture(scope="session")
def installed(
    wheel: Path, dependencies: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """A clean environment with the wheel in it."""
    made = make_environment(tmp_path_factory.mktemp("installed") / "environment", dependencies)
    made.install(wheel)
    return made
