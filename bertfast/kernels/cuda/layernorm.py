"""layernorm in CUDA C++: ``csrc/cuda/layernorm.cu``."""

import torch
from torch import Tensor

from bertfast.kernels import cuda
from bertfast.kernels.cuda import dtype_code, launch, processors_of
from bertfast.kernels.layout import address, dense, dense_or_none


def supports(x: Tensor) -> str | None:
    return cuda.unsupported(x)


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
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    launch(
        "layernorm_forward",
        x,
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
        weight.dtype == torch.float32,
        rows=rows,
        columns=columns,
    )
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
    blocks = max(1, min(2 * processors_of(total), rows))
    dx = torch.empty_like(total)
    both = has_residual and seed is not None
    dresidual = torch.empty_like(total) if both else total.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    partial = torch.empty(blocks, 2, columns, dtype=torch.float32, device=total.device)
    launch(
        "layernorm_backward",
        total,
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
        weight.dtype == torch.float32,
        rows=rows,
        columns=columns,
    )
    return dx, dresidual, dweight, dbias
