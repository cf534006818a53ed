"""Instruction sets, mutated builds, and the summary of how close the gates came to their limit."""

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import csrc_build
import csrc_build_cuda
import pytest
import torch

from bertfast import backends, testing
from bertfast.backends import TABLE
from bertfast.kernels import cpu, cuda, triton

CSRC = Path(__file__).parents[2] / "csrc"
TRITON = Path(triton.__file__).parent


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Shares of two threads are part of what the gates look at, on a machine with one core too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    """Switches the native kernels to an instruction set, and back after the test."""
    library = cpu.library()
    before = library.isa()
    yield library.set_isa
    library.set_isa(before)


class Mutants:
    """Builds copies of the native sources with one textual change, and puts them in place.

    One copy is changed and changed back, so that each build compiles only what the change touches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "csrc"
        shutil.copytree(CSRC, self.source)
        self.count = 0

    @contextmanager
    def changed(self, file: str, old: str, new: str) -> Iterator[None]:
        """Inside, ``self.source`` holds the change."""
        path = self.source / file
        text = path.read_text()
        assert old in text, f"{file} no longer holds {old!r}: bring the mutation up to date"
        path.write_text(text.replace(old, new, 1))
        self.count += 1
        try:
            yield
        finally:
            path.write_text(text)

    def compile(self, file: str, old: str, new: str) -> ModuleType:
        with self.changed(file, old, new):
            isa = cpu.library().isas()[-1]
            built = csrc_build.build_cpu(
                self.source,
                self.folder / f"mutant{self.count}",
                isas=[isa],
                build_dir=self.folder / "objects",
                werror=False,  # a mutation may well leave something unused
            )
        # pybind11 gives back the module it knows under a name, whatever the path.
        module = csrc_build.load(built.path, f"mutant{self.count}._cpu")
        assert module.__file__ == str(built.path)
        return module

    @contextmanager
    def in_place(self, file: str, old: str, new: str) -> Iterator[None]:
        mutant = self.compile(file, old, new)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_lib", mutant)
            yield


class CudaMutants(Mutants):
    """The same of the CUDA kernels, emulated."""

    @contextmanager
    def in_place(self, file: str, old: str, new: str) -> Iterator[None]:
        with self.changed(file, old, new):
            path = csrc_build_cuda.build_emulation(
                self.source,
                self.folder / f"mutant{self.count}",
                build_dir=self.folder / "objects",
            )
        mutant = csrc_build.load(path, f"mutant{self.count}._cuda")
        assert mutant.__file__ == str(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_lib", mutant)
            yield


class TritonMutants:
    """Copies of the Triton kernels with one textual change, imported under another name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    @contextmanager
    def in_place(self, file: str, old: str, new: str) -> Iterator[None]:
        self.count += 1
        package = f"triton_mutant{self.count}"
        target = self.folder / package
        shutil.copytree(TRITON, target)
        for path in target.glob("*.py"):
            text = path.read_text()
            if path.name == file:
                assert text.count(old), f"{file} no longer holds {old!r}: bring it up to date"
                text = text.replace(old, new, 1)
            text = text.replace("from bertfast.kernels import triton as", f"import {package} as")
            path.write_text(text.replace("bertfast.kernels.triton", package))
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(self.folder)
            for word, names in TABLE.items():
                if "triton" in names:
                    mutant = importlib.import_module(f"{package}.{word}")
                    assert mutant.__file__ == str(target / f"{word}.py")
                    patch.setitem(backends._modules, (word, "triton"), mutant)
            yield


@pytest.fixture(scope="session")
def triton_mutants(tmp_path_factory: pytest.TempPathFactory) -> TritonMutants:
    return TritonMutants(tmp_path_factory.mktemp("triton_mutants"))


@pytest.fixture(scope="session")
def cuda_mutants(tmp_path_factory: pytest.TempPathFactory) -> CudaMutants:
    return CudaMutants(tmp_path_factory.mktemp("cuda_mutants"))


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mutants]:
    with pytest.MonkeyPatch.context() as patch:
        # What a gate must catch does not depend on the optimiser, and -O1 compiles much faster.
        patch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -O1")
        yield Mutants(tmp_path_factory.mktemp("mutants"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not testing.gate_records:
        return
    worst: dict[str, testing.GateRecord] = {}
    for record in testing.gate_records:
        key = "-".join(record.name.split("-")[:1])
        if key not in worst or record.ratio > worst[key].ratio:
            worst[key] = record
    terminalreporter.section("gates: the largest share of the allowed error (1 is the limit)")
    for key in sorted(worst):
        count = sum(record.name.split("-")[0] == key for record in testing.gate_records)
        terminalreporter.line(
            f"{key:28} {worst[key].ratio:.3f}  of {count:4} comparisons, at {worst[key].name}"
        )
