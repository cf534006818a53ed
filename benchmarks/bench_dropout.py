"""dropout against torch's own, and torch.compile of that."""

import pytest
import torch.nn.functional as F

from bertfast import testing

from .rows import DIRECTIONS, DTYPES, IMPLEMENTATIONS, SHAPES, time_rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_dropout(benchmark, direction, shape, dtype, implementation):
    case = testing.dropout_case(*shape, name="p0.1")

    def eager(t):
        return F.dropout(t["x"], 0.1)

    moved = {"forward": 2, "backward": 2}
    time_rows(benchmark, case, eager, implementation, direction, dtype, moved)
