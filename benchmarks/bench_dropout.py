"""dropout against F.dropout, and torch.compile of that."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops, testing
from bertfast.backends import ON_GPU
from bertfast.masks import dropout_threshold, keep_mask
from bertfast.testing import Tensors

from .gpu.timing import OnGpu
from .kernels import (
    DIRECTIONS,
    DTYPES,
    IMPLEMENTATIONS,
    Subject,
    bytes_of,
    row_subject,
    time_kernel,
)


def subject(shape: str, dropout_p: float) -> Subject:
    rows, columns = map(int, shape.split("x"))
    case = testing.dropout_case(rows, columns, name=f"{shape} p{dropout_p}", p=dropout_p)

    def eager(t: Tensors) -> Tensor:
        return F.dropout(t["x"], dropout_p)

    return row_subject(case, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_dropout(turns, direction, dtype, implementation):
    shape = "1024x768"
    this = subject(shape, 0.1)
    # Both ways, one tensor is read and one written: the mask is drawn again, not read.
    time_kernel(turns, this, implementation, direction, dtype, bytes=2 * bytes_of(shape, dtype))


def on_gpu(dry: bool) -> list[OnGpu]:
    shape = "64x768" if dry else "32768x768"
    moved = {"bytes": 2 * bytes_of(shape, "bfloat16")}
    dtype = "float32" if dry else "bfloat16"
    target = dict.fromkeys(ON_GPU, 0.9)
    this = subject(shape, 0.1)
    return [OnGpu(this, "forward", dtype, moved, length=768, target=target, tiles=("dropout",))]


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """The mask of the last rows of many, and what its definition says."""
    rows = elements // 1024
    ones, seed = torch.ones(rows, 1024, device=device).half(), testing.seed_tensor()
    out = ops.dropout(ones, 0.1, seed=seed.to(device), site=3, backend=backend)
    numbers = torch.arange(rows - 7, rows)
    expected = keep_mask(seed, 3, numbers, 1024, dropout_threshold(0.1))
    return (out[-7:] != 0).cpu(), expected
