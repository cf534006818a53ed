"""gelu(x + bias) against the eager composition it replaces, and torch.compile of that."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops, testing
from bertfast.kernels.cpu import gelu as launcher
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

MOVED = {"forward": 2, "backward": 3}


def subject(shape: str, approximate: str) -> Subject:
    rows, columns = map(int, shape.split("x"))
    name = f"{shape} {approximate}"
    case = testing.gelu_case(rows, columns, name=name, approximate=approximate)

    def eager(t: Tensors) -> Tensor:
        return F.gelu(t["x"] + t["bias"], approximate=approximate)

    return row_subject(case, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["1024x768", "1024x3072"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def bench_gelu(turns, approximate, direction, shape, dtype, implementation):
    moved = MOVED[direction] * bytes_of(shape, dtype)
    this = subject(shape, approximate)
    time_kernel(turns, this, implementation, direction, dtype, bytes=moved)


def on_gpu(dry: bool) -> list[OnGpu]:
    shape = "64x3072" if dry else "32768x3072"
    each = bytes_of(shape, "bfloat16")
    return [
        OnGpu(
            subject(shape, approximate),
            direction,
            "float32" if dry else "bfloat16",
            {"bytes": tensors * each},
            length=3072,
            target={"triton": 0.9, "cuda": 0.92},
            tiles=(f"gelu_{direction}",),
        )
        for approximate in ("none", "tanh")
        for direction, tensors in MOVED.items()
    ]


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """The last rows of many and of their gradient, and those of the same rows alone; with a bias,
    which goes by rows, and without, as one row."""
    x = torch.randn(elements // 1024, 1024, device=device).half()

    def last_rows(x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.detach().requires_grad_()
        out = ops.gelu(x, bias, backend=backend)
        (dx,) = torch.autograd.grad(out, x, x.detach())
        return torch.cat((out[-7:].detach(), dx[-7:]))

    both = (torch.randn(1024, device=device), None)
    got, alone = ([last_rows(rows, bias) for bias in both] for rows in (x, x[-7:]))
    return torch.cat(got), torch.cat(alone)


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
