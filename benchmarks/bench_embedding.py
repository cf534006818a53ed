"""Three look-ups, LayerNorm and dropout against the eager composition, and torch.compile of that.

The gradient of the word table is dense on all sides, as transformers has it by default.
"""

import pytest
import torch.nn.functional as F
from torch import Tensor

from bertfast import testing
from bertfast.testing import Tensors

from . import memory
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
