"""layernorm on the CPU: ``csrc/cpu/layernorm.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import address, dense, dense_or_none


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = dense(x), dense(weight), dense(bias)
    residual = dense_or_none(residual)
    columns = x.shape[-1]
    rows = x.numel() // columns
    out = torch.empty_like(x)
    keeps_sum = needs_backward and (residual is not None or seed is not None)
    total = torch.empty_like(x) if keeps_sum else x.new_empty(0)
    statistics = torch.empty(2, rows, dtype=torch.float32, device="cpu")
    status = cpu.library().layernorm_forward(
        x.data_ptr(),
        address(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        statistics.data_ptr(),
        address(seed),
        rows,
        columns,
        eps,
        threshold,
        site,
        dtype_code(x),
        dtype_code(weight),
        threads(),
    )
    if status:
        check_launch(status, "layernorm_forward", rows=rows, columns=columns, dtype=x.dtype)
    return out, total, statistics


def backward(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    threshold: int,
    site: int,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, total, weight = dense(dout), dense(total), dense(weight)
    columns = total.shape[-1]
    rows = total.numel() // columns
    blocks = cpu.row_blocks(rows)
    dx = torch.empty_like(total)
    both = has_residual and seed is not None
    dresidual = torch.empty_like(total) if both else total.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    partial = torch.empty(blocks * 2 * columns, dtype=torch.float32, device="cpu")
    status = cpu.library().layernorm_backward(
        dout.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        statistics.data_ptr(),
        dx.data_ptr(),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        partial.data_ptr(),
        address(seed),
        rows,
        columns,
        blocks,
        threshold,
        site,
        dtype_code(total),
        dtype_code(weight),
        threads(),
    )
    if status:
        check_launch(status, "layernorm_backward", rows=rows, columns=columns, dtype=total.dtype)
    return dx, dresidual, dweight, dbias
