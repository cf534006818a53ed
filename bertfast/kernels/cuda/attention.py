"""attention in CUDA C++: ``csrc/cuda/attention.cu`` and ``attention_backward.cu``."""

import torch
from torch import Tensor

from bertfast.kernels import cuda
from bertfast.kernels.cuda import dtype_code, launch, shared_memory_of
from bertfast.kernels.layout import address, by_head, dense

# Columns of a head's tiles.
WIDTHS = (32, 64, 96, 128)
# A grid's second dimension.
MOST_HEADS = 65535
# Bytes of a multiprocessor's shared memory that the system takes for each block.
RESERVED = 1024
# Keys that are worked on together, and queries of a warp.
KEYS, ROWS = 64, 16
FORWARD, HEADS, QUERIES, PASS_OF_KEYS = range(4)


def supports(x: Tensor) -> str | None:
    reason = cuda.unsupported(x)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the input is {x.dtype}; it takes torch.bfloat16 and torch.float16"
    heads, head_dim = x.shape[-2:]
    if heads > MOST_HEADS:
        return f"there are {heads} heads; it takes up to {MOST_HEADS}"
    if head_dim > WIDTHS[-1]:
        return f"heads have {head_dim} elements; it takes up to {WIDTHS[-1]}"
    needed = shared_bytes(PASS_OF_KEYS, head_dim, 8, 1, KEYS, False)
    there = shared_memory_of(x)
    if there < needed:
        return (
            f"heads of {head_dim} need {needed} bytes of shared memory in a block; "
            f"{x.device} has {there}"
        )
    return None


def width_of(head_dim: int) -> int:
    """The columns of a head's tiles: the next head dimension that has a kernel."""
    return next(width for width in WIDTHS if head_dim <= width)


def shared_bytes(
    kernel: int, head_dim: int, warps: int, heads: int, key_rows: int, ahead: bool
) -> int:
    """What a block needs, as ``csrc/cuda/attention*.cu`` lay it out."""
    width, rows, places = width_of(head_dim), ROWS * warps, 2 if ahead else 1
    matrices = {
        FORWARD: rows + 2 * places * key_rows,
        HEADS: 2 * rows + 2 * places * key_rows,
        QUERIES: 2 * rows + 2 * places * key_rows,
        PASS_OF_KEYS: 2 * places * rows + 2 * key_rows,
    }[kernel]
    # The probabilities and the scores' gradients.
    scores = 2 * rows * KEYS if kernel in (HEADS, PASS_OF_KEYS) else 0
    return 2 * heads * (matrices * width + scores)


def blocks_at_once(kernel: int, head_dim: int, warps: int) -> int:
    """Blocks that a multiprocessor has registers for: the plan, which the sources tell nvcc, too.

    In sixteen bits, heads of up to 64 elements leave 128 registers to a thread; wider ones take up
    to 255.
    """
    if width_of(head_dim) > 64 or warps == 16:
        return 1
    # Two warps are two heads of a block, and have more registers.
    return 3 if kernel == HEADS and warps == 2 else max(2, 16 // max(warps, 4))


def plan(
    kernel: int, queries: int, keys: int, head_dim: int, there: int
) -> tuple[int, int, int, bool, int]:
    """How a block is laid out: warps of a head, heads, keys of a tile, whether tiles are copied
    ahead, and the shared memory for that.

    Short heads share a block of at least four warps. A warp has 16 queries, and eight to a head are
    128, of which there are several blocks.

    Args:
        kernel: one of :data:`FORWARD`, :data:`HEADS`, :data:`QUERIES`, :data:`PASS_OF_KEYS`.
        queries, keys: of the longest sequence.
        there: bytes of shared memory that a block may have.
    """
    warps = 8
    if kernel == FORWARD or (kernel == HEADS and head_dim <= 64):
        least = 1 if kernel == FORWARD else 2
        while warps > least and queries <= ROWS * warps // 2:
            warps //= 2
        if kernel == HEADS and queries > ROWS * warps:
            warps = 16
    heads = max(1, 4 // warps)
    # With one tile in all there is none ahead. A block more hides as much as a tile ahead.
    several = queries > ROWS * warps if kernel == PASS_OF_KEYS else keys > KEYS
    key_rows = KEYS if kernel == PASS_OF_KEYS else min(KEYS, max(1, -(-keys // ROWS)) * ROWS)
    needed = shared_bytes(kernel, head_dim, warps, heads, key_rows, True) + RESERVED
    ahead = several and needed * blocks_at_once(kernel, head_dim, warps) <= there + RESERVED
    needed = shared_bytes(kernel, head_dim, warps, heads, key_rows, ahead)
    return warps, heads, key_rows, ahead, needed


def whole_head(queries: int, keys: int, head_dim: int, there: int) -> bool:
    """Whether one block can do the whole backward of every head."""
    # Sixteen warps have registers for heads of 64.
    most = 16 * ROWS if width_of(head_dim) == 64 else 8 * ROWS
    return queries <= most and plan(HEADS, queries, keys, head_dim, there)[-1] <= there


def _strided(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


_NULL = (0, 0, 0)


def _launch(
    kernels: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    backward: tuple[tuple[int, int, int], ...],
    facts: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    scale: float,
    causal: bool,
    seed: Tensor | None,
    threshold: int,
    site: int,
) -> None:
    """Launch kernels one after another. ``backward``: dout and the gradients, or nulls."""
    tokens, heads, head_dim = q.shape
    there, tensors = shared_memory_of(q), [_strided(x) for x in (q, k, v, out)]
    for kernel in kernels:
        launch(
            "attention",
            q,
            kernel,
            *tensors,
            logsumexp.data_ptr(),
            *backward,
            address(facts),
            cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(),
            address(seed),
            tokens,
            k.shape[0],
            cu_seqlens_q.shape[0] - 1,
            heads,
            head_dim,
            *longest,
            scale,
            threshold,
            site,
            causal,
            dtype_code(q),
            *plan(kernel, *longest, head_dim, there),
            kernel_number=kernel,
            q=tuple(q.shape),
            k=tuple(k.shape),
        )


def _longest(q: Tensor, k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, int]:
    """No sequence is longer than all together, whatever bound was given."""
    return min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    seed: Tensor | None,
    threshold: int,
    site: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = by_head(q), by_head(k), by_head(v)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    longest = _longest(q, k, max_seqlen_q, max_seqlen_k)
    _launch(
        (FORWARD,), q, k, v, out, logsumexp, (_NULL,) * 4, None, cu_seqlens_q, cu_seqlens_k,
        longest, scale, causal, seed, threshold, site,
    )  # fmt: skip
    return out, logsumexp


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    seed: Tensor | None,
    threshold: int,
    site: int,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes dq, dk and dv into ``gradients``, which may be strided views."""
    q, k, v = by_head(q), by_head(k), by_head(v)
    dout, out, logsumexp = dense(dout), dense(out), dense(logsumexp)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    longest = _longest(q, k, max_seqlen_q, max_seqlen_k)
    kernels: tuple[int, ...] = (HEADS,)
    facts = None
    if not whole_head(*longest, q.shape[2], shared_memory_of(q)):
        kernels = (QUERIES, PASS_OF_KEYS)
        facts = torch.empty(*logsumexp.shape, 2, dtype=torch.float32, device=q.device)
    written = tuple(map(_strided, (dout, *gradients)))
    _launch(
        kernels, q, k, v, out, logsumexp, written, facts, cu_seqlens_q, cu_seqlens_k,
        longest, scale, causal, seed, threshold, site,
    )  # fmt: skip
