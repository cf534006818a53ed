import pytest
import torch

from bertfast import ops, testing


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_labelled_is_zero_with_zero_gradients(reduction):
    hidden, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = ops.cross_entropy(*leaves, torch.full((5,), -100), reduction=reduction)
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


def test_the_incoming_gradient_scales_all_three():
    leaves = [t.requires_grad_() for t in (torch.randn(5, 4), torch.randn(9, 4), torch.randn(9))]
    labels = torch.tensor([1, -100, 8, 0, 3])
    loss = ops.cross_entropy(*leaves, labels, backend="cpu")
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, three in zip(once, torch.autograd.grad(loss * 3, leaves), strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_no_logits_of_all_tokens_exist(monkeypatch):
    """The largest thing torch allocates is a gradient; the rest is the kernel's own, by design a
    panel of the vocabulary and sixteen rows per labelled token (the benchmark measures it)."""
    sizes = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def counted(*args, make=make, **kwargs):
            sizes.append((made := make(*args, **kwargs)).numel())
            return made

        monkeypatch.setattr(torch, name, counted)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8)
    loss = ops.cross_entropy(hidden, weight, None, torch.arange(64), backend="cpu")
    loss.backward()
    assert 0 < max(sizes) <= weight.numel()


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
    "only the first share of dhidden": (
        SOURCE,
        "for (int64_t share = 0; share < shares; ++share)\n          total += load(dhidden",
        "for (int64_t share = 0; share < 1; ++share)\n          total += load(dhidden",
    ),
    "dhidden of the neighbouring token": (
        SOURCE,
        "io.put(out + labelled[i] * a.columns + c, total);",
        "io.put(out + labelled[0] * a.columns + c, total);",
    ),
    "a panel's dhidden replaces the last one's": (
        SOURCE,
        "a.columns, share_dhidden, sums, true);",
        "a.columns, share_dhidden, sums, false);",
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


def test_the_scalar_is_float32_and_ignored_tokens_are_not_read():
    hidden = torch.randn(4, 8).bfloat16()
    hidden[1] = float("nan")
    loss = ops.cross_entropy(
        hidden, torch.randn(9, 8), None, torch.tensor([1, 7, 2, 3]), ignore_index=7
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.isfinite()


BAD = {
    r"hidden: expected shape \(T, C\)": ({"hidden": torch.ones(1, 4, 8)}, ValueError),
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
