"""What nvcc makes of the CUDA kernels for GPUs that are not here."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import csrc_build
import csrc_build_cuda
import pytest

from bertfast.kernels.cuda import attention

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90a")
WORDS = ("layernorm", "gelu", "dropout")
ATTENTION = ("attention", "attention_backward")


@dataclass(frozen=True)
class Compiled:
    """One kernel: its demangled name, registers and stack of a thread, and its accesses."""

    name: str
    registers: int
    stack: int
    loads: dict[str, int]
    stores: dict[str, int]
    code: str

    @property
    def wide(self):
        """Whether all rows start on 16 bytes: the last parameter of the template, or the shape."""
        return "InRegisters" in self.name or self.name.split(">(")[0].endswith("true")

    @property
    def threads(self):
        found = re.search(r"InRegisters<(\d+)", self.name)
        return max(128, int(found[1])) if found else 256


def tool(name):
    """Of the triton wheel."""
    triton = pytest.importorskip("triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_one(word, architecture, folder):
    target = folder / f"{word}-{architecture}.cubin"
    subprocess.run(
        [
            *(str(csrc_build_cuda.find_nvcc()), "-std=c++17", "-O3", "-cubin"),
            *(f"-arch=sm_{architecture}", str(CSRC / "cuda" / f"{word}.cu"), "-o", str(target)),
        ],
        check=True,
    )
    usage = output_of(tool("cuobjdump"), "-res-usage", target)
    text = output_of(tool("nvdisasm"), "-c", target)
    codes = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\.text\.|\Z)", text, re.S))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    names = output_of("c++filt", *(name for name, *_ in found)).splitlines()
    return [
        Compiled(
            name,
            int(registers),
            int(stack),
            widths(codes[mangled], "LDG"),
            widths(codes[mangled], "STG"),
            codes[mangled],
        )
        for name, (mangled, registers, stack) in zip(names, found, strict=True)
    ]


def output_of(*command):
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout


def widths(code, instruction):
    """How many accesses there are of each width in bits."""
    counts: dict[str, int] = {}
    for options in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", code):
        width = re.search(r"\.(128|64|U16|U8)", options)
        key = width[1] if width else "32"
        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt")
    try:
        csrc_build_cuda.find_nvcc()
    except csrc_build.BuildUnavailable:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as two:
        jobs = {
            (word, architecture): two.submit(compile_one, word, architecture, folder)
            for word in (*WORDS, *ATTENTION)
            for architecture in ARCHITECTURES
        }
    return {key: job.result() for key, job in jobs.items()}


def test_tensor_cores_are_used(compiled, tmp_path):
    """What tests/ops/test_emulation.py runs, compiled: the copy, the load and the product are each
    one instruction."""
    target = tmp_path / "tensor.cubin"
    source = Path(__file__).with_name("tensor.cu")
    command = [csrc_build_cuda.find_nvcc(), "-std=c++17", "-O3", "-cubin", "-arch=sm_80"]
    output_of(*command, f"-I{CSRC}", source, "-o", target)
    code = output_of(tool("nvdisasm"), "-c", target)
    for instruction in ("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "HMMA.16816"):
        assert re.search(rf"\b{re.escape(instruction)}", code), instruction


def attention_kernels(compiled, architecture):
    """Each with its kernel as kernels/cuda/attention.py names it, its head dimension and warps."""
    found = []
    for kernel in (
        compiled["attention", architecture] + compiled["attention_backward", architecture]
    ):
        name, arguments = re.search(r"(\w+_kernel)<([^>]*)>\(", kernel.name).groups()
        width, *rest = (word.strip() for word in arguments.split(",")[1:])
        if name == "attention_kernel":
            found.append((attention.FORWARD, int(width), 8, kernel))
        elif name == "keys_kernel":
            found.append((attention.PASS_OF_KEYS, int(width), int(rest[0]), kernel))
        else:
            one = attention.HEADS if rest[1] == "true" else attention.QUERIES
            found.append((one, int(width), int(rest[0]), kernel))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_keeps_to_its_plan(compiled, architecture):
    """No spills, registers for the blocks that the plan counts on, and all kernels it asks for."""
    found = attention_kernels(compiled, architecture)
    seen = {(kernel, width, warps) for kernel, width, warps, _ in found}
    for width in attention.WIDTHS:
        for kernel in (attention.FORWARD, attention.QUERIES, attention.PASS_OF_KEYS):
            assert (kernel, width, 8) in seen
        for length in (1, 32, 33, 64, 65, 128, 129, 256):
            if attention.whole_head(length, length, width, 227 * 1024):
                warps = attention.plan(attention.HEADS, length, length, width, 227 * 1024)[0]
                assert (attention.HEADS, width, warps) in seen, "the launcher would take another"
    # Forward with and without dropout.
    assert len(found) == 2 * (len(seen) + len(attention.WIDTHS))
    for kernel, width, warps, compiled_one in found:
        assert compiled_one.stack == 0, compiled_one.name
        threads = 32 * max(warps, 4)
        blocks = attention.blocks_at_once(kernel, width, warps)
        assert compiled_one.registers * threads * blocks <= 65536, compiled_one.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_on_tensor_cores(compiled, architecture):
    """Products and the loads for them are one instruction each. Rows come from global memory
    straight to shared memory, and go back 16 bytes at a time."""
    for kernel, width, _, one in attention_kernels(compiled, architecture):
        products = one.code.count("HMMA.16816.F32")
        # Of 16 queries and 64 keys: scores and outputs; of 32 keys: scores, their gradients, dq.
        exactly = {attention.FORWARD: width, attention.QUERIES: width * 3 // 4}
        assert products == exactly.get(kernel, products), one.name
        assert products >= width * 3 // 4, one.name
        for instruction in ("LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"):
            assert instruction in one.code, one.name
        assert one.stores.get("128", 0) >= 1, one.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("word", WORDS)
def test_no_spills_and_room_for_two_blocks(compiled, word, architecture):
    """Of 65536 registers; a backward that holds a row, dweight and dbias may have one to itself."""
    kernels = compiled[word, architecture]
    assert len(kernels) >= {"layernorm": 60, "gelu": 36, "dropout": 6}[word]
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        one = "backward" in kernel.name and "InRegisters<256" in kernel.name
        assert kernel.registers * kernel.threads * (1 if one else 2) <= 65536, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("word", WORDS)
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled, word, architecture):
    """Narrower are what a thread reads or writes once for a row or at the end: the seed,
    statistics, a share of a sum."""
    wide = [kernel for kernel in compiled[word, architecture] if kernel.wide]
    assert len(wide) >= {"layernorm": 33, "gelu": 18, "dropout": 3}[word]
    for kernel in wide:
        assert kernel.loads.get("128", 0) >= 1, kernel
        for accesses in (kernel.loads, kernel.stores):
            assert not accesses.get("U16", 0) and not accesses.get("U8", 0), kernel
            assert accesses.get("32", 0) <= 4 and accesses.get("64", 0) <= 1, kernel
        if "column_shares" not in kernel.name:
            assert kernel.stores.get("128", 0) >= 1, kernel
