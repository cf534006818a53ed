"""dropout on the CPU: ``csrc/cpu/dropout.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import dense


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def forward(x: Tensor, seed: Tensor, threshold: int, site: int) -> Tensor:
    x = dense(x)
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    status = cpu.library().dropout(
        x.data_ptr(),
        out.data_ptr(),
        seed.data_ptr(),
        rows,
        columns,
        threshold,
        site,
        dtype_code(x),
        threads(),
    )
    if status:
        check_launch(status, "dropout", rows=rows, columns=columns, dtype=x.dtype)
    return out
