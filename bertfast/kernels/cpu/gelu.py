"""gelu on the CPU: ``csrc/cpu/gelu.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import address, dense, rows_and_columns


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x = dense(x)
    bias = None if bias is None else dense(bias)
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    status = cpu.library().gelu_forward(
        x.data_ptr(),
        address(bias),
        out.data_ptr(),
        rows,
        columns,
        approximate == "tanh",
        dtype_code(x),
        0 if bias is None else dtype_code(bias),
        threads(),
    )
    if status:
        check_launch(status, "gelu_forward", rows=rows, columns=columns, dtype=x.dtype)
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    dout, x = dense(dout), dense(x)
    dx = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    blocks = cpu.row_blocks(rows)
    if bias is None:
        partial, dbias = None, x.new_empty(0)
    else:
        bias = dense(bias)
        partial = torch.empty(blocks * columns, dtype=torch.float32, device="cpu")
        dbias = torch.empty_like(bias)
    status = cpu.library().gelu_backward(
        dout.data_ptr(),
        x.data_ptr(),
        address(bias),
        dx.data_ptr(),
        address(dbias),
        address(partial),
        rows,
        columns,
        blocks,
        approximate == "tanh",
        dtype_code(x),
        0 if bias is None else dtype_code(bias),
        threads(),
    )
    if status:
        check_launch(status, "gelu_backward", rows=rows, columns=columns, dtype=x.dtype)
    return dx, dbias
