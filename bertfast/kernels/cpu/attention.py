"""attention on the CPU: ``csrc/cpu/attention.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import address, by_head, dense


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


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
    q, k, v = by_head(q), by_head(k), by_head(v)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    queries, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    logsumexp = torch.empty(heads, queries, dtype=torch.float32, device="cpu")
    status = cpu.library().attention_forward(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        logsumexp.data_ptr(),
        cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(),
        address(seed),
        cu_seqlens_q.shape[0] - 1,
        queries,
        k.shape[0],
        heads,
        head_dim,
        _strides(q),
        _strides(k),
        _strides(v),
        scale,
        causal,
        threshold,
        site,
        dtype_code(q),
        threads(),
    )
    if status:
        _refused(status, "attention_forward", q, k)
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
    q, k, v = by_head(q), by_head(k), by_head(v)
    dout, out, logsumexp = dense(dout), dense(out), dense(logsumexp)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    dq, dk, dv = gradients
    queries, heads, head_dim = q.shape
    status = cpu.library().attention_backward(
        dout.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        logsumexp.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(),
        address(seed),
        cu_seqlens_q.shape[0] - 1,
        queries,
        k.shape[0],
        heads,
        head_dim,
        _strides(q),
        _strides(k),
        _strides(v),
        _strides(dq),
        _strides(dk),
        _strides(dv),
        scale,
        causal,
        threshold,
        site,
        dtype_code(q),
        threads(),
    )
    if status:
        _refused(status, "attention_backward", q, k)


def _refused(status: int, kernel: str, q: Tensor, k: Tensor) -> None:
    check_launch(status, kernel, q=tuple(q.shape), k=tuple(k.shape), dtype=q.dtype)
