"""Attention of packed sequences against SDPA, the eager composition and torch.compile of that.

BERT-base's 12 heads of 64. bertfast reads queries, keys and values side by side in one tensor,
``(T, 3, heads, d)``, as a joint projection leaves them. The others get the layout that suits SDPA
best, contiguous ``(B, heads, S, d)``, and sequences of different lengths padded, with a boolean
mask of the keys.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bertfast import ops, testing
from bertfast.backends import ON_GPU
from bertfast.testing import Tensors

from . import memory
from .conftest import MIXED, MIXED_LENGTHS, mixed_lengths
from .gpu.timing import OnGpu
from .kernels import DTYPES, Peer, Subject, precision, time_kernel

HEADS, HEAD_DIM = 12, 64
SIZES = (64, 128, 256, 512, 1024, 4096)
SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
BATCHES = {
    "8x128": [128] * 8,
    "4x512": [512] * 4,
    MIXED: MIXED_LENGTHS,
    "small": [64, 32],
}
SMALL = {"batch": "small"}


def subject(batch: str, dropout_p: float, lengths: list[int] | None = None) -> Subject:
    lengths = lengths or BATCHES[batch]
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


def useful_flops(lengths: list[int], products: int) -> int:
    """Of the tokens that are there: two products forward, five backward."""
    return products * sum(2 * s * s * HEAD_DIM * HEADS for s in lengths)


def on_gpu(dry: bool) -> list[OnGpu]:
    """32,768 tokens in sequences of one length, and mixed ones, beside each of SDPA's kernels on
    padded tensors, and those that take sequences of any lengths side by side."""
    batches = {f"{32768 // s}x{s}": [s] * (32768 // s) for s in SIZES}
    batches["512 of mean 34, longest 128"] = mixed_lengths(512, 34, 128)
    if dry:
        batches = {"2x16": [16] * 2}
    entries = []
    for name, lengths in batches.items():
        for dropout_p in (0.1, 0.0):
            this = subject(name, dropout_p, lengths)
            this.peers.update(_unpadded_peers(lengths, dropout_p))
            for kernel in SDPA:
                this.peers[kernel.name] = dataclasses.replace(
                    this.peers["sdpa"], call=_with_kernel(this.peers["sdpa"].call, kernel)
                )
            # Products, and tensors of qkv's third that are read or written.
            for direction, products, tensors in (("forward", 2, 4), ("forward+backward", 7, 12)):
                ahead, target = _targets(direction, lengths, dropout_p)
                each = sum(lengths) * HEADS * HEAD_DIM * 2
                entries.append(
                    OnGpu(
                        this,
                        direction,
                        "float16" if dry else "bfloat16",
                        {"flops": useful_flops(lengths, products), "bytes": tensors * each},
                        length=max(lengths),
                        target=target,
                        tiles=_tile_names(direction, max(lengths)),
                        peers=("sdpa", "nested") if dry else tuple(this.peers),
                        ahead=ahead,
                    )
                )
    return entries


def _targets(
    direction: str, lengths: list[int], dropout_p: float
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """How far ahead of its peers each backend is to be, and the share of the ceiling to reach."""
    longest, both = max(lengths), direction == "forward+backward"

    def of_sdpa(multiple: float) -> dict[str, float]:
        return {kernel.name: multiple for kernel in SDPA}

    if min(lengths) < longest:
        return dict.fromkeys(ON_GPU, of_sdpa(2.0)), {}
    ahead = {}
    if both and 128 <= longest <= 512:
        ahead["triton"] = of_sdpa(1.3 if dropout_p else 1.0)
    if both and longest <= 256 and dropout_p:
        ahead["cuda"] = {"triton": 1.0, **of_sdpa(1.5)}
    target = {}
    if longest == 128:
        target = {"cuda": 0.7} if dropout_p else {"triton": 0.6, "cuda": 0.7}
    return ahead, target if both or not dropout_p else {}


def _tile_names(direction: str, longest: int) -> tuple[str, ...]:
    """The kernels that do most of this; long sequences go backward in two."""
    short = "short_" if longest <= 64 else ""
    if direction == "forward":
        return (f"attention_{short}forward",)
    if longest <= 128:
        return (f"attention_{short}heads",)
    return ("attention_keys", "attention_queries")


def _unpadded_peers(lengths: list[int], dropout_p: float) -> dict[str, Peer]:
    """torch's own kernels for sequences of any lengths, side by side as ours take them: SDPA on
    jagged nested tensors, and ``varlen_attn``, which has no dropout."""
    longest, tokens = max(lengths), sum(lengths)

    def inputs(dtype: str) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(precision(dtype)[0])
            for name in "qkv"
        }
        return {**tensors, "cu_seqlens": testing.cu_seqlens_of(lengths)}

    def nested(t: Tensors) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                t[name], t["cu_seqlens"], min_seqlen=min(lengths), max_seqlen=longest
            ).transpose(1, 2)
            for name in "qkv"
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        values: Tensor = out.transpose(1, 2).values()
        return values

    def varlen(t: Tensors) -> Tensor:
        # Not in the oldest torch that is supported.
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens = t["cu_seqlens"]
        out = varlen_attn(t["q"], t["k"], t["v"], cu_seqlens, cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out

    calls = {"nested": nested} if dropout_p else {"nested": nested, "varlen": varlen}
    return {name: Peer(call, inputs, tuple("qkv")) for name, call in calls.items()}


def _with_kernel(call: Callable[[Tensors], Tensor], kernel: SDPBackend) -> Callable[..., Tensor]:
    def chosen(t: Tensors) -> Tensor:
        with sdpa_kernel(kernel):
            return call(t)

    return chosen


def large(backend: str, device: str, elements: int) -> tuple[Tensor, Tensor]:
    """The last sequence of many and its gradient, and those of it alone."""
    tokens = elements // (3 * 256)
    qkv = torch.randn(tokens, 3, 4, 64, device=device, dtype=torch.float16)

    def last_rows(qkv: Tensor) -> Tensor:
        qkv = qkv.detach().requires_grad_()
        ends = torch.arange(len(qkv), -1, -7, device=device).flip(0)
        ends[0] = 0
        longest = int(ends.diff().max())
        out = ops.attention_qkvpacked(
            qkv, cu_seqlens=ends.int(), max_seqlen=longest, backend=backend
        )
        (grad,) = torch.autograd.grad(out, qkv, out.detach())
        return torch.cat((out[-7:].detach().flatten(), grad[-7:].flatten()))

    return last_rows(qkv), last_rows(qkv[-7:])


@pytest.mark.parametrize("implementation", ["bertfast", "sdpa", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("batch", ["8x128", "4x512", MIXED])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_attention(turns, direction, batch, dropout_p, dtype, implementation):
    flops = useful_flops(BATCHES[batch], 2 if direction == "forward" else 7)
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
