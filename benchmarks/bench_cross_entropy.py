"""The masked-LM decoder and its loss on 15 % labelled tokens, against what transformers does:
``nn.Linear`` on all tokens, then ``CrossEntropyLoss``; and torch.compile of that. On a GPU also on
labelled tokens alone, which is what a model that looks for them first hands over.

In "bfloat16-mixed" the weights are float32: transformers runs under autocast, which casts them,
bertfast takes them as they are.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import ops, testing
from bertfast.testing import Tensors

from . import memory
from .gpu.timing import OnGpu
from .kernels import IMPLEMENTATIONS, Subject, row_subject, time_kernel

TOKENS, HIDDEN, VOCABULARY = 1024, 768, 30522
SMALL = {"tokens": 64, "hidden": 64, "vocabulary": 512}


def subject(
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
    labelled: float = 0.15,
) -> Subject:
    name = f"{tokens}x{hidden}x{vocabulary}"
    case = testing.cross_entropy_case(tokens, hidden, vocabulary, name=name, labelled=labelled)

    def eager(t: Tensors) -> Tensor:
        autocast = t["weight"].dtype != t["hidden"].dtype
        with torch.autocast(t["hidden"].device.type, torch.bfloat16, enabled=autocast):
            logits = F.linear(t["hidden"], t["weight"], t["bias"])
            return F.cross_entropy(logits, t["labels"])

    return row_subject(case, eager)


def on_gpu(dry: bool) -> list[OnGpu]:
    """The labelled tokens of 64 sequences of 128, alone and among the others."""
    entries = []
    for tokens, share in ((1280, 1.0), (8192, 0.15)):
        this = subject(**SMALL) if dry else subject(tokens, labelled=share)
        labelled = int((this.case.inputs(torch.float32)["labels"] >= 0).sum())
        for dtype in ("float32",) if dry else ("bfloat16", "bfloat16-mixed"):
            for direction, products in (("forward", 1), ("forward+backward", 3)):
                entries.append(
                    OnGpu(
                        this,
                        direction,
                        dtype,
                        {"flops": products * 2 * labelled * HIDDEN * VOCABULARY},
                        length=HIDDEN,
                        ahead={"triton": {"eager": 1.0, "compile": 1.0}},
                        memory={"eager": 0.1},
                        tiles=_tile_names(direction, dtype),
                    )
                )
        if dry:
            break
    return entries


def _tile_names(direction: str, dtype: str) -> tuple[str, ...]:
    """The first one is forward's, too: what both together take decides."""
    word = "cross_entropy_mixed" if "mixed" in dtype else "cross_entropy"
    return (f"{word}_logits", f"{word}_gradients") if direction != "forward" else ()


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the last tokens of many, and those of the same tokens alone."""
    hidden = torch.randn(elements // 1024, 1024, device=device, dtype=torch.float16)
    weight = torch.randn(100, 1024, device=device, dtype=torch.float16) / 32
    labels = torch.full((len(hidden),), -100, device=device)
    labels[-7:] = torch.arange(7, device=device)

    def results(hidden: Tensor, labels: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = ops.cross_entropy(*leaves, None, labels, backend=backend)
        dhidden, dweight = torch.autograd.grad(loss, leaves)
        return torch.cat((loss.detach()[None], dhidden[-7:].flatten(), dweight.flatten()))

    return results(hidden, labels), results(hidden[-7:], labels[-7:])


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
