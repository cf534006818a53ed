"""The gates of the CPU kernels on arm64, under qemu: ``make arm64``.

The emulator takes no more time for a whole grid than the references do, so it is the whole grid.
"""

import re
import subprocess

import pytest
import torch

from bertfast import testing
from bertfast.backends import TABLE
from bertfast.kernels import cpu

from .conftest import COMPILER, CSRC, SIZES, entry_points

WORDS = [word for word in TABLE if "cpu" in TABLE[word]]


def test_every_buffer_has_a_size():
    """Not under ``make arm64`` alone: whoever adds one may not have the cross compiler."""
    known = entry_points((CSRC / "cpu" / "bindings.cpp").read_text())
    assert set(SIZES) == set(known)
    for name, signature in known.items():
        sized = [buffer for buffers in SIZES[name] for buffer in buffers.split()]
        assert sorted(sized) == sorted(p for p, kind in signature if kind == "Address"), name


@pytest.mark.arm64
@pytest.mark.parametrize("precision", testing.PRECISIONS["cpu"])
@pytest.mark.parametrize("word", WORDS)
def test_gate(word, precision, arm64):
    testing.run_gates(word, "cpu", precision)


# What the other gates' mutations cannot see: lines that only arm64 compiles, its compiler's choice
# to fuse, threads under the emulator. Compiled as the kernels are, since that choice depends on it.
MUTATIONS = {
    "the product of the high words": (
        "layernorm",
        "cpu/dropout.h",
        "vmovn_u64(reinterpret_cast<uint64x2_t>(a))",
        "vshrn_n_u64(reinterpret_cast<uint64x2_t>(a), 32)",
    ),
    "the second thread starts late": (
        "gelu",
        "cpu/parallel.h",
        "begin = items * share / shares,",
        "begin = items * share / shares + share,",
    ),
    "bfloat16 one bit off": (
        "gelu",
        "cpu/vector.h",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x17FFF + ((bits >> 16) & 1)) >> 16",
    ),
    "a product that may be fused": (
        "layernorm",
        "cpu/vector.h",
        'asm("" : "+w"(product));',
        "",
    ),
}


@pytest.mark.arm64
@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, arm64_mutant):
    word, *change = MUTATIONS[name]
    with arm64_mutant(*change):
        assert testing.gates_are_red(word, "cpu")


@pytest.mark.arm64
def test_an_overrun_and_a_crash_are_red(arm64_mutant):
    with arm64_mutant(
        "cpu/gelu.cpp",
        "T* out = static_cast<T*>(a.out);",
        "T* out = a.tanh ? nullptr : static_cast<T*>(a.out) - 1;",
    ):
        case = testing.gelu_case(3, 7, name="crash", approximate="tanh")
        with pytest.raises(AssertionError, match=r"gelu_forward: the arm64 program ended with -?1"):
            testing.run_gate(case, torch.float32, "cpu")
        # In the next program: what is left of a crash is no reason for more red.
        case = testing.gelu_case(3, 7, name="overrun")
        with pytest.raises(AssertionError, match="gelu_forward wrote outside of out"):
            testing.run_gate(case, torch.float32, "cpu")


@pytest.mark.arm64
def test_the_binding_checks_its_arguments_there_too(arm64):
    assert cpu.library().gelu_forward(0, 0, 0, 1, 6, False, 0, 0, 1) == 5
    assert cpu.library().layernorm_forward(*[0] * 8, 0, 6, 1e-5, 0, 2**32 - 1, 0, 0, 0) == 3


@pytest.mark.arm64
def test_buffers_that_overlap_do_so_there(arm64):
    """As strided views of one tensor may: what lies between the columns written must survive."""
    x = torch.randn(6)
    shared = torch.cat([torch.tensor([1.0, 2.0]), x, torch.tensor([3.0])])
    expected = shared.clone()
    expected[1:7] = torch.nn.functional.gelu(x)
    at = shared.data_ptr()
    assert cpu.library().gelu_forward(at + 2 * 4, 0, at + 4, 1, 6, False, 0, 0, 1) == 0
    torch.testing.assert_close(shared, expected)


@pytest.mark.arm64
def test_the_compiler_vectorises(arm64_build):
    """The vector types compile to vector instructions, the Philox product among them."""
    code = subprocess.run(
        [COMPILER.replace("g++", "objdump"), "-d", *map(str, arm64_build.objects["baseline"])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for instruction in (r"fmla\s+v\d+\.4s", r"umull2?\s+v\d+\.2d"):
        assert re.search(instruction, code), instruction
