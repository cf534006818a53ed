import subprocess
import sys

import pytest
import torch

from bertfast import ops, testing
from bertfast.kernels import cpu


@pytest.mark.parametrize(("backend", "isa", "precision"), testing.gate_grid("cross_entropy"))
def test_gate(backend, isa, precision, use_isa):
    if isa:
        use_isa(isa)
    testing.run_gates("cross_entropy", backend, precision)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_gradcheck(reduction, with_bias):
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 8, -100, 3])
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.cross_entropy(
            h, w, b if with_bias else None, labels, reduction=reduction, backend="reference"
        ),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_labelled_is_zero_with_zero_gradients(reduction, backend):
    hidden, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    labels = torch.full((5,), -100)
    loss = ops.cross_entropy(*leaves, labels, reduction=reduction, backend=backend)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, leaves):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_number_of_threads(dtype):
    torch.manual_seed(0)
    leaves = [
        t.to(dtype).requires_grad_()
        for t in (torch.randn(50, 70), torch.randn(3001, 70), torch.randn(3001))
    ]
    labels = torch.randint(3001, (50,)).masked_fill(torch.rand(50) < 0.5, -100)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        loss = ops.cross_entropy(*leaves, labels, backend="cpu")
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", [*cpu.library().isas(), "triton"])
@pytest.mark.parametrize("masked", [range(100), range(1700, 2000), range(1, 2000)])
def test_a_bias_of_minus_infinity_rules_classes_out(masked, backend, use_isa):
    """Panels, shares and blocks of the vocabulary with nothing else in them included."""
    if backend != "triton":
        use_isa(backend)
        backend = "cpu"
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 32), torch.randn(2000, 32), torch.randn(2000)
    bias[list(masked)] = float("-inf")
    labels = torch.tensor([500, 1699, -100, 700, 101, 300, 1000])
    labels[labels >= 0] = 0 if len(masked) == 1999 else labels[labels >= 0]
    outputs = []
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = ops.cross_entropy(*leaves, labels, backend=name)
        outputs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for result, expected in zip(*outputs, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_incoming_gradient_scales_all_three(backend):
    leaves = [t.requires_grad_() for t in (torch.randn(5, 4), torch.randn(9, 4), torch.randn(9))]
    labels = torch.tensor([1, -100, 8, 0, 3])
    loss = ops.cross_entropy(*leaves, labels, backend=backend)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, three in zip(once, torch.autograd.grad(loss * 3, leaves), strict=True):
        torch.testing.assert_close(three, 3 * one)


PEAK = """
import re, sys, torch
import torch.nn.functional as F
from bertfast import ops

def megabytes(mark):
    (kilobytes,) = re.findall(mark + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(kilobytes) / 1024

tokens, columns, vocabulary = map(int, sys.argv[2:])
torch.set_num_threads(2)
hidden = torch.randn(tokens, columns, requires_grad=True)
weight = torch.randn(vocabulary, columns, requires_grad=True)
def step(hidden, labels):
    if sys.argv[1] == "eager":
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    else:
        ops.cross_entropy(hidden, weight, None, labels, backend=sys.argv[1]).backward()
step(hidden[:2], torch.arange(2))
open("/proc/self/clear_refs", "w").write("5")  # the highest mark so far is forgotten
before = megabytes("VmRSS")
step(hidden, torch.arange(tokens) % vocabulary)
print(megabytes("VmHWM") - before)
"""


def peak_megabytes(backend, *sizes):
    command = [sys.executable, "-P", "-c", PEAK, backend, *map(str, sizes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to see memory in")
def test_no_logits_of_all_tokens_exist():
    """What the process grows by, seen from outside."""
    logits = 512 * 60000 * 4 / 2**20
    assert peak_megabytes("eager", 512, 8, 60000) > 0.7 * logits, "the measurement sees nothing"
    assert peak_megabytes("cpu", 512, 8, 60000) < 0.2 * logits


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to see memory in")
def test_backward_holds_one_dhidden_per_thread():
    """And its operands; not one of every share of the vocabulary."""
    dhidden = 8192 * 256 * 4 / 2**20
    assert peak_megabytes("cpu", 8192, 256, 1000) < 10 * dhidden


def test_cpu_dispatches_no_torch_arithmetic():
    leaves = [t.requires_grad_() for t in (torch.randn(6, 4), torch.randn(9, 4), torch.randn(9))]
    labels, dloss = torch.tensor([3, -100, 0, 8, -100, 3]), torch.ones(())
    # What looks whether the labels are in range, before the kernel.
    looks = ("lt", "ge", "ne", "bitwise_or", "bitwise_and_", "any", "_local_scalar_dense")
    with testing.KernelOnly(*looks) as seen:
        loss = ops.cross_entropy(*leaves, labels, backend="cpu")
        torch.autograd.grad(loss, leaves, dloss)
    assert "empty" in seen.seen


def test_reference_would_fail_the_dispatch_test():
    with testing.KernelOnly(), pytest.raises(AssertionError, match="a kernel dispatched"):
        ops.cross_entropy(
            torch.randn(2, 4), torch.randn(9, 4), None, torch.ones(2).long(), backend="reference"
        )


SOURCE = "cpu/cross_entropy.cpp"
MUTATIONS = {
    "the sum so far is not rescaled": (
        SOURCE,
        "of_token.total * rescale + sum(total)",
        "of_token.total + sum(total)",
    ),
    "classes behind the last one count": (
        SOURCE,
        "if (count - c < width) z = first_lanes(z, count - c, broadcast(-__builtin_inff()));",
        "",
    ),
    "a target's logit without its bias": (
        SOURCE,
        "of_token.target = row[label];",
        "of_token.target = row[label] - biases[label];",
    ),
    "shares of the vocabulary added up without their maxima": (
        SOURCE,
        "std::exp(static_cast<double>(part.largest) - top)",
        "1.0",
    ),
    "the mean over all tokens": (
        SOURCE,
        "a.mean ? loss / static_cast<double>(tokens)",
        "a.mean ? loss / static_cast<double>(a.tokens)",
    ),
    "no target in backward": (SOURCE, "p[at] -= 1.0f;", "p[at] -= 0.0f;"),
    "backward's mean over all tokens": (
        SOURCE,
        "a.mean ? *a.dloss / static_cast<float>(tokens)",
        "a.mean ? *a.dloss / static_cast<float>(a.tokens)",
    ),
    "only the last share of dhidden": (SOURCE, "share == 0 ? load(dhidden", "true ? load(dhidden"),
    "dhidden of the neighbouring token": (
        SOURCE,
        "io.put(out + labelled[i] * a.columns + c,",
        "io.put(out + labelled[0] * a.columns + c,",
    ),
    "a panel's dhidden replaces the last one's": (
        SOURCE,
        "a.columns, dhidden, sums, accumulate);",
        "a.columns, dhidden, sums, false);",
    ),
    "unlabelled tokens keep what was in dhidden": (
        SOURCE,
        "std::memset(out + begin * a.columns, 0,",
        "std::memset(out + begin * a.columns, 0, 0 *",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_bites(name, mutants):
    with mutants.in_place(*MUTATIONS[name]):
        assert testing.gates_are_red("cross_entropy", "cpu")


TRITON = "cross_entropy.py"
TRITON_MUTATIONS = {
    "blocks added up without their maxima": (
        TRITON,
        "sums += total * tl.exp2((z - base[None, :]) * _LOG2_E)",
        "sums += total",
    ),
    "the sum so far is not rescaled": (
        TRITON,
        "sums = sums * tl.exp2((largest - base) * _LOG2_E)[None, :]",
        "sums = sums * 1.0",
    ),
    "classes behind the last one count": (
        TRITON,
        'start = tl.where(known, 0.0, float("-inf"))',
        "start = tl.where(known, 0.0, 0.0)",
    ),
    "every block has the first one's bias": (
        TRITON,
        "tl.load(bias + class_, mask=known",
        "tl.load(bias + tl.arange(0, N), mask=known",
    ),
    "the last columns left out": (
        TRITON,
        "for first in range(0, columns, K):\n        inside",
        "for first in range(0, columns - K + 1, K):\n        inside",
    ),
    "the mean is a sum": (TRITON, "result / _divisor(labelled) if MEAN", "result if MEAN"),
    "every list has the first one's tokens": (
        TRITON,
        "- own, first + i, mask=own != 0)",
        "- own, i, mask=own != 0)",
    ),
    "no target in backward": (TRITON, "dz - 1.0, dz)", "dz, dz)"),
    "every chunk has the first one's targets": (
        TRITON,
        ".to(tl.int64) - begin\n",
        ".to(tl.int64)\n",
    ),
    "tokens that are not there count in the bias": (
        TRITON,
        "dz = tl.where(there[:, None], dz, 0.0)",
        "dz = tl.where(there[:, None], dz, 1.0)",
    ),
    "dhidden of the last chunk only": (
        TRITON,
        "sums += tl.load(wide + at, mask=mine, other=0.0)",
        "",
    ),
    "dhidden of the neighbouring token": (
        TRITON,
        "to = dhidden + token[:, None] * columns",
        "to = dhidden + r[:, None] * columns",
    ),
    "dweight of the neighbouring token": (
        TRITON,
        "   hidden + token[:, None] * columns + c[None, :]",
        "   hidden + (start + tl.arange(0, K))[:, None] * columns + c[None, :]",
    ),
    "the last tokens left out of dweight": (
        TRITON,
        "for start in tl.range(0, labelled, K):",
        "for start in tl.range(0, labelled // K * K, K):",
    ),
    "the last tokens left out of dbias": (
        TRITON,
        "for first in tl.range(0, _tiles(labelled, M), BLOCKS):",
        "for first in tl.range(0, labelled // M, BLOCKS):",
    ),
    "dbias without the loss's gradient": (
        TRITON,
        "tl.sum(total, axis=0) * _scale(dloss, labelled, MEAN)",
        "tl.sum(total, axis=0)",
    ),
}


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_triton_gate_bites(name, triton_mutants):
    with triton_mutants.in_place(*TRITON_MUTATIONS[name]):
        assert testing.gates_are_red("cross_entropy", "triton")


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.bfloat16), ("cpu", torch.bfloat16), ("triton", torch.float16)],
)
def test_the_scalar_is_float32_and_ignored_tokens_are_not_read(backend, dtype):
    hidden = torch.randn(4, 8).to(dtype)
    hidden[1] = float("nan")
    labels = torch.tensor([1, 7, 2, 3])
    loss = ops.cross_entropy(
        hidden, torch.randn(9, 8), None, labels, ignore_index=7, backend=backend
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.isfinite()


BAD = {
    r"hidden: expected shape \(T, C\)": ({"hidden": torch.ones(1, 4, 8)}, ValueError),
    r"hidden: .* with C >= 1, got \(4, 0\)": (
        {"hidden": torch.ones(4, 0), "weight": torch.ones(9, 0)},
        ValueError,
    ),
    r"weight: expected shape \(9, 8\), got \(9, 7\)": ({"weight": torch.ones(9, 7)}, ValueError),
    r"weight: expected shape \(V, C\) with V >= 1": ({"weight": torch.ones(0, 8)}, ValueError),
    r"bias: expected shape \(9,\)": ({"bias": torch.ones(8)}, ValueError),
    r"labels: expected shape \(4,\)": ({"labels": torch.zeros(3).long()}, ValueError),
    "labels: expected an int64 or int32": ({"labels": torch.zeros(4)}, TypeError),
    r"labels: expected values from 0 to 8 \(or -100\), got 9 at position 2": (
        {"labels": torch.tensor([0, 1, 9, 2])},
        ValueError,
    ),
    r"labels: expected values from 0 to 8 \(or -100\), got -1": (
        {"labels": torch.tensor([0, 1, -1, 2])},
        ValueError,
    ),
    "ignore_index: expected an int, got NoneType": ({"ignore_index": None}, TypeError),
    "reduction: expected 'mean' or 'sum', got 'none'": ({"reduction": "none"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    changes, error = BAD[message]
    arguments = {
        "hidden": torch.ones(4, 8),
        "weight": torch.ones(9, 8),
        "bias": torch.ones(9),
        "labels": torch.zeros(4).long(),
        **changes,
    }
    with pytest.raises(error, match=message):
        ops.cross_entropy(**arguments)
