"""gelu in CUDA C++: ``csrc/cuda/gelu.cu``."""

import torch
from torch import Tensor

from bertfast.kernels import cuda
from bertfast.kernels.cuda import dtype_code, launch, processors_of
from bertfast.kernels.layout import address, dense, dense_or_none, rows_and_columns


def supports(x: Tensor) -> str | None:
    return cuda.unsupported(x)


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x = dense(x)
    bias = dense_or_none(bias)
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    launch(
        "gelu_forward",
        x,
        x.data_ptr(),
        address(bias),
        out.data_ptr(),
        rows,
        columns,
        approximate == "tanh",
        dtype_code(x),
        bias is not None and bias.dtype == torch.float32,
        rows=rows,
        columns=columns,
    )
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    dout, x = dense(dout), dense(x)
    dx = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    # As many as fill the device, over all strips of 256 columns.
    blocks = max(1, min(8 * processors_of(x) // (columns // 256 + 1), rows // 8, 4096))
    if bias is None:
        partial, dbias = None, x.new_empty(0)
    else:
        bias = dense(bias)
        partial = torch.empty(blocks, columns, dtype=torch.float32, device=x.device)
        dbias = torch.empty_like(bias)
    launch(
        "gelu_backward",
        x,
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
        bias is not None and bias.dtype == torch.float32,
        rows=rows,
        columns=columns,
    )
    return dx, dbias
