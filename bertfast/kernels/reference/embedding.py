"""embedding: with ``s = word[ids] + token_type[types] + position[positions]``,

* ``y = dropout(xhat * weight + bias)``, ``xhat`` the normalised ``s``;
* backward: the mask and LayerNorm's gradient (see layernorm), then each table's gradient is the sum
  of ``ds`` over the tokens that read the row, taken in one fixed order: sort by id, sum segments.
"""

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype
from bertfast.kernels.reference.dropout import apply_mask
from bertfast.kernels.reference.layernorm import normalise, normalise_backward, normalised


def supports(x: Tensor) -> str | None:
    return None


def _sum(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
) -> Tensor:
    dtype = accumulation_dtype(word)
    total = word[input_ids.flatten()].to(dtype) + position[position_ids.flatten()]
    if token_type_ids is not None and token_type is not None:
        total = total + token_type[token_type_ids.flatten()]
    return total


def _scatter(ids: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """The gradient of ``table[ids]``: rows with the same id summed in token order."""
    grad = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    if ids.numel():
        order = torch.argsort(ids.flatten(), stable=True)
        unique, lengths = torch.unique_consecutive(ids.flatten()[order], return_counts=True)
        sums = torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0)
        grad[unique] = sums.to(table.dtype)
    return grad


def forward(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = _sum(input_ids, token_type_ids, position_ids, word, token_type, position)
    xhat, statistics = normalise(total, eps)
    out = xhat * weight + bias
    if seed is not None:
        out = apply_mask(out, seed, threshold, site)
    return out.to(dtype).reshape(*input_ids.shape, word.shape[1]), statistics


def backward(
    dout: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    padding_idx: int,
    threshold: int,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = _sum(input_ids, token_type_ids, position_ids, word, token_type, position)
    dout = dout.reshape(-1, word.shape[1]).to(total.dtype)
    if seed is not None:
        dout = apply_mask(dout, seed, threshold, site)
    xhat = normalised(total, statistics)
    ds, dweight, dbias = normalise_backward(dout, xhat, weight, statistics[1])
    dword = _scatter(input_ids, ds, word)
    if padding_idx >= 0:
        dword[padding_idx] = 0
    if token_type_ids is None or token_type is None:
        dtoken_type = word.new_empty(0)
    else:
        dtoken_type = _scatter(token_type_ids, ds, token_type)
    dposition = _scatter(position_ids, ds, position)
    return dword, dtoken_type, dposition, dweight.to(weight.dtype), dbias.to(bias.dtype)
