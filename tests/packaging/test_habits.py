"""The repository's own tools: the skip policy, the Makefile, CI, the pinned set."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, run

TESTS = """\
import pytest

def test_passes(): pass

@pytest.mark.skip(reason="no GPU here")
def test_gpu(): pass

@pytest.mark.parametrize("name", ["a"])
def test_each(name): pytest.skip("no " + name)

@pytest.mark.xfail(reason="known: 7", strict=True)
def test_known(): assert False

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.arm64
def test_arm64(): pass
"""

ALLOWED = """\
# a comment
tests/test_it.py::test_gpu: no GPU*
tests/test_it.py::test_each[a]: no a
tests/test_it.py::test_known: xfail: known*
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with this one's conftest.py and a test file of each kind."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    for name in ("build.py", "build_cuda.py"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    return tmp_path


def run_pytest(project: Path, *arguments: str) -> tuple[int, str]:
    done = run(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments,
        cwd=project, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_listed_skips_pass_and_are_printed(project: Path) -> None:
    (project / "tests" / "skips.txt").write_text(ALLOWED)
    code, output = run_pytest(project)
    assert code == 0, output
    for line in (
        "tests/test_it.py::test_gpu: no GPU here",
        "tests/test_it.py::test_each[a]: no a",
        "tests/test_it.py::test_known: xfail: known: 7",
    ):
        assert line in output.splitlines()
    for marker in ("slow", "arm64"):
        heading = f"=+ {marker} tests left out \\(--{marker} runs them\\) =+"
        assert re.search(rf"^{heading}\ntests/test_it.py: 1$", output, re.MULTILINE)
    assert "NOT ALLOWED" not in output
    assert "2 deselected" in output


@pytest.mark.parametrize("dropped", ["test_gpu", "test_each", "test_known"])
def test_an_unlisted_skip_fails_the_run(project: Path, dropped: str) -> None:
    kept = [line for line in ALLOWED.splitlines() if dropped not in line]
    (project / "tests" / "skips.txt").write_text("\n".join(kept))
    code, output = run_pytest(project)
    assert code == 1, output
    assert f"NOT ALLOWED tests/test_it.py::{dropped}" in output


def test_another_reason_is_another_skip(project: Path) -> None:
    (project / "tests" / "skips.txt").write_text(ALLOWED.replace("no GPU*", "no driver"))
    code, output = run_pytest(project)
    assert code == 1, output
    assert "NOT ALLOWED tests/test_it.py::test_gpu: no GPU here" in output


def test_a_module_that_skips_itself_is_seen(project: Path) -> None:
    (project / "tests" / "skips.txt").write_text(ALLOWED)
    (project / "tests" / "test_module.py").write_text(
        "import pytest\npytest.importorskip('no_such_module')\n"
    )
    code, output = run_pytest(project)
    assert code == 1, output
    assert "NOT ALLOWED tests/test_module.py: could not import 'no_such_module'" in output


@pytest.mark.parametrize("marker", ["slow", "arm64"])
def test_what_is_left_out_runs_when_asked(project: Path, marker: str) -> None:
    (project / "tests" / "skips.txt").write_text(ALLOWED)
    code, output = run_pytest(project, f"--{marker}")
    assert code == 0, output
    assert "2 passed" in output
    assert f"{marker} tests left out" not in output


def test_make_arm64_names_what_it_needs(tmp_path: Path) -> None:
    for tool in ("make", "sh"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run("make", "--silent", "arm64", cwd=ROOT, check=False, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "apt-get install g++-aarch64-linux-gnu qemu-user\n" in done.stdout


def test_a_malformed_line_is_refused(project: Path) -> None:
    (project / "tests" / "skips.txt").write_text("tests/test_it.py\n")
    code, output = run_pytest(project)
    assert code == 4, output
    assert "tests/skips.txt:1" in output


def test_the_source_tree_does_not_stand_in_for_the_package(project: Path) -> None:
    (project / "bertfast").mkdir()
    (project / "bertfast" / "__init__.py").write_text('__version__ = "0"\n')
    done = run(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
        cwd=project, check=False, BERTFAST_TEST_INSTALLED="1",
    )  # fmt: skip
    assert done.returncode == 4, done.stdout
    assert "imported from the source tree" in done.stdout


def test_make_help_lists_the_targets() -> None:
    output = run("make", "--no-print-directory", "help", cwd=ROOT).stdout
    for target in ("demo", "test", "arm64", "lint", "format", "bench", "develop", "clean"):
        assert re.search(rf"^  make {target} +\S", output, re.MULTILINE)


def test_ci_is_executable_and_valid() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    run("bash", "-n", script, cwd=ROOT)


def test_the_pinned_set_covers_what_the_package_asks_for() -> None:
    """An unpinned name is what the registry has that day: torch with gigabytes of CUDA."""

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"{line!r} is not pinned"
            pinned[normal(name)] = version
    asked = importlib.metadata.requires("bertfast") or []
    names = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in asked}
    assert names - {"bertfast"} - set(pinned) == set()
