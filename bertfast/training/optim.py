"""AdamW as BERT is trained with it, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two optimizer groups: weight matrices with decay; biases and LayerNorm weights (all that is
    1-D) without.

    Parameters that do not require a gradient are left out; a tied parameter appears once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class AdamWithoutBiasCorrection(torch.optim.Optimizer):
    """Adam with decoupled weight decay as in Google's BERT code (optimization.py): the moments
    start at zero and are not corrected for it, so that early steps are smaller or larger than
    torch's::

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g²
        p = p - lr (m / (sqrt(v) + eps) + weight_decay p)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what ``closure`` returns, as torch's
        optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            m = [self.state[p]["exp_avg"] for p in params]
            v = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            update = torch._foreach_div(m, denominator)
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])
        return loss


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
) -> torch.optim.Optimizer:
    """AdamW over ``parameter_groups(model)``: torch's, or with ``bias_correction=False`` the one of
    Google's code.

    Raises ValueError for a rate, eps or decay that is negative or not finite, or betas outside [0,
    1).
    """
    check_adamw(lr, betas, eps, weight_decay)
    groups = parameter_groups(model, weight_decay)
    if bias_correction:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    return AdamWithoutBiasCorrection(groups, lr=lr, betas=betas, eps=eps)


def check_adamw(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise what ``adamw`` raises for these."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")


def linear_schedule(progress: float, warmup: float = 0.1) -> float:
    """Factor on the learning rate at ``progress`` in [0, 1] of the run: linear from 0 to 1 during
    the share ``warmup``, then linear to 0 at the end. ``progress`` outside [0, 1] is clamped;
    ``warmup`` may be 0.

    Raises ValueError for a ``warmup`` outside [0, 1).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share of the run in [0, 1), got {warmup!r}")
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    return (1.0 - progress) / (1.0 - warmup)
