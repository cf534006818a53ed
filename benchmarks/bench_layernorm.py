"""LayerNorm(residual + dropout(x)) against the eager composition, and torch.compile of that."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops, testing
from bertfast.kernels.cpu import layernorm as launcher
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
    name = f"{shape} p{dropout_p}"
    case = testing.layernorm_case(rows, columns, name=name, dropout_p=dropout_p)

    def eager(t: Tensors) -> Tensor:
        total = t["residual"] + F.dropout(t["x"], dropout_p)
        return F.layer_norm(total, (columns,), t["weight"], t["bias"], 1e-12)

    return row_subject(case, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["1024x768", "1024x3072"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def bench_layernorm(turns, dropout_p, direction, shape, dtype, implementation):
    # Forward without a backward to come: read x and residual, write the output. Backward: read
    # dout and the sum, write dx, and with dropout dresidual, which then is another tensor.
    tensors = {"forward": 3, "backward": 3 if dropout_p == 0.0 else 4}[direction]
    moved = tensors * bytes_of(shape, dtype)
    this = subject(shape, dropout_p)
    time_kernel(turns, this, implementation, direction, dtype, bytes=moved)


def on_gpu(dry: bool) -> list[OnGpu]:
    """Forward as in training, which also writes the sum that backward reads."""
    entries = []
    for columns in (768, 1024):
        shape = f"{64 if dry else 32768}x{columns}"
        for dropout_p in (0.1, 0.0):
            this, each = subject(shape, dropout_p), bytes_of(shape, "bfloat16")
            for direction, tensors, target in (
                ("training forward", 4, {"triton": 0.85, "cuda": 0.9}),
                ("backward", 4 if dropout_p else 3, {"triton": 0.75, "cuda": 0.8}),
            ):
                entries.append(
                    OnGpu(
                        this,
                        direction,
                        "float32" if dry else "bfloat16",
                        {"bytes": tensors * each},
                        length=columns,
                        target=target if dropout_p else {},
                        tiles=(f"layernorm_{direction.split()[-1]}",),
                    )
                )
    return entries


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """The last rows of many and of their gradient, and those of the same rows alone."""
    x = torch.randn(elements // 1024, 1024, device=device).half()
    weight, bias = torch.randn(2, 1024, device=device)

    def last_rows(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = ops.layernorm(x, weight, bias, backend=backend)
        (dx,) = torch.autograd.grad(out, x, x.detach())
        return torch.cat((out[-7:].detach(), dx[-7:]))

    return last_rows(x), last_rows(x[-7:])


@pytest.mark.parametrize("call", ["launcher", "inference", "grad", "eager_grad"])
def bench_overhead(benchmark, call):
    """Microseconds of a call on one row of 8, where there is nothing to compute."""
    x, residual = torch.randn(1, 8), torch.randn(1, 8)
    weight, bias = torch.ones(8), torch.zeros(8)
    benchmark.group = "layernorm overhead"
    benchmark.extra_info.update(implementation=call, word="layernorm", case="overhead")
    with torch.set_grad_enabled("grad" in call):
        x.requires_grad_("grad" in call)
        if call == "launcher":
            benchmark(launcher.forward, x, weight, bias, residual, None, 1e-12, 0, 0, True)
        elif call == "eager_grad":
            benchmark(lambda: F.layer_norm(x + residual, (8,), weight, bias, 1e-12))
        else:
            benchmark(ops.layernorm, x, weight, bias, residual=residual)
