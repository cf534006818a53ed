"""sdist, wheel and editable installs, each in a clean environment."""

from __future__ import annotations

import json
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, Environment, copy_tree, run, toy_tree

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def python_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_sdist_holds_the_sources_and_no_leftovers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    assert sources - names == set()
    assert "csrc/cpu/bindings.cpp" in names
    assert {f"bertfast/{name}" for name in python_files(ROOT / "bertfast")} - names == set()
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py", "bertfast/py.typed"):
        assert name in names
    leftovers = [n for n in names if re.search(r"\.(so|o|pyc)$|_build_info|^build/|\.venv", n)]
    assert leftovers == []


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = json.loads(archive.read("bertfast/_build_info.json"))
        module = archive.read(f"bertfast/_cpu{SUFFIX}")
    assert module[:4] == b"\x7fELF" or not SUFFIX.endswith("linux-gnu.so")
    assert module != b"stale"
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bertfast"}
    modules = {name.removeprefix("bertfast/") for name in names if name.endswith(".py")}
    assert modules == python_files(ROOT / "bertfast")
    assert "bertfast/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert information["cpu"]["built"] is True
    if shutil.which("nvcc"):
        assert information["cuda"]["architectures"] == ["90a"]
        assert f"bertfast/_cuda{SUFFIX}" in names
    else:
        assert "nvcc was not found" in information["cuda"]["reason"]
    # The wheel names its platform: it holds machine code.
    assert not wheel.name.endswith("-none-any.whl")


def test_every_data_file_is_packaged(wheel: Path) -> None:
    """A file that no rule in pyproject.toml ships would be missing at run time."""
    made_by_builds = ("__pycache__", ".so", "_build_info.json")
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "bertfast").rglob("*")
        if path.is_file() and not any(part in str(path) for part in made_by_builds)
    }
    with zipfile.ZipFile(wheel) as archive:
        assert sources - set(archive.namelist()) == set()


def test_the_version_is_written_once(wheel: Path) -> None:
    text = (ROOT / "bertfast" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert wheel.name.startswith(f"bertfast-{found[1]}-")


def test_the_wheel_works_outside_the_source_tree(installed: Environment) -> None:
    where, name = installed.evaluate(
        "import json, bertfast\n"
        "model = bertfast.BertModel\n"
        "print(json.dumps([bertfast.__file__, model.__name__]))"
    )
    assert Path(where).is_relative_to(installed.path)
    assert name == "BertModel"


def test_env_says_what_was_built(installed: Environment) -> None:
    information = json.loads(installed.bertfast("env", "--json"))
    assert Path(information["system"]["bertfast"]).is_relative_to(installed.path)
    built = information["built"]["cpu"]
    assert built["built"] is True
    assert "baseline" in built["isas"]
    assert built["compiler"]
    assert information["kernels"]["isa"] in information["kernels"]["isas"]
    assert {row["op"] for row in information["ops"]} >= {"layernorm", "gelu", "attention"}
    text = installed.bertfast("env")
    for part in ("versions", "native kernels", "cuda build", information["kernels"]["isa"]):
        assert part in text


def test_without_a_compiler_it_installs_and_says_so(
    tmp_path: Path, environment: Environment
) -> None:
    tree = copy_tree(tmp_path / "tree")
    tools = tmp_path / "tools"
    tools.mkdir()
    output = environment.install("--no-build-isolation", "--verbose", tree, PATH=str(tools))
    assert "the CPU kernels are not built: no C++ compiler on PATH" in output
    # The whole way through an op, on what is left.
    backend, kernels = environment.evaluate(
        "import json, torch, bertfast\n"
        "bertfast.BertModel\n"
        "x = torch.randn(3, 8)\n"
        "out = bertfast.ops.layernorm(x, torch.ones(8), torch.zeros(8), eps=1e-5)\n"
        "assert torch.allclose(out, torch.nn.functional.layer_norm(x, (8,)), atol=1e-5)\n"
        "import importlib.util\n"
        "rows = {row.op: row.backend for row in bertfast.explain()}\n"
        "print(json.dumps([rows['layernorm'], importlib.util.find_spec('bertfast._cpu')]))"
    )
    assert (backend, kernels) == ("reference", None)
    information = json.loads(environment.bertfast("env", "--json"))
    assert information["built"]["cpu"]["built"] is False
    assert "nvcc was not found" in information["built"]["cuda"]["reason"]
    assert "no C++ compiler on PATH" in information["built"]["cpu"]["reason"]
    assert "ModuleNotFoundError" in information["kernels"]["error"]


def test_an_editable_install_rebuilds_what_changed(
    tmp_path: Path, environment: Environment
) -> None:
    tree = toy_tree(tmp_path / "tree")
    question = (
        "import json, bertfast, bertfast._cpu as c; print(json.dumps([c.__file__, c.answer()]))"
    )

    def install() -> dict[str, int]:
        environment.install(
            "--no-build-isolation", "--editable", tree, BERTFAST_REQUIRE_CPU="1"
        )  # fmt: skip
        objects = (tree / "build").rglob("*.o")
        return {f"{p.parent.name}/{p.name}": p.stat().st_mtime_ns for p in objects}

    first = install()
    assert {"baseline/answer.o", "baseline/other.o", "bindings.o"} <= {
        name.removeprefix("cpu-") if "/bindings" not in name else "bindings.o" for name in first
    }
    where, answer = environment.evaluate(question)
    assert Path(where) == tree / "bertfast" / f"_cpu{SUFFIX}"
    assert answer == 41

    header = tree / "csrc" / "cpu" / "answer.h"
    header.write_text(header.read_text().replace("41", "42"))
    second = install()
    assert environment.evaluate(question)[1] == 42
    rebuilt = {name for name in first if first[name] != second[name]}
    assert {name.partition("/")[2] for name in rebuilt} == {"answer.o"}

    assert install() == second
    information = json.loads((tree / "bertfast" / "_build_info.json").read_text())
    assert information["cpu"]["built"] is True
    # What an editable install leaves in the source tree is not for git.
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/build/", "bertfast/*.so", "bertfast/_build_info.json"} <= set(ignored)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_tree(tmp_path / "tree")


def build(tree: Path, check: bool = True, **environment: str) -> tuple[str, dict | None]:
    """What a build says, and its record; None when it failed."""
    done = run(
        sys.executable, "setup.py", "build", "--build-lib", "out", cwd=tree, check=check,
        **environment,
    )  # fmt: skip
    record = tree / "out" / "bertfast" / "_build_info.json"
    if done.returncode != 0:
        return done.stdout, None
    return done.stdout, json.loads(record.read_text())["cpu"]


def test_a_compile_failure_is_loud_and_recorded(toy: Path) -> None:
    (toy / "csrc" / "cpu" / "answer.h").write_text("constexpr int kAnswer = undeclared_name;\n")
    output, record = build(toy)
    assert "WARNING: the CPU kernels are not built" in output
    assert "undeclared_name" in output
    assert record is not None
    assert record["built"] is False
    assert record["reason"] == "the compiler failed"
    assert any("undeclared_name" in line for line in record["output"])
    assert not list((toy / "out" / "bertfast").glob("_cpu*"))

    output, record = build(toy, check=False, BERTFAST_REQUIRE_CPU="1")
    assert record is None
    assert "undeclared_name" in output


def test_requiring_the_kernels_fails_without_a_compiler(toy: Path) -> None:
    output, record = build(toy, check=False, CXX="/nonexistent/g++", BERTFAST_REQUIRE_CPU="1")
    assert record is None
    assert "CXX=/nonexistent/g++: no such compiler" in output


def test_the_build_can_be_switched_off(toy: Path) -> None:
    _, record = build(toy, BERTFAST_BUILD_CPU="0")
    assert record == {"built": False, "reason": "BERTFAST_BUILD_CPU=0 when it was installed"}


def test_the_build_can_be_narrowed(toy: Path) -> None:
    _, record = build(toy, BERTFAST_BUILD_ISAS="baseline")
    assert record is not None
    assert record["isas"] == ["baseline"]
    output, record = build(toy, check=False, BERTFAST_BUILD_ISAS="avx1024")
    assert record is None
    assert "avx1024" in output
