"""The optimizer against a plain loop, the groups, the schedule."""

import itertools
import math

import pytest
import torch
from torch import nn

from bertfast.training import (
    AdamWithoutBiasCorrection,
    adamw,
    linear_schedule,
    parameter_groups,
)


def tiny() -> nn.Module:
    model = nn.ModuleDict(
        {"linear": nn.Linear(3, 4), "LayerNorm": nn.LayerNorm(4), "frozen": nn.Linear(2, 2)}
    )
    for p in model["frozen"].parameters():
        p.requires_grad_(False)
    return model


def test_decay_skips_biases_and_layernorm() -> None:
    model = tiny()
    decay, no_decay = parameter_groups(model, 0.01)
    assert decay["weight_decay"] == 0.01
    assert no_decay["weight_decay"] == 0
    assert [id(p) for p in decay["params"]] == [id(model["linear"].weight)]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in no_decay["params"]) == [
        "LayerNorm.bias",
        "LayerNorm.weight",
        "linear.bias",
    ]


def test_groups_fit_bert() -> None:
    import bertfast

    model = bertfast.BertForPreTraining(
        bertfast.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    names = {id(p): name for name, p in model.named_parameters()}
    decay, no_decay = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model))
    assert decay | no_decay == set(names.values())
    assert not decay & no_decay
    for name in names.values():
        assert (name in no_decay) == (name.endswith("bias") or "LayerNorm" in name)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_no_bias_correction_is_googles_formula(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    other = torch.randn(4, generator=generator, dtype=torch.float64)
    parameters = [nn.Parameter(p.clone()), nn.Parameter(other.clone())]
    unused = nn.Parameter(torch.ones(2))
    lr, (b1, b2), eps = 0.03, (0.9, 0.99), 1e-6
    optimizer = AdamWithoutBiasCorrection(
        [*parameters, unused], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay
    )
    expected = [p, other]
    m = [torch.zeros_like(x) for x in expected]
    v = [torch.zeros_like(x) for x in expected]
    for step in range(5):
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            m[i] = b1 * m[i] + (1 - b1) * gradient
            v[i] = b2 * v[i] + (1 - b2) * gradient * gradient
            update = m[i] / (v[i].sqrt() + eps) + decay * expected[i]
            expected[i] = expected[i] - lr * update
        optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=1e-12, atol=1e-12)
        if step == 0 and not decay:  # without correction the first step is (1-b1)/sqrt(1-b2) lr
            moved = (parameters[0].data - p).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-2, atol=0)
    assert (unused == 1).all()


def test_adamw_chooses_and_checks() -> None:
    model = tiny()
    assert type(adamw(model)) is torch.optim.AdamW
    assert type(adamw(model, bias_correction=False)) is AdamWithoutBiasCorrection
    for wrong in ({"lr": -1}, {"lr": math.nan}, {"eps": math.inf}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            adamw(model, **wrong)
    with pytest.raises(ValueError, match="betas"):
        adamw(model, betas=(0.9, 1.0))


def test_schedule() -> None:
    values = [linear_schedule(i / 100, 0.1) for i in range(101)]
    assert values[0] == values[100] == 0
    assert values[10] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[55] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(values[:11]))
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert linear_schedule(0, 0) == 1
    assert linear_schedule(-1) == linear_schedule(2) == 0
    for warmup in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match="warmup"):
            linear_schedule(0.5, warmup)
