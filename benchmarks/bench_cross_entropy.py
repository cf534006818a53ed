"""The masked-LM decoder and its loss on 15 % labelled tokens, against what transformers does:
``nn.Linear`` on all tokens, then ``CrossEntropyLoss``; and torch.compile of that.

In "bfloat16-mixed" the weights are float32: transformers runs under autocast, which casts them,
bertfast takes them as they are.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import testing
from bertfast.testing import Tensors

from . import memory
from .kernels import IMPLEMENTATIONS, Subject, row_subject, time_kernel

TOKENS, HIDDEN, VOCABULARY = 1024, 768, 30522
SMALL = {"tokens": 64, "hidden": 64, "vocabulary": 512}


def subject(tokens: int = TOKENS, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> Subject:
    name = f"{tokens}x{hidden}x{vocabulary}"
    case = testing.cross_entropy_case(tokens, hidden, vocabulary, name=name, labelled=0.15)

    def eager(t: Tensors) -> Tensor:
        autocast = t["weight"].dtype != t["hidden"].dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = F.linear(t["hidden"], t["weight"], t["bias"])
            return F.cross_entropy(logits, t["labels"])

    return row_subject(case, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16-mixed"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_cross_entropy(turns, direction, dtype, implementation):
    this = subject()
    labels = this.peers["eager"].inputs(dtype)["labels"]
    labelled = int((labels >= 0).sum())
    # One product forward, two backward: hidden's gradient and the weight's.
    products = 1 if direction == "forward" else 3
    flops = products * 2 * labelled * HIDDEN * VOCABULARY
    time_kernel(turns, this, implementation, direction, dtype, flops=flops, labelled=labelled)
    if direction == "forward+backward" and implementation != "compile":
        turns.info.update(memory.measure("bench_cross_entropy", implementation, direction, dtype))
