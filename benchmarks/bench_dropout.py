"""dropout against F.dropout, and torch.compile of that."""

import pytest
import torch.nn.functional as F
from torch import Tensor

from bertfast import testing
from bertfast.testing import Tensors

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
