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
