"""dropout: ``y = mask * x / (1 - p)``."""

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype
from bertfast.masks import dropout_scale, keep_mask


def supports(x: Tensor) -> str | None:
    return None


def apply_mask(x: Tensor, seed: Tensor, threshold: int, site: int) -> Tensor:
    """``mask * x / (1 - p)`` on ``(rows, columns)``, without rounding to a lower precision."""
    rows = torch.arange(x.shape[0], device=x.device)
    keep = keep_mask(seed, site, rows, x.shape[1], threshold)
    return torch.where(keep, x.to(accumulation_dtype(x)) * dropout_scale(threshold), 0.0)


def forward(x: Tensor, seed: Tensor, threshold: int, site: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return apply_mask(rows, seed, threshold, site).to(x.dtype).reshape(x.shape)
