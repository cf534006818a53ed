"""The row-wise ops are all timed alike: one case on bertfast, on eager torch, compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bertfast import testing
from bertfast.testing import Case

SHAPES = [(1024, 768), (1024, 3072)]
DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["bertfast", "eager", "compile"]
DIRECTIONS = ["forward", "backward"]


def time_rows(
    benchmark: Any,
    case: Case,
    eager: Callable[[dict[str, Tensor]], Tensor],
    implementation: str,
    direction: str,
    dtype: torch.dtype,
    tensors_moved: dict[str, float],
) -> None:
    """Time one direction of one implementation, after the gate at the very same size.

    Args:
        eager: the composition a user would write, with torch's own dropout.
        tensors_moved: for each direction, how many tensors of the output's size must at least be
            read or written; the bandwidth is that of these.
    """
    testing.run_gate(case, dtype, "cpu")
    tensors = case.inputs(dtype)
    call: Callable[[dict[str, Tensor]], Tensor] = eager
    if implementation == "bertfast":
        call = lambda t: case.op(t, "cpu")  # noqa: E731
    elif implementation == "compile":
        call = torch.compile(eager, dynamic=False)
    with torch.no_grad():
        like = case.eager(tensors)
    benchmark.group = f"{case.word} {direction} {tuple(like.shape)} {dtype} {case.name}"
    benchmark.extra_info.update(
        implementation=implementation,
        word=case.word,
        case=case.name,
        direction=direction,
        shape=list(like.shape),
        dtype=str(dtype).removeprefix("torch."),
        bytes=int(tensors_moved[direction] * like.numel() * like.element_size()),
    )
    if direction == "forward":
        with torch.no_grad():
            benchmark.pedantic(call, (tensors,), rounds=100, warmup_rounds=10)
        return
    wanted = [tensors[name].requires_grad_() for name in case.grads]
    out = call(tensors)
    dout = torch.randn_like(out)

    def backward() -> Any:
        return torch.autograd.grad(out, wanted, dout, retain_graph=True)

    benchmark.pedantic(backward, rounds=100, warmup_rounds=10)
    torch.compiler.reset()
