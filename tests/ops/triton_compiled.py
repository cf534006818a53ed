"""Compiles every Triton kernel ahead of time, no GPU needed, and says what the compiler made of it.

    TRITON_INTERPRET=0 python triton_compiled.py ARCH...       print the table of sm_ARCH as JSON
    TRITON_INTERPRET=0 python triton_compiled.py ARCH... --write   write it to triton_compiled.json

The launchers themselves run, on CPU tensors, with a driver that says there is a GPU and a launch
that only compiles: so what is looked at is what a user would run, tile sizes and pointer alignment
included. ``test_triton_compiled.py`` holds the table to the committed one.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import bertfast.kernels.triton
from bertfast import testing
from bertfast.backends import kernel, load_kernels

TABLE_FILE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("80", "90", "100")
DTYPES = ("float32", "bfloat16", "float16")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Report = dict[str, Any]
_PRODUCTS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_COUNTED = (*_PRODUCTS, "st.shared", "stmatrix", "bar.sync")


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiling(launches: list[Any]) -> Callable[..., Any]:
    """What stands in for a launch: it compiles, and keeps what it compiled."""
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return launches[-1]

    return compile_only


def report(compiled: Any) -> Report:
    """Registers and stack of a thread, shared memory of a block, widths of global accesses and of
    copies from global to shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    widths: dict[str, int] = {}
    access = r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)"
    for vector, bits in re.findall(access, compiled.asm["ptx"]):
        width = str(int(vector or 1) * int(bits) // 8)
        widths[width] = widths.get(width, 0) + 1
    copies: dict[str, int] = {}
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?0x(\w+)", compiled.asm["ptx"]):
        copies[str(int(size, 16))] = copies.get(str(int(size, 16)), 0) + 1
    made = {
        "warps": compiled.metadata.num_warps,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "global_access_bytes": dict(sorted(widths.items(), key=lambda item: int(item[0]))),
    }
    # Of kernels with products: what multiplies, and what goes through shared memory.
    counts = {
        name: len(re.findall(rf"\b{re.escape(name)}\b", compiled.asm["ptx"])) for name in _COUNTED
    }
    if any(counts[name] for name in _PRODUCTS):
        made["instructions"] = {name: count for name, count in counts.items() if count}
    if copies:
        made["async_copy_bytes"] = dict(sorted(copies.items(), key=lambda item: int(item[0])))
    return made


# Sizes of BERT-base and -large, and rows that no tile holds. Kernels do not depend on the number of
# rows.
def cases() -> Iterator[testing.Case]:
    for columns in (768, 1024):
        yield testing.layernorm_case(64, columns, name=str(columns), dropout_p=0.1)
        yield testing.embedding_case(64, columns, name=str(columns), dropout_p=0.1)
    yield testing.layernorm_case(64, 768, name="768 plain", residual=False)
    yield testing.layernorm_case(64, 4096, name="4096", dropout_p=0.1)
    yield testing.layernorm_case(64, 8192, name="8192", dropout_p=0.1)
    yield testing.layernorm_case(8, 16384, name="16384", dropout_p=0.1)
    yield testing.embedding_case(8, 16384, name="16384", dropout_p=0.1)
    for approximate in ("none", "tanh"):
        yield testing.gelu_case(64, 3072, name=f"3072 {approximate}", approximate=approximate)
    yield testing.gelu_case(64, 3072, name="3072 no bias", bias=False)
    yield testing.dropout_case(64, 768, name="768")
    # Rows that start anywhere: no access can be 16 bytes wide.
    yield testing.gelu_case(64, 767, name="767")
    yield testing.dropout_case(64, 767, name="767")
    yield testing.embedding_case(64, 101, name="101", dropout_p=0.1)
    for columns in (24, 101, 1030, 4999, 18001):
        yield testing.layernorm_case(8, columns, name=str(columns), dropout_p=0.1)


# Length and head dim: a head's backward in one program, in two passes, and heads of all widths.
ATTENTION = {
    "64x64": ("bfloat16",),
    "128x64": DTYPES,
    "512x64": ("bfloat16", "float16"),
    "128x32": ("bfloat16",),
    "512x128": ("bfloat16",),
    "512x256": ("bfloat16",),
}


def attention_cases() -> Iterator[tuple[testing.Case, tuple[str, ...]]]:
    for size, dtypes in ATTENTION.items():
        length, head_dim = map(int, size.split("x"))
        for p in (0.0, 0.1):
            case = testing.attention_case(
                [length] * 2, 2, head_dim, name=f"{size} p{p}", packed=True, dropout_p=p
            )
            # Unrolled products in float32 take half a minute to compile: once is enough.
            yield case, tuple(d for d in dtypes if d != "float32" or p > 0)


def cross_entropy_cases() -> Iterator[tuple[testing.Case, tuple[str, ...]]]:
    # More than one chunk of the vocabulary, whose length nothing divides.
    yield testing.cross_entropy_case(64, 768, 30522, name="768"), (*DTYPES, "bfloat16-mixed")
    yield testing.cross_entropy_case(64, 768, 1000, name="768 no bias", bias=False), ("bfloat16",)
    yield testing.cross_entropy_case(64, 101, 1000, name="101"), ("bfloat16",)


def launch(case: testing.Case, precision: str) -> None:
    """The launchers, forward and backward, that the op calls; their results are of no interest."""
    dtype, _, mixed = precision.partition("-")
    tensors = case.inputs(getattr(torch, dtype), mixed=bool(mixed))
    for name in case.grads:
        tensors[name].requires_grad_()

    def supports(x: Tensor) -> None:
        return None

    module = kernel(case.word, "triton")
    before, module.supports = module.supports, supports
    try:
        out = case.op(tensors, "triton")
        torch.autograd.grad(out, [tensors[name] for name in case.grads], torch.ones_like(out))
    finally:
        module.supports = before


def table(architecture: str) -> dict[str, Report]:
    """``{"word case kernel dtype": report}`` of every kernel for one architecture."""
    driver.set_active(NoGpu(int(architecture)))
    bertfast.kernels.triton.architecture = lambda device: f"sm_{architecture}"
    launches: list[Any] = []
    run, JITFunction.run = JITFunction.run, compiling(launches)
    rows = {}
    try:
        everything = [
            *((case, DTYPES) for case in cases()),
            *cross_entropy_cases(),
            *attention_cases(),
        ]
        for case, dtypes in everything:
            for dtype in dtypes:
                launches.clear()
                launch(case, dtype)
                for compiled in launches:
                    name = f"{case.word} {case.name} {compiled.metadata.name}"
                    made = report(compiled)
                    # A kernel may be launched in two forms, as is that of a last chunk.
                    other = rows.get(f"{name} {dtype}", made)
                    rows[f"{name}{':2' if other != made else ''} {dtype}"] = made
    finally:
        JITFunction.run = run
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    # A torch without CUDA will do, as nothing is launched.
    bertfast.kernels.triton.missing = None
    load_kernels()
    made = {f"sm_{name}": table(name) for name in arguments.architectures}
    if arguments.write:
        lines = ",\n".join(
            f' "{architecture}": {{\n'
            + ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in rows.items())
            + "\n }"
            for architecture, rows in made.items()
        )
        about = json.dumps(triton.__version__)
        TABLE_FILE.write_text(f'{{\n "triton": {about},\n{lines}\n}}\n')
    else:
        print(json.dumps(made))


if __name__ == "__main__":
    main()
