"""attention: for each sequence and head, with ``S = scale * q k^T``,

* ``P = softmax(S) = exp(S - logsumexp(S))``, ``out = (mask * P / (1 - p)) v``;
* ``dP = mask * (dout v^T) / (1 - p)``, ``D = rowsum(dout * out)``, ``dS = P * (dP - D)``,
  ``dq = scale * dS k``, ``dk = scale * dS^T q``, ``dv = (mask * P / (1 - p))^T dout``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype
from bertfast.masks import attention_keep_mask, dropout_scale


def supports(x: Tensor) -> str | None:
    return None


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of each sequence's queries and keys."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _by_head(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1).to(accumulation_dtype(x))


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.matmul(q, k.transpose(1, 2)) * scale
    if causal:
        queries, keys = scores.shape[1:]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~visible.tril(keys - queries), float("-inf"))
    return scores


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``(P, logsumexp)``; a query that sees no key gets zeros and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    unseeing = torch.isneginf(largest)
    weights = torch.exp(scores - largest.masked_fill(unseeing, 0.0))
    total = weights.sum(-1, keepdim=True)
    logsumexp = (largest + torch.log(total)).squeeze(-1)
    return weights / total.masked_fill(unseeing, 1.0), logsumexp


def _probabilities(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """``P`` again, from what forward saved."""
    unseeing = torch.isneginf(logsumexp).unsqueeze(-1)
    return torch.exp(scores - logsumexp.unsqueeze(-1)).masked_fill(unseeing, 0.0)


def _dropout_factor(
    seed: Tensor | None, site: int, threshold: int, rows: slice, heads: int, keys: int
) -> Tensor | float:
    """``mask / (1 - p)`` as ``(heads, queries, keys)``, or 1 without dropout."""
    if seed is None:
        return 1.0
    queries = torch.arange(rows.start, rows.stop, device=seed.device)
    head = torch.arange(heads, device=seed.device).unsqueeze(1)
    numbers = (queries * heads + head).flatten()
    keep = attention_keep_mask(seed, site, numbers, keys, threshold)
    return keep.reshape(heads, len(queries), keys) * dropout_scale(threshold)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    seed: Tensor | None,
    threshold: int,
    site: int,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.zeros(heads, tokens, dtype=accumulation_dtype(q), device=q.device)
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(_by_head(q, queries), _by_head(k, keys), scale, causal)
        p, logsumexp[:, queries] = _softmax(scores)
        p = p * _dropout_factor(seed, site, threshold, queries, heads, scores.shape[2])
        out[queries] = torch.matmul(p, _by_head(v, keys)).transpose(0, 1).to(out.dtype)
    return out, logsumexp


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    seed: Tensor | None,
    threshold: int,
    site: int,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes dq, dk and dv into ``gradients``, which may be strided views."""
    dq, dk, dv = gradients
    for gradient in gradients:
        gradient.zero_()
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        q_, do = _by_head(q, queries), _by_head(dout, queries)
        k_, v_ = _by_head(k, keys), _by_head(v, keys)
        p = _probabilities(_scores(q_, k_, scale, causal), logsumexp[:, queries])
        factor = _dropout_factor(seed, site, threshold, queries, q.shape[1], p.shape[2])
        dp = torch.matmul(do, v_.transpose(1, 2)) * factor
        row = (do * _by_head(out, queries)).sum(-1, keepdim=True)
        ds = p * (dp - row) * scale
        dq[queries] = torch.matmul(ds, k_).transpose(0, 1).to(dq.dtype)
        dk[keys] = torch.matmul(ds.transpose(1, 2), q_).transpose(0, 1).to(dk.dtype)
        dv[keys] = torch.matmul((p * factor).transpose(1, 2), do).transpose(0, 1).to(dv.dtype)
