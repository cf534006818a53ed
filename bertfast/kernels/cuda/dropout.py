"""dropout in CUDA C++: ``csrc/cuda/dropout.cu``."""

import torch
from torch import Tensor

from bertfast.kernels import cuda
from bertfast.kernels.cuda import dtype_code, launch
from bertfast.kernels.layout import dense


def supports(x: Tensor) -> str | None:
    return cuda.unsupported(x)


def forward(x: Tensor, seed: Tensor, threshold: int, site: int) -> Tensor:
    x = dense(x)
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    launch(
        "dropout",
        x,
        x.data_ptr(),
        out.data_ptr(),
        seed.data_ptr(),
        rows,
        columns,
        threshold,
        site,
        dtype_code(x),
        rows=rows,
        columns=columns,
    )
    return out
