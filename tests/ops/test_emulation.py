"""The emulation of CUDA (``csrc/emulation``) tells what is wrong with a kernel; and of ours."""

import ctypes
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import csrc_build
import csrc_build_cuda
import pytest
import torch

import bertfast
from bertfast import testing
from bertfast.backends import TABLE, kernel
from bertfast.errors import KernelError
from bertfast.kernels import cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
WORDS = [word for word, names in TABLE.items() if "cuda" in names]
# Orders of threads, and what shared memory holds before a block: bytes that make NaN, and others.
MODES = [(0, 0xFF), (1, 0xFF), (2, 0xFF), (0, 0x00), (0, 0x3F)]
ORDERS = ("forward", "reverse", "random")


def compiled(folder, *flags):
    library = folder / "emulated.so"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-DBERTFAST_EMULATION", *flags),
            *(f"-I{CSRC}", "-x", "c++", str(HERE / "emulated.cu"), "-o", str(library)),
        ],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    library = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("emulated"))))
    library.run.restype = ctypes.c_char_p

    def call(name, order=0, pattern=0xFF, given=None, outputs=64):
        given = torch.arange(65.0) if given is None else given
        out = torch.zeros(outputs)
        address = (ctypes.c_void_p(x.data_ptr()) for x in (given, out))
        return library.run(name.encode(), *address, order, pattern).decode(), out

    return call


def test_a_right_kernel_is_right_in_every_mode(run):
    for mode in MODES:
        error, out = run("reversed", *mode)
        assert error == ""
        assert torch.equal(out, torch.arange(63.0, -1.0, -1.0))


def results(run, name, modes):
    return [run(name, *mode)[1] for mode in modes]


@pytest.mark.parametrize("name", ["no_barrier", "two_writers"])
def test_a_race_depends_on_the_order(run, name):
    first, *others = results(run, name, MODES[:3])
    assert any(not first.equal(other) for other in others)


def test_what_nobody_wrote_depends_on_the_pattern(run):
    first, *others = results(run, "unwritten", [MODES[0], *MODES[3:]])
    assert first[:63].equal(others[0][:63])
    assert first[63].isnan()
    assert not others[0].equal(others[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "shared memory was written beyond an end of its 256 bytes"),
        (
            "some_at_the_barrier",
            r"thread 0 waits at .*emulated.cu:\d+ \(barrier\), thread 40 has ended",
        ),
        ("two_barriers", r"thread 0 waits at .*:\d+ \(barrier\), thread 40 waits at .*:\d+"),
        ("some_at_the_shuffle", r"thread 0 waits at .*:\d+ \(warp\), thread 5 has ended"),
        ("some_at_the_vote", r"thread 0 waits at .*:\d+ \(warp\), thread 7 has ended"),
        ("misaligned", "an address is not on 16 bytes at a load of 16 bytes, thread"),
        ("shuffle_outside_of_the_mask", "a shuffle reads a thread that is not in the mask at .*:"),
    ],
)
def test_what_ends_a_launch(run, name, message):
    for mode in MODES:
        error, _ = run(name, *mode)
        assert re.search(message, error), error
        assert error.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_global", "heap-buffer-overflow"),
        ("beyond_shared", "use-after-poison"),
    ],
)
def test_the_sanitizers_see_bad_accesses(name, message, tmp_path):
    library = compiled(tmp_path, "-g", *csrc_build.SANITIZE, "-fno-sanitize-recover=all")
    program = f"""
import ctypes
library = ctypes.CDLL({str(library)!r})
memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
given, out = (ctypes.c_void_p(memory.malloc(256)) for _ in range(2))
library.run({name!r}.encode(), given, out, 0, 255)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"LD_PRELOAD": csrc_build.sanitizer_preload(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-2000:]


def product(run, name, *mode):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    given = torch.cat((a.flatten(), b.flatten()))
    error, out = run(name, *mode, given=given, outputs=128)
    assert error == ""
    return out.view(16, 8), a.float() @ b.float()


def test_a_product_on_tensor_cores(run):
    for mode in MODES:
        got, expected = product(run, "product", *mode)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["product_not_waited_for", "product_swapped"])
def test_a_wrong_product_is_wrong(run, name):
    """A copy nobody waited for has not happened; registers in another order are another matrix."""
    got, expected = product(run, name)
    assert not torch.allclose(got, expected, equal_nan=True)


def test_atomics(run):
    for mode in MODES:
        assert run("counted", *mode)[1][0] == torch.arange(64.0).sum()


def test_votes(run):
    """Lanes 0 to 2 of the first warp, of which lane 0 brings a 0; half of the second one."""
    expected = torch.tensor([6.75] * 32 + [7.0] * 16 + [0.0] * 16)
    for mode in MODES:
        error, out = run("voted", *mode)
        assert error == ""
        assert torch.equal(out, expected)


def outputs_of(case, dtype, order, pattern):
    cuda.library().set_emulation(ORDERS[order], 7, pattern)
    try:
        given = case.inputs(dtype)
        leaves = {name: given[name].detach().requires_grad_() for name in case.grads}
        out = case.op({**given, **leaves}, "cuda")
        dout = testing.upstream_gradient(out, case.upstream)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]
    finally:
        cuda.library().set_emulation("forward", 0, 0xFF)


SOME = ("odd", "several_blocks", "piece_and_tail", "base", "ffn", "long_row")
OF_ATTENTION = (
    "odd", "several_blocks", "base", "wide_head", "narrow_head", "split", "cross", "causal",
    "few_queries", "no_queries",
    "one_block", "two_passes", "three_quarters", "full_width", "many_sequences",
)  # fmt: skip


@pytest.mark.parametrize(("word", "there"), [*((word, 227) for word in WORDS), ("attention", 99)])
def test_our_kernels_have_no_race_and_read_what_they_wrote(word, there, monkeypatch):
    """The same bits in every mode; attention's also where tiles are not copied ahead."""
    if there == 99:
        monkeypatch.setattr(kernel(word, "cuda"), "shared_memory_of", lambda x: there * 1024)
    names = OF_ATTENTION if word == "attention" else SOME
    cases = [case for case in testing.CASES[word] if case.name.startswith(names)]
    assert len(cases) >= len(names)
    for case in cases:
        if there == 99 and case.inputs(torch.float16)[case.grads[0]].shape[-1] > 64:
            continue
        first, *others = (outputs_of(case, torch.float16, *mode) for mode in MODES)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), case


@pytest.mark.parametrize("columns", [1, 8, 33, 768, 1032, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_the_reference_masks(columns, dtype):
    """Bit for bit: ones tell kept from dropped."""
    x, weight = torch.ones(30, columns, dtype=dtype), torch.ones(columns)
    for seed, site in ((0, 0), (-1, 7), (testing.SEED, 0xFFFFFFFF)):
        seed = testing.seed_tensor(seed)

        def masks(backend, seed=seed, site=site):
            norm = (x, weight, weight, None, seed, 1e-12, 20000, site, True)
            return (
                kernel("dropout", backend).forward(x, seed, 20000, site),
                kernel("layernorm", backend).forward(*norm)[1],
            )

        for got, expected in zip(masks("cuda"), masks("reference"), strict=True):
            assert torch.equal(got != 0, expected != 0)
            if columns > 8:
                assert 0.2 < (got != 0).double().mean() < 0.9


@pytest.mark.parametrize("word", WORDS)
def test_dispatches_no_torch_arithmetic(word):
    (case,) = (c for c in testing.CASES[word] if c.name in ("odd-p0.1", "odd-none", "odd"))
    given = case.inputs(torch.float16)
    leaves = {name: given[name].detach().requires_grad_() for name in case.grads}
    dout = torch.randn_like(case.op({**given, **leaves}, "cuda"))
    with testing.KernelOnly() as seen:
        out = case.op({**given, **leaves}, "cuda")
        torch.autograd.grad(out, list(leaves.values()), dout)
    assert {"empty_like", "empty"} & set(seen.seen)


def test_what_it_does_not_take(monkeypatch):
    takes = kernel("gelu", "cuda").supports
    assert takes(torch.ones(2)) is None
    assert "takes torch.float32, torch.bfloat16 and torch.float16" in takes(torch.ones(2).double())
    assert "the emulation takes CPU tensors" in takes(torch.ones(2, device="meta"))
    monkeypatch.setattr(cuda, "_lib", None)
    monkeypatch.setattr(cuda, "missing", "it is not there")
    assert takes(torch.ones(2)) == "it is not there"


def test_a_device_that_cannot_run_it_is_said_once(monkeypatch):
    tried = []

    class Old:
        emulated = False
        status_text = staticmethod(lambda status: f"too old {status}")

        @staticmethod
        def try_device(device):
            assert current == [device], "torch's current device is to be the same afterwards"
            tried.append(device)
            return 35 * device

    current = []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(cuda, "_lib", Old)
    monkeypatch.setattr(cuda, "_tried", {})
    monkeypatch.setattr(torch.cuda, "device", device)
    said = "cuda:1 cannot run bertfast._cuda: too old 35"
    assert [cuda._unusable(i) for i in (0, 1, 0, 1)] == [None, said, None, said]
    assert tried == [0, 1]

    def call(x):
        return x + (1 if cuda._unusable(1) else 2)

    monkeypatch.setattr(cuda, "_tried", {})
    assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_nothing_is_emulated_unasked():
    for row in bertfast.explain("cpu", torch.float16):
        assert row.backend != "cuda"
        if row.op in WORDS:
            assert "asked for by name" in row.passed_over["cuda"]


def test_our_kernels_stay_in_bounds_and_aligned(tmp_path):
    module = csrc_build_cuda.build_emulation(CSRC, tmp_path, sanitize=True)
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "sanitized_cuda.py"), str(module), "200"],
        env={
            **os.environ,
            "PYTHONPATH": str(HERE),
            "LD_PRELOAD": csrc_build.sanitizer_preload(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) calls", done.stdout)[1]) >= 100


def test_a_failed_launch_says_what_and_where(monkeypatch):
    class Failing:
        emulated = True
        status_text = staticmethod(lambda status: f"out of luck {status}")
        dropout = staticmethod(lambda *arguments: 700)

    monkeypatch.setattr(cuda, "_lib", Failing)
    said = r"_cuda\.dropout: CUDA error: out of luck 700: rows=3, columns=8, torch\.float32"
    with pytest.raises(KernelError, match=said):
        kernel("dropout", "cuda").forward(torch.ones(3, 8), testing.seed_tensor(), 20000, 3)
