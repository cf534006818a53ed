"""cross_entropy on the CPU: ``csrc/cpu/cross_entropy.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import address, dense


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    hidden, weight, labels = dense(hidden), dense(weight), labels.contiguous()
    bias = None if bias is None else dense(bias)
    tokens, columns = hidden.shape
    loss = torch.empty((), dtype=torch.float32, device="cpu")
    logsumexp = torch.empty(tokens, dtype=torch.float32, device="cpu")
    status = cpu.library().cross_entropy_forward(
        hidden.data_ptr(),
        weight.data_ptr(),
        address(bias),
        labels.data_ptr(),
        loss.data_ptr(),
        logsumexp.data_ptr(),
        tokens,
        columns,
        weight.shape[0],
        ignore_index,
        reduction == "mean",
        labels.dtype == torch.int64,
        dtype_code(hidden),
        dtype_code(weight),
        0 if bias is None else dtype_code(bias),
        threads(),
    )
    if status:
        _refused(status, "cross_entropy_forward", hidden, weight)
    return loss, logsumexp


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
    dloss, hidden, weight = dense(dloss), dense(hidden), dense(weight)
    labels, logsumexp = labels.contiguous(), dense(logsumexp)
    bias = None if bias is None else dense(bias)
    tokens, columns = hidden.shape
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    status = cpu.library().cross_entropy_backward(
        dloss.data_ptr(),
        hidden.data_ptr(),
        weight.data_ptr(),
        address(bias),
        labels.data_ptr(),
        logsumexp.data_ptr(),
        dhidden.data_ptr(),
        dweight.data_ptr(),
        0 if bias is None else dbias.data_ptr(),
        tokens,
        columns,
        weight.shape[0],
        ignore_index,
        reduction == "mean",
        labels.dtype == torch.int64,
        dtype_code(hidden),
        dtype_code(weight),
        0 if bias is None else dtype_code(bias),
        threads(),
    )
    if status:
        _refused(status, "cross_entropy_backward", hidden, weight)
    return dhidden, dweight, dbias


def _refused(status: int, kernel: str, hidden: Tensor, weight: Tensor) -> None:
    check_launch(
        status, kernel, hidden=tuple(hidden.shape), weight=tuple(weight.shape), dtype=hidden.dtype
    )
