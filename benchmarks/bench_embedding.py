"""Three look-ups, LayerNorm and dropout against the eager composition, and torch.compile of that.

The gradient of the word table is dense on all sides, as transformers has it by default.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops, testing
from bertfast.testing import Tensors

from . import memory
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

VOCABULARY = 30522
SMALL = {"shape": "64x64"}


def subject(shape: str, dropout_p: float) -> Subject:
    tokens, columns = map(int, shape.split("x"))
    case = testing.embedding_case(
        tokens,
        columns,
        name=f"{shape} p{dropout_p}",
        vocabulary=VOCABULARY,
        dropout_p=dropout_p,
        padding_idx=0,
    )

    def eager(t: Tensors) -> Tensor:
        total = F.embedding(t["input_ids"], t["word"], padding_idx=0)
        total = total + F.embedding(t["token_type_ids"], t["token_type"])
        total = total + F.embedding(t["position_ids"], t["position"])
        y = F.layer_norm(total, (columns,), t["weight"], t["bias"], 1e-12)
        return F.dropout(y, dropout_p)

    return row_subject(case, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def bench_embedding(turns, dropout_p, direction, dtype, implementation):
    shape = "1024x768"
    # The small tables stay in the cache. Forward: read the word rows, write the output. Backward:
    # read dout and the word rows, write the word table's gradient, nearly all of it zeros.
    moved = 2 * bytes_of(shape, dtype)
    if direction == "backward":
        moved += bytes_of(f"{VOCABULARY}x768", dtype)
    this = subject(shape, dropout_p)
    time_kernel(turns, this, implementation, direction, dtype, bytes=moved)
    if direction == "backward" and implementation != "compile":
        turns.info.update(
            memory.measure(
                "bench_embedding",
                implementation,
                direction,
                dtype,
                shape=shape,
                dropout_p=dropout_p,
            )
        )


def on_gpu(dry: bool) -> list[OnGpu]:
    shape = "64x768" if dry else "32768x768"
    each, table = bytes_of(shape, "bfloat16"), bytes_of(f"{VOCABULARY}x768", "bfloat16")
    return [
        OnGpu(
            subject(shape, 0.1),
            direction,
            "float32" if dry else "bfloat16",
            {"bytes": moved},
            length=768,
            tiles=(f"embedding_{direction}",),
        )
        for direction, moved in (("forward", 2 * each), ("backward", 2 * each + table))
    ]


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """The last tokens of many, and the same tokens alone."""
    tokens, generator = elements // 1024, torch.Generator(device).manual_seed(0)
    ids = torch.randint(50, (tokens,), device=device, generator=generator)
    table, weight = torch.randn(50, 1024, device=device).half(), torch.ones(1024, device=device)

    def call(some: Tensor) -> Tensor:
        return ops.embedding(some, None, some, table, None, table, weight, weight, backend=backend)

    return call(ids)[-7:].clone(), call(ids[-7:])
