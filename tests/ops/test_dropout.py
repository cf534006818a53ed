import ctypes
import subprocess

import csrc_build
import pytest
import torch
from scipy import stats

from bertfast import ops, testing
from bertfast.backends import kernel
from bertfast.kernels import cpu
from bertfast.masks import (
    attention_keep_mask,
    dropout_scale,
    dropout_threshold,
    keep_mask,
    philox4x32,
)

from .conftest import CSRC

SEED = testing.seed_tensor()


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("dropout"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("dropout", backend, precision)


def test_reference_gradcheck():
    x = torch.randn(3, 5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: ops.dropout(x, 0.3, seed=SEED, site=1, backend="reference"), (x,)
    )


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_known_answers(word, expected):
    words = torch.tensor([word])
    assert tuple(int(w) for w in philox4x32((words,) * 4, (words,) * 2)) == expected


def test_the_header_gives_the_same_words(tmp_path):
    """csrc/philox.h, which C++ and CUDA include, against the definition in Python."""
    source = tmp_path / "probe.cpp"
    source.write_text(
        f'#include "{CSRC / "philox.h"}"\n'
        'extern "C" void words(uint32_t group, uint64_t row, uint32_t site, uint64_t seed,'
        " uint32_t* out) {\n"
        "  const bertfast::PhiloxWords w = bertfast::philox(group, row, site, seed);\n"
        "  for (int i = 0; i < 4; ++i) out[i] = w.word[i];\n"
        "}\n"
        'extern "C" float scale(uint32_t t) { return bertfast::dropout_scale(t); }\n'
    )
    library = tmp_path / "probe.so"
    compiler = csrc_build._Toolchain.find().command
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-std=c++17", str(source), "-o", str(library)], check=True
    )
    probe = ctypes.CDLL(str(library))
    probe.scale.restype = ctypes.c_float
    out = (ctypes.c_uint32 * 4)()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        group, site = torch.randint(1 << 32, (2,), generator=generator).tolist()
        row, seed = torch.randint(-(1 << 62), 1 << 62, (2,), generator=generator).tolist()
        probe.words(
            ctypes.c_uint32(group),
            ctypes.c_uint64(row),
            ctypes.c_uint32(site),
            ctypes.c_uint64(seed),
            out,
        )
        tensors = [
            torch.tensor([w & 0xFFFFFFFF]) for w in (group, row, row >> 32, site, seed, seed >> 32)
        ]
        assert tuple(out) == tuple(int(w) for w in philox4x32(tuple(tensors[:4]), tensors[4:]))
    for threshold in (0, 1, 6554, 65535, 65536):
        expected = torch.tensor(dropout_scale(threshold), dtype=torch.float32).item()
        assert probe.scale(threshold) == expected


def test_lane_and_column_layout():
    """Written out by hand: which word and half decides which column."""
    row, site = (1 << 32) + 5, 9
    for group in range(9):
        counter = [torch.tensor([w]) for w in (group, row & 0xFFFFFFFF, row >> 32, site)]
        key = [torch.tensor([w]) for w in (testing.SEED & 0xFFFFFFFF, testing.SEED >> 32)]
        words = [int(w) for w in philox4x32(tuple(counter), tuple(key))]
        for lane in range(8):
            value = (words[lane // 2] >> (16 * (lane % 2))) & 0xFFFF
            rows = torch.tensor([row])
            column = 8 * group + lane
            attention_column = (group // 8) * 64 + 8 * lane + group % 8
            for threshold, kept in ((value, True), (value + 1, False)):
                mask = keep_mask(SEED, site, rows, column + 1, threshold)
                assert bool(mask[0, column]) is kept
                mask = attention_keep_mask(SEED, site, rows, attention_column + 1, threshold)
                assert bool(mask[0, attention_column]) is kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("make_mask", [keep_mask, attention_keep_mask])
def test_statistics(p, make_mask):
    rows, columns = 2000, 320
    threshold = dropout_threshold(p)
    q = 1 - threshold / 65536
    mask = make_mask(SEED, 3, torch.arange(rows), columns, threshold).double()
    n = mask.numel()
    assert abs(mask.mean() - q) < 4 * (q * (1 - q) / n) ** 0.5
    # Were rows (columns) uneven, the variance of their counts would leave chi-squared's range.
    for counts, size in ((mask.sum(1), columns), (mask.sum(0), rows)):
        statistic = ((counts - size * q) ** 2 / (size * q * (1 - q))).sum()
        tail = stats.chi2.cdf(float(statistic), len(counts))
        assert 1e-4 < tail < 1 - 1e-4
    # Neighbours along a row, along a column, and eight apart (the next Philox call).
    centred = mask - q
    for a, b in (
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[:, 8:], centred[:, :-8]),
    ):
        correlation = (a * b).mean() / (q * (1 - q))
        assert abs(correlation) < 4 / a.numel() ** 0.5


@pytest.mark.parametrize("change", ["seed low", "seed high", "site", "row high"])
def test_calls_are_independent(change):
    rows, columns, threshold = torch.arange(1000), 320, 32768
    base = keep_mask(SEED, 3, rows, columns, threshold)
    other = {
        "seed low": lambda: keep_mask(SEED + 1, 3, rows, columns, threshold),
        "seed high": lambda: keep_mask(SEED + (1 << 40), 3, rows, columns, threshold),
        "site": lambda: keep_mask(SEED, 4, rows, columns, threshold),
        "row high": lambda: keep_mask(SEED, 3, rows + (1 << 35), columns, threshold),
    }[change]()
    agreement = (base == other).double().mean()
    assert abs(agreement - 0.5) < 4 * 0.5 / base.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.37])
def test_expectation_is_the_input(p):
    x = torch.full((2000, 320), 3.0)
    out = ops.dropout(x, p, seed=SEED, site=1)
    sigma = 3.0 * (p / (1 - p) / x.numel()) ** 0.5
    assert abs(out.mean() - 3.0) < 4 * sigma
    assert set(out.unique().tolist()) == {0.0, out.max().item()}


@pytest.mark.parametrize("columns", [1, 8, 33, 511, 512, 513, 768, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_gives_the_bits_of_the_reference(columns, dtype, use_isa):
    """Mask, scale and rounding, on every instruction set."""
    x = torch.randn(50, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    for seed in (0, -1, testing.SEED):
        for site in (0, 7, 0xFFFFFFFF):
            arguments = (x, testing.seed_tensor(seed), 20000, site)
            expected = kernel("dropout", "reference").forward(*arguments)
            for isa in cpu.library().isas():
                use_isa(isa)
                assert torch.equal(kernel("dropout", "cpu").forward(*arguments), expected), isa


@pytest.mark.parametrize("shape", [(1, 100_003), (40_000, 5), (257, 515), (3, 7, 4096)])
def test_result_does_not_depend_on_the_number_of_threads(shape):
    x = torch.randn(*shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.dropout(x, 0.3, seed=SEED, site=1, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    expected = ops.dropout(x, 0.3, seed=SEED, site=1, backend="reference")
    assert all(torch.equal(result, expected) for result in results)


def test_cpu_dispatches_no_torch_arithmetic():
    x, dout = torch.randn(20, 24, requires_grad=True), torch.randn(20, 24)
    with testing.KernelOnly() as seen:
        torch.autograd.grad(ops.dropout(x, 0.3, seed=SEED, site=1, backend="cpu"), x, dout)
    assert "empty_like" in seen.seen


MUTATIONS = {
    "no 1 / (1 - p)": ("cpu/dropout.h", "v * scale_", "v"),
    "kept and dropped exchanged": ("cpu/dropout.h", ">= threshold)", "< threshold)"),
    "the threshold's own lane dropped": ("cpu/dropout.h", ">= threshold)", "> threshold)"),
    "six rounds": ("philox.h", "philox_rounds = 7", "philox_rounds = 6"),
    "no site": (
        "cpu/dropout.h",
        "static_cast<uint64_t>(row), site_,",
        "static_cast<uint64_t>(row), 0,",
    ),
    "every row has the first one's mask": (
        "cpu/dropout.cpp",
        "mask.draw(row, first, count)",
        "mask.draw(0, first, count)",
    ),
    "the second piece of a row has the first one's mask": (
        "cpu/dropout.cpp",
        "mask.draw(row, first, count)",
        "mask.draw(row, 0, count)",
    ),
    "a row's last piece left out": (
        "cpu/dropout.cpp",
        "(a.columns % RowMask::piece != 0)",
        "0",
    ),
    "no tail": ("cpu/vector.h", "if (column < end) body", "if (column < 0) body"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("dropout", "cpu")


def test_p_0_is_the_input_itself_and_draws_nothing():
    x = torch.randn(3, 4)
    assert ops.dropout(x, 0.0, seed=None, site=1) is x


def test_p_1_is_zero_even_for_infinities():
    x = torch.tensor([[1.0, float("inf"), float("nan")]], requires_grad=True)
    out = ops.dropout(x, 1.0, seed=SEED, site=1)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert not out.any()
    assert not grad.any()


def test_backward_uses_the_mask_of_forward():
    x = torch.randn(20, 30, requires_grad=True)
    out = ops.dropout(x, 0.5, seed=SEED, site=1)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad != 0, out != 0)


TRITON_MUTATIONS = {
    "no 1 / (1 - p)": (
        "dropout.py",
        "v.to(tl.float32) * scale",
        "v.to(tl.float32)",
    ),
    "the row's high word is the low one": (
        "_dropout.py",
        "(row >> 32).to(tl.uint32) + nothing,",
        "row.to(tl.uint32) + nothing,",
    ),
    "a multiplier": (
        "_dropout.py",
        "c0 * 0xD2511F53",
        "c0 * 0xCD9E8D57",
    ),
    "a key step": (
        "_dropout.py",
        "k1 += 0xBB67AE85",
        "k1 += 0x9E3779B9",
    ),
    "keep and drop swapped": (
        "_dropout.py",
        ">= threshold",
        "< threshold",
    ),
    "the second piece has the first one's mask": (
        "dropout.py",
        "first + r, c0, COLUMNS)",
        "first + r, 0, COLUMNS)",
    ),
    "the first rows' mask for all": (
        "dropout.py",
        "threshold, first + r,",
        "threshold, (first - first) + r,",
    ),
    "the site left out": (
        "_dropout.py",
        "nothing + site.to(tl.uint32)",
        "nothing",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("dropout", "triton")


CUDA_MUTATIONS = {
    "no 1 / (1 - p)": (
        "cuda/common.h",
        "? g.value[2 * i] * scale : 0.0f",
        "? g.value[2 * i] : 0.0f",
    ),
    "dropped and kept swapped": (
        "cuda/common.h",
        "(word & 0xFFFFu) >= threshold",
        "(word & 0xFFFFu) < threshold",
    ),
    "the high lanes are the low ones": (
        "cuda/common.h",
        "(word >> 16) >= threshold",
        "(word & 0xFFFFu) >= threshold",
    ),
    "the row's mask for the first row": (
        "cuda/dropout.cu",
        "mask.apply(x, row, number)",
        "mask.apply(x, 0, number)",
    ),
    "every group has the first one's mask": (
        "cuda/dropout.cu",
        "mask.apply(x, row, number)",
        "mask.apply(x, row, 0)",
    ),
    "rows behind the first step left out": (
        "cuda/dropout.cu",
        "i < groups; i += step",
        "i < groups && i < step; i += step",
    ),
}


@pytest.mark.parametrize("name", CUDA_MUTATIONS)
def test_cuda_gate_bites(name, cuda_mutants):
    with cuda_mutants.in_place(*CUDA_MUTATIONS[name]):
        assert testing.gates_are_red("dropout", "cuda")


BAD = {
    "p: expected a probability from 0 to 1, got 1.1": ((1.1, SEED, 1), ValueError),
    "seed: expected an int64 tensor of one element when": ((0.1, None, 1), ValueError),
    r"seed: expected an int64 tensor of one element, got torch.int64 of shape \(2,\)": (
        (0.1, torch.zeros(2).long(), 1),
        TypeError,
    ),
    "site: expected a 32-bit unsigned integer, got -1": ((0.1, SEED, -1), ValueError),
}


def test_float64_is_the_reference_s():
    with pytest.raises(RuntimeError, match="dropout: backend 'cpu' cannot run: the input is"):
        ops.dropout(torch.ones(2, 3).double(), 0.1, seed=SEED, site=1, backend="cpu")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 4)])
def test_nothing_to_drop(shape):
    x = torch.ones(shape, requires_grad=True)
    out = ops.dropout(x, 0.1, seed=SEED, site=1, backend="cpu")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out.shape == grad.shape == shape


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    (p, seed, site), error = BAD[message]
    with pytest.raises(error, match=message):
        ops.dropout(torch.ones(2, 3), p, seed=seed, site=site)
