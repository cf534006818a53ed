"""cross_entropy: over the labelled tokens i, with ``z_i = hidden_i weight^T + bias``,

* ``loss = sum_i logsumexp(z_i) - z_i[label_i]``, divided by their number for the mean;
* ``dz_i = softmax(z_i) - onehot(label_i)``, ``dhidden = dz weight``, ``dweight = dz^T hidden``,
  ``dbias = sum_i dz_i``.

Tokens are taken in blocks, and backward computes a block's logits again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype

_BLOCK = 64


def supports(x: Tensor) -> str | None:
    return None


def _blocks(labels: Tensor, ignore_index: int) -> Iterator[Tensor]:
    """The numbers of the labelled tokens, a block at a time."""
    labelled = (labels != ignore_index).nonzero().flatten()
    yield from labelled.split(_BLOCK) if labelled.numel() else ()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.matmul(hidden, weight.t())
    return logits if bias is None else logits + bias


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden)
    weight = weight.to(dtype)
    logsumexp = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    count = 0
    for tokens in _blocks(labels, ignore_index):
        logits = _logits(hidden[tokens].to(dtype), weight, bias)
        logsumexp[tokens] = torch.logsumexp(logits, -1)
        target = logits.gather(1, labels[tokens].long().unsqueeze(1)).squeeze(1)
        loss = loss + (logsumexp[tokens] - target).sum()
        count += tokens.numel()
    return loss / count if reduction == "mean" and count else loss, logsumexp


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden)
    wide = weight.to(dtype)
    dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device)
    dbias = torch.zeros(weight.shape[0], dtype=dtype, device=hidden.device)
    scale = dloss.to(dtype)
    if reduction == "mean":
        scale = scale / (labels != ignore_index).sum().clamp(min=1)
    for tokens in _blocks(labels, ignore_index):
        rows = hidden[tokens].to(dtype)
        dlogits = torch.exp(_logits(rows, wide, bias) - logsumexp[tokens].unsqueeze(1))
        dlogits[torch.arange(len(tokens), device=hidden.device), labels[tokens].long()] -= 1
        dlogits = dlogits * scale
        dhidden[tokens] = torch.matmul(dlogits, wide).to(hidden.dtype)
        dweight += torch.matmul(dlogits.t(), rows)
        dbias += dlogits.sum(0)
    if bias is None:
        return dhidden, dweight.to(weight.dtype), weight.new_empty(0)
    return dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)
