"""Attention of packed sequences against SDPA, the eager composition and torch.compile of that.

BERT-base's 12 heads of 64. bertfast reads queries, keys and values side by side in one tensor,
``(T, 3, heads, d)``, as a joint projection leaves them. The others get the layout that suits SDPA
best, contiguous ``(B, heads, S, d)``, and sequences of different lengths padded, with a boolean
mask of the keys.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import testing
from bertfast.testing import Tensors

from . import memory
from .conftest import MIXED, MIXED_LENGTHS
from .kernels import DTYPES, Peer, Subject, precision, time_kernel

HEADS, HEAD_DIM = 12, 64
BATCHES = {
    "8x128": [128] * 8,
    "4x512": [512] * 4,
    MIXED: MIXED_LENGTHS,
    "small": [64, 32],
}
SMALL = {"batch": "small"}


def subject(batch: str, dropout_p: float) -> Subject:
    lengths = BATCHES[batch]
    longest = max(lengths)
    case = testing.attention_case(
        lengths, HEADS, HEAD_DIM, name=f"{batch} p{dropout_p}", packed=True, dropout_p=dropout_p
    )

    def padded(dtype: str) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        shape = (len(lengths), HEADS, longest, HEAD_DIM)
        tensors = {
            name: torch.randn(shape, generator=generator).to(precision(dtype)[0]) for name in "qkv"
        }
        if min(lengths) < longest:
            keys = torch.arange(longest) < torch.tensor(lengths)[:, None]
            tensors["mask"] = keys[:, None, None, :]
        return tensors

    def sdpa(t: Tensors) -> Tensor:
        return F.scaled_dot_product_attention(
            t["q"], t["k"], t["v"], attn_mask=t.get("mask"), dropout_p=dropout_p
        )

    def eager(t: Tensors) -> Tensor:
        scores = t["q"] @ t["k"].transpose(2, 3) * HEAD_DIM**-0.5
        if "mask" in t:
            scores = scores.masked_fill(~t["mask"], float("-inf"))
        return F.dropout(scores.softmax(-1), dropout_p) @ t["v"]

    return Subject(
        case,
        {
            name: Peer(call, padded, tuple("qkv"))
            for name, call in (("sdpa", sdpa), ("eager", eager))
        },
    )


@pytest.mark.parametrize("implementation", ["bertfast", "sdpa", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("batch", ["8x128", "4x512", MIXED])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_attention(turns, direction, batch, dropout_p, dtype, implementation):
    # Two products forward and five backward, of the tokens that are there.
    products = 2 if direction == "forward" else 7
    flops = products * sum(2 * s * s * HEAD_DIM * HEADS for s in BATCHES[batch])
    time_kernel(
        turns,
        subject(batch, dropout_p),
        implementation,
        direction,
        dtype,
        implementations=["bertfast", "sdpa", "eager", "compile"],
        flops=flops,
    )
    if direction != "forward" and implementation in ("bertfast", "sdpa"):
        turns.info.update(
            memory.measure(
                "bench_attention",
                implementation,
                direction,
                dtype,
                batch=batch,
                dropout_p=dropout_p,
            )
        )
