"""The kernels on arm64, from a machine that is not: the gates' native module by proxy.

torch and the gates run here as always. The kernels' baseline build and the binding are compiled by
a cross compiler into a program (``driver.cpp``) that runs under qemu, and :class:`Arm64Library`
stands in for ``bertfast._cpu``: it sends the program a launch with what is in its buffers, and puts
back what is in them afterwards.

A new entry point joins with the sizes of its buffers in :data:`SIZES`, and nothing else: its name
and its arguments' names are read in ``bindings.cpp``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import csrc_build
import pytest

from bertfast.kernels import cpu

from ..conftest import Mutants

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
COMPILER = "aarch64-linux-gnu-g++"
PACKAGES = "g++-aarch64-linux-gnu and qemu-user"

ELEMENT_BYTES = (4, 2)  # by Dtype


def heads_bytes(n: SimpleNamespace, tokens: int, strides: tuple[int, int]) -> int:
    """From the first element of attention's heads to the last."""
    if tokens == 0:
        return 0
    return ((tokens - 1) * strides[0] + (n.heads - 1) * strides[1] + n.head_dim) * n.T


# Bytes of each buffer, by its name in bindings.cpp, as a function of the numbers there. T and P are
# the bytes of an element of `dtype` and of `parameter_dtype`. No buffer is there where the address
# is null. Buffers that overlap, as strided views of one tensor do, do so in the program as well.
SIZES: dict[str, dict[str, Callable[[SimpleNamespace], int]]] = {
    "attention_forward": {
        "q": lambda n: heads_bytes(n, n.queries, n.q_strides),
        "k": lambda n: heads_bytes(n, n.keys, n.k_strides),
        "v": lambda n: heads_bytes(n, n.keys, n.v_strides),
        "out": lambda n: n.queries * n.heads * n.head_dim * n.T,
        "logsumexp": lambda n: n.heads * n.queries * 4,
        "cu_seqlens_q cu_seqlens_k": lambda n: (n.batch + 1) * 4,
        "seed": lambda n: 8,
    },
    "attention_backward": {
        "dout out": lambda n: n.queries * n.heads * n.head_dim * n.T,
        "q": lambda n: heads_bytes(n, n.queries, n.q_strides),
        "k": lambda n: heads_bytes(n, n.keys, n.k_strides),
        "v": lambda n: heads_bytes(n, n.keys, n.v_strides),
        "dq": lambda n: heads_bytes(n, n.queries, n.dq_strides),
        "dk": lambda n: heads_bytes(n, n.keys, n.dk_strides),
        "dv": lambda n: heads_bytes(n, n.keys, n.dv_strides),
        "logsumexp": lambda n: n.heads * n.queries * 4,
        "cu_seqlens_q cu_seqlens_k": lambda n: (n.batch + 1) * 4,
        "seed": lambda n: 8,
    },
    "cross_entropy_forward": {
        "hidden": lambda n: n.tokens * n.columns * n.T,
        "weight": lambda n: n.vocabulary * n.columns * ELEMENT_BYTES[n.weight_dtype],
        "bias": lambda n: n.vocabulary * ELEMENT_BYTES[n.bias_dtype],
        "labels": lambda n: n.tokens * (8 if n.wide_labels else 4),
        "loss": lambda n: 4,
        "logsumexp": lambda n: n.tokens * 4,
    },
    "cross_entropy_backward": {
        "dloss": lambda n: 4,
        "hidden dhidden": lambda n: n.tokens * n.columns * n.T,
        "weight dweight": lambda n: n.vocabulary * n.columns * ELEMENT_BYTES[n.weight_dtype],
        "bias dbias": lambda n: n.vocabulary * ELEMENT_BYTES[n.bias_dtype],
        "labels": lambda n: n.tokens * (8 if n.wide_labels else 4),
        "logsumexp": lambda n: n.tokens * 4,
    },
    "dropout": {"x out": lambda n: n.rows * n.columns * n.T, "seed": lambda n: 8},
    "embedding_forward": {
        "word_ids": lambda n: n.tokens * (8 if n.word_wide else 4),
        "position_ids": lambda n: n.tokens * (8 if n.position_wide else 4),
        "type_ids": lambda n: n.tokens * (8 if n.type_wide else 4),
        "word": lambda n: n.word_rows * n.columns * n.T,
        "position": lambda n: n.position_rows * n.columns * n.T,
        "token_type": lambda n: n.type_rows * n.columns * n.T,
        "weight bias": lambda n: n.columns * n.P,
        "out": lambda n: n.tokens * n.columns * ELEMENT_BYTES[n.out_dtype],
        "statistics": lambda n: 2 * n.tokens * 4,
        "seed": lambda n: 8,
    },
    "embedding_backward": {
        "word_ids": lambda n: n.tokens * (8 if n.word_wide else 4),
        "position_ids": lambda n: n.tokens * (8 if n.position_wide else 4),
        "type_ids": lambda n: n.tokens * (8 if n.type_wide else 4),
        "word dword": lambda n: n.word_rows * n.columns * n.T,
        "position dposition": lambda n: n.position_rows * n.columns * n.T,
        "token_type dtoken_type": lambda n: n.type_rows * n.columns * n.T,
        "weight dweight dbias": lambda n: n.columns * n.P,
        "dout": lambda n: n.tokens * n.columns * ELEMENT_BYTES[n.out_dtype],
        "statistics": lambda n: 2 * n.tokens * 4,
        "ds": lambda n: n.tokens * n.columns * 4,
        "partial": lambda n: n.blocks * 2 * n.columns * 4,
        "parts": lambda n: 3 * -(-n.tokens // n.chunk) * 2 * n.columns * 4,
        "readers": lambda n: 4 * n.tokens * 2 * 8,
        "seed": lambda n: 8,
    },
    "layernorm_forward": {
        "x residual out total": lambda n: n.rows * n.columns * n.T,
        "weight bias": lambda n: n.columns * n.P,
        "statistics": lambda n: 2 * n.rows * 4,
        "seed": lambda n: 8,
    },
    "layernorm_backward": {
        "dout total dx dresidual": lambda n: n.rows * n.columns * n.T,
        "weight dweight dbias": lambda n: n.columns * n.P,
        "statistics": lambda n: 2 * n.rows * 4,
        "partial": lambda n: n.blocks * 2 * n.columns * 4,
        "seed": lambda n: 8,
    },
    "gelu_forward": {
        "x out": lambda n: n.rows * n.columns * n.T,
        "bias": lambda n: n.columns * n.P,
    },
    "gelu_backward": {
        "dout x dx": lambda n: n.rows * n.columns * n.T,
        "bias dbias": lambda n: n.columns * n.P,
        "partial": lambda n: n.blocks * n.columns * 4,
    },
}

# Name and type of each argument.
Signature = list[tuple[str, str]]


def entry_points(bindings: str) -> dict[str, Signature]:
    """What ``bindings.cpp`` defines that takes addresses."""
    found = {}
    for name in re.findall(r'm\.def\("\w+", &(\w+)\);', bindings):
        parameters = re.search(rf"^int {name}\(([^)]*)\) {{$", bindings, re.MULTILINE)
        assert parameters is not None, f"bindings.cpp: cannot read the parameters of {name}"
        pairs = [parameter.split() for parameter in parameters[1].split(",")]
        found[name] = [(parameter, kind) for kind, parameter in pairs]
    return found


@dataclass
class Buffer:
    """Memory that one or several of a launch's addresses lie in."""

    begin: int
    end: int
    names: list[str]


class Arm64Library:
    """``bertfast._cpu`` as the launchers know it, with arm64 kernels in a process of its own."""

    def __init__(self, program: Path) -> None:
        emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if emulator is None:
            pytest.fail(f"qemu-aarch64 is not on PATH; Debian has what is needed in {PACKAGES}")
        # A processor with the first arm64 instructions and no later ones.
        self.command = [emulator, "-cpu", "cortex-a53", str(program)]
        self.signatures = entry_points((CSRC / "cpu" / "bindings.cpp").read_text())
        self.process: subprocess.Popen[bytes] | None = None

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in SIZES:
            raise AttributeError(f"{name}: no such entry point in SIZES")
        return functools.partial(self.call, name)

    def call(self, name: str, *values: Any) -> int:
        signature = self.signatures[name]
        given = dict(zip((parameter for parameter, _ in signature), values, strict=True))
        buffers = self._buffers(name, signature, given)
        place = {parameter: i for i, buffer in enumerate(buffers) for parameter in buffer.names}
        words = []
        for parameter, kind in signature:
            value = given[parameter]
            if parameter in place:
                number = place[parameter]
                words.append(struct.pack("<qq", number, value - buffers[number].begin))
            else:
                numbers = value if isinstance(value, tuple) else (value,)
                form = "<qd" if kind in ("float", "double") else "<qq"
                words += [struct.pack(form, -1, number) for number in numbers]
        sizes = [buffer.end - buffer.begin for buffer in buffers]
        request = [
            struct.pack("<32sqq", name.encode(), len(buffers), len(words)),
            struct.pack(f"<{len(sizes)}q", *sizes),
            *words,
            # What is only written goes along, too: the gates have poisoned it here.
            *(ctypes.string_at(b.begin, size) for b, size in zip(buffers, sizes, strict=True)),
        ]
        status, overrun, contents = self._exchange(name, b"".join(request), sizes)
        for buffer, content in zip(buffers, contents, strict=True):
            ctypes.memmove(buffer.begin, content, len(content))
        assert overrun < 0, f"{name} wrote outside of {' and '.join(buffers[overrun].names)}"
        return status

    @staticmethod
    def _buffers(name: str, signature: Signature, given: Mapping[str, Any]) -> list[Buffer]:
        numbers = SimpleNamespace(**given)
        for letter, of in (("T", "dtype"), ("P", "parameter_dtype")):
            if of in given:
                setattr(numbers, letter, ELEMENT_BYTES[given[of]])
        sizes = {key: size for keys, size in SIZES[name].items() for key in keys.split()}
        separate = []
        for parameter, kind in signature:
            begin = given[parameter]
            if kind == "Address" and begin:
                separate.append(Buffer(begin, begin + sizes[parameter](numbers), [parameter]))
        buffers: list[Buffer] = []
        for buffer in sorted(separate, key=lambda b: (b.begin, b.end)):
            if buffers and buffer.begin < buffers[-1].end:
                buffers[-1].end = max(buffers[-1].end, buffer.end)
                buffers[-1].names += buffer.names
            else:
                buffers.append(buffer)
        return buffers

    def _exchange(
        self, name: str, request: bytes, sizes: list[int]
    ) -> tuple[int, int, list[bytes]]:
        if self.process is None:
            # An instruction set asked for by name is this machine's. And threads that wait by
            # spinning would take time from the emulator.
            environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
            environment.pop("BERTFAST_CPU_ISA", None)
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None

        def read(size: int) -> bytes:
            content = stdout.read(size)
            if len(content) != size:
                raise BrokenPipeError
            return content

        try:
            stdin.write(request)
            stdin.flush()
            status, overrun = struct.unpack("<qq", read(16))
            return status, overrun, [read(size) for size in sizes]
        except BrokenPipeError:
            # A kernel that crashes is as red as one that is wrong.
            raise AssertionError(f"{name}: the arm64 program ended with {self.close()}") from None

    def close(self) -> int:
        """End the process, if there is one; a later call starts another."""
        process, self.process = self.process, None
        if process is None:
            return 0
        # communicate() and not close(): what could not be written is no error here.
        process.communicate()
        return process.returncode


def cross_build(source: Path, program: Path, *, werror: bool) -> csrc_build.BuildResult:
    """The program, with the kernels in ``source``; flags meant for this machine do not count."""
    if shutil.which(COMPILER) is None:
        pytest.fail(f"{COMPILER} is not on PATH; Debian has what is needed in {PACKAGES}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        patch.delenv("CXXFLAGS", raising=False)
        patch.delenv("LDFLAGS", raising=False)
        return csrc_build.build_program(
            source,
            HERE / "driver.cpp",
            program,
            build_dir=program.parent / "objects",
            werror=werror,
        )


@pytest.fixture(scope="session")
def arm64_build(tmp_path_factory: pytest.TempPathFactory) -> csrc_build.BuildResult:
    return cross_build(CSRC, tmp_path_factory.mktemp("arm64") / "kernels", werror=True)


@pytest.fixture(scope="session")
def arm64_library(arm64_build: csrc_build.BuildResult) -> Iterator[Arm64Library]:
    library = Arm64Library(arm64_build.path)
    yield library
    library.close()


@pytest.fixture
def arm64(arm64_library: Arm64Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers call arm64 kernels."""
    monkeypatch.setattr(cpu, "_lib", arm64_library)


@pytest.fixture
def arm64_mutant(mutants: Mutants) -> Callable[[str, str, str], AbstractContextManager[None]]:
    """The same with one textual change in the sources: ``with arm64_mutant(file, old, new):``."""

    @contextmanager
    def in_place(file: str, old: str, new: str) -> Iterator[None]:
        with mutants.changed(file, old, new):
            program = mutants.folder / "arm64" / f"mutant{mutants.count}"
            cross_build(mutants.source, program, werror=False)
        library = Arm64Library(program)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cpu, "_lib", library)
                yield
        finally:
            library.close()

    return in_place
