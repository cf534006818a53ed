"""gelu(x + bias) against the eager composition it replaces, and torch.compile of that."""

import pytest
import torch
import torch.nn.functional as F

from bertfast import ops, testing
from bertfast.kernels.cpu import gelu as launcher

from .rows import DIRECTIONS, DTYPES, IMPLEMENTATIONS, SHAPES, time_rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def bench_gelu(benchmark, approximate, direction, shape, dtype, implementation):
    case = testing.gelu_case(*shape, name=approximate, approximate=approximate)

    def eager(t):
        return F.gelu(t["x"] + t["bias"], approximate=approximate)

    moved = {"forward": 2, "backward": 3}
    time_rows(benchmark, case, eager, implementation, direction, dtype, moved)


@pytest.mark.parametrize("call", ["launcher", "inference", "grad", "eager_grad"])
def bench_overhead(benchmark, call):
    """Microseconds of a call on one row of 8, where there is nothing to compute."""
    x, bias = torch.randn(1, 8), torch.randn(8)
    benchmark.group = "gelu overhead"
    benchmark.extra_info.update(implementation=call, word="gelu", case="overhead")
    with torch.set_grad_enabled("grad" in call):
        if call == "launcher":
            benchmark(launcher.forward, x, bias, "none")
        elif call == "eager_grad":
            x.requires_grad_()
            benchmark(lambda: F.gelu(x + bias))
        else:
            x.requires_grad_(call == "grad")
            benchmark(ops.gelu, x, bias)
