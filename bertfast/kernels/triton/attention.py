"""attention in Triton: an online softmax over blocks of keys, for packed sequences.

Forward and the two passes of backward give one program a block of queries or keys of one head.
Where sequences are at most 128 long, backward gives one program a whole head instead: five products
in place of seven. Nothing is added up by more than one program, so there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device, shared_memory
from bertfast.kernels.layout import by_head, dense
from bertfast.kernels.triton import Tile, generation, product_precision, signed
from bertfast.kernels.triton._dropout import keep_scores
from bertfast.masks import dropout_scale


def supports(x: Tensor) -> str | None:
    reason = shared.unsupported(x)
    if reason is None and x.is_cuda and x.dtype == torch.float32 and x.dim() == 3:
        # What backward's products need, which are not the tensor cores' (triton_compiled.json).
        needed = 49152 if x.shape[2] <= 64 else 114688 if x.shape[2] <= 128 else 172032
        there = shared_memory(x.device.index)
        if there < needed:
            return (
                f"float32 heads of {x.shape[2]} need {needed} bytes of shared memory in a block; "
                f"{x.device} has {there}"
            )
    return reason


_LOG2_E = tl.constexpr(1.4426950408889634)
# Keys of a block: the mask's blocks, too.
_KEYS = 64
# The most queries that one program's whole backward holds.
_SHORT = 128


@triton.jit
def _bounds(cu_seqlens, i, tokens):
    """Where sequence ``i`` begins and how long it is, inside the tensor whatever is in
    ``cu_seqlens``."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)
    end = tl.minimum(tl.load(cu_seqlens + i + 1), tokens)
    return begin.to(tl.int64), tl.maximum(end - begin, 0)


@triton.jit
def _block_of(cu_seqlens, task, blocks, batch, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence of a program, and its first row in it.

    Either every sequence has ``blocks`` programs, or sequence i has those from
    ``cu_seqlens[i] // BLOCK + i`` on, which are always enough and at most one too many.
    """
    if not SEARCH:
        return task // blocks, task % blocks * BLOCK
    found = 0
    for first in range(0, batch, 256):
        i = first + tl.arange(0, 256)
        begin = tl.load(cu_seqlens + i, mask=i < batch, other=0) // BLOCK + i
        found += tl.sum(((begin <= task) & (i < batch)).to(tl.int32), axis=0)
    i = tl.maximum(found - 1, 0)
    return i, (task - (tl.load(cu_seqlens + i) // BLOCK + i)) * BLOCK


@triton.jit
def _rows_at(
    x, row, token, offset, left, head_dim: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    """Addresses of rows from the int64 ``row`` on of one head, and those that are ``left``."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = (r < left)[:, None]
    if head_dim < D:
        inside = inside & (d < head_dim)[None, :]
    return x + (row * token + offset) + (r[:, None] * token + d[None, :]), inside


@triton.jit
def _load_rows(
    x, row, token, offset, left, head_dim: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    """Zeros behind the last of the rows."""
    at, inside = _rows_at(x, row, token, offset, left, head_dim, ROWS, D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store_rows(
    x, values, row, token, offset, left, head_dim: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    at, inside = _rows_at(x, row, token, offset, left, head_dim, ROWS, D)
    tl.store(at, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _clear_storage(
    x, cu_seqlens, batch, tokens, token, head, h,
    head_dim: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The rows behind the last sequence, shared out among the programs of a head."""
    end = tl.maximum(tl.minimum(tl.load(cu_seqlens + batch), tokens), 0).to(tl.int64)
    first = end + tl.program_id(0).to(tl.int64) * ROWS
    zeros = tl.zeros((ROWS, D), tl.float32)
    while first < tokens:
        _store_rows(x, zeros, first, token, h * head, tokens - first, head_dim, ROWS, D)
        first += tl.num_programs(0).to(tl.int64) * ROWS


@triton.jit
def _visible(
    first, first_key, queries, keys, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Which of a block of keys each of a block of queries sees."""
    j = first_key + tl.arange(0, N)
    if CAUSAL:
        last = first + tl.arange(0, M) + keys - queries
        return (j[None, :] <= last[:, None]) & (j < keys)[None, :]
    # Spelt out for every row: a mask that is broadcast later takes up to ten registers more.
    return (j < keys)[None, :] & (tl.arange(0, M) >= 0)[:, None]


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "batch", "blocks", "threshold", "site"])
def _forward(
    q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, seed,
    tokens_q, tokens_k, batch, blocks, heads, head_dim: tl.constexpr,
    q_token, q_head, k_token, k_head, v_token, v_head,
    scale, threshold, site, kept_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    token, head = heads * head_dim, head_dim
    _clear_storage(out, cu_seqlens_q, batch, tokens_q, token, head, h, head_dim, M, D)
    _clear_storage(logsumexp, cu_seqlens_q, batch, tokens_q, 1, tokens_q, h, 1, M, 1)
    i, first = _block_of(cu_seqlens_q, tl.program_id(0), blocks, batch, M, SEARCH)
    begin_q, queries = _bounds(cu_seqlens_q, i, tokens_q)
    begin_k, keys = _bounds(cu_seqlens_k, i, tokens_k)
    if first < queries:
        rows = _load_rows(q, begin_q + first, q_token, h * q_head, queries - first, head_dim, M, D)
        number = (begin_q + first + tl.arange(0, M)) * heads + h
        largest = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, D), tl.float32)
        end = keys
        if CAUSAL:
            end = tl.minimum(keys, tl.maximum(first + M + keys - queries, 0))
        for first_key in range(0, end, N):
            columns = _load_rows(
                k, begin_k + first_key, k_token, h * k_head, keys - first_key, head_dim, N, D
            )
            s = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * scale
            s = tl.where(_visible(first, first_key, queries, keys, CAUSAL, M, N), s, float("-inf"))
            now = tl.maximum(largest, tl.max(s, axis=1))
            # Minus infinity, where a query has seen no key, must not be subtracted from itself.
            base = tl.where(now == float("-inf"), 0.0, now)
            p = tl.exp2((s - base[:, None]) * _LOG2_E)
            rescale = tl.exp2((largest - base) * _LOG2_E)
            total = total * rescale + tl.sum(p, axis=1)
            if DROPOUT:
                p = tl.where(keep_scores(seed, site, threshold, number, first_key, N), p, 0.0)
            values = _load_rows(
                v, begin_k + first_key, v_token, h * v_head, keys - first_key, head_dim, N, D
            )
            sums = tl.dot(
                p.to(values.dtype), values, sums * rescale[:, None], input_precision=PRECISION
            )
            largest = now
        sees = total != 0.0
        factor = tl.where(sees, kept_scale / tl.where(sees, total, 1.0), 0.0)
        _store_rows(
            out, sums * factor[:, None], begin_q + first, token, h * head, queries - first,
            head_dim, M, D,
        )  # fmt: skip
        r = first + tl.arange(0, M)
        lse = tl.where(sees, largest + tl.log(tl.where(sees, total, 1.0)), float("-inf"))
        tl.store(logsumexp + h * tokens_q + begin_q + r, lse, mask=r < queries)


@triton.jit
def _gradients(
    rows, douts, columns, values, lse, dots, visible, seed, threshold, site, number, first_key,
    scale, kept_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The kept probabilities and the scores' gradients of a block of queries and one of keys."""
    s = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * scale
    # Minus infinity: the query sees no key, or none with a finite score.
    sees = lse != float("-inf")
    s = s - tl.where(sees, lse, 0.0)[:, None]
    p = tl.where(visible & sees[:, None], tl.exp2(s * _LOG2_E), 0.0)
    dp = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
    kept = p
    if DROPOUT:
        keep = keep_scores(seed, site, threshold, number, first_key, N)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * kept_scale, 0.0)
    return kept, p * (dp - dots[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _row_dots(
    dout, out, dots, tokens, heads,
    head_dim: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """``sum(dout * out)`` of every row and head."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * M
    token, base = heads * head_dim, h * head_dim
    a = _load_rows(dout, first, token, base, tokens - first, head_dim, M, D).to(tl.float32)
    b = _load_rows(out, first, token, base, tokens - first, head_dim, M, D).to(tl.float32)
    r = first + tl.arange(0, M)
    tl.store(dots + h * tokens + r, tl.sum(a * b, axis=1), mask=r < tokens)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "batch", "threshold", "site"])
def _backward_heads(
    dout, q, k, v, out, logsumexp, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seed,
    tokens_q, tokens_k, batch, heads, head_dim: tl.constexpr,
    q_token, q_head, k_token, k_head, v_token, v_head,
    dq_token, dq_head, dk_token, dk_head, dv_token, dv_head,
    scale, threshold, site, kept_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The whole backward of one head of a sequence with at most M queries: with all of them here,
    what a block of keys adds to dk and dv is all there is to it."""
    i, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, head = heads * head_dim, head_dim
    _clear_storage(dq, cu_seqlens_q, batch, tokens_q, dq_token, dq_head, h, head_dim, M, D)
    _clear_storage(dk, cu_seqlens_k, batch, tokens_k, dk_token, dk_head, h, head_dim, N, D)
    _clear_storage(dv, cu_seqlens_k, batch, tokens_k, dv_token, dv_head, h, head_dim, N, D)
    begin_q, queries = _bounds(cu_seqlens_q, i, tokens_q)
    begin_k, keys = _bounds(cu_seqlens_k, i, tokens_k)
    rows = _load_rows(q, begin_q, q_token, h * q_head, queries, head_dim, M, D)
    douts = _load_rows(dout, begin_q, token, h * head, queries, head_dim, M, D)
    outs = _load_rows(out, begin_q, token, h * head, queries, head_dim, M, D)
    dots = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), axis=1)
    r = tl.arange(0, M)
    number = (begin_q + r) * heads + h
    lse = tl.load(logsumexp + h * tokens_q + begin_q + r, mask=r < queries, other=float("-inf"))
    drows = tl.zeros((M, D), tl.float32)
    for first_key in range(0, keys, N):
        row, left = begin_k + first_key, keys - first_key
        columns = _load_rows(k, row, k_token, h * k_head, left, head_dim, N, D)
        values = _load_rows(v, row, v_token, h * v_head, left, head_dim, N, D)
        kept, ds = _gradients(
            rows, douts, columns, values, lse, dots,
            _visible(0, first_key, queries, keys, CAUSAL, M, N), seed, threshold, site, number,
            first_key, scale, kept_scale, DROPOUT, PRECISION, N,
        )  # fmt: skip
        dvalues = tl.dot(tl.trans(kept.to(rows.dtype)), douts, input_precision=PRECISION)
        _store_rows(dv, dvalues * kept_scale, row, dv_token, h * dv_head, left, head_dim, N, D)
        ds = ds.to(rows.dtype)
        dcolumns = tl.dot(tl.trans(ds), rows, input_precision=PRECISION)
        _store_rows(dk, dcolumns * scale, row, dk_token, h * dk_head, left, head_dim, N, D)
        drows = tl.dot(ds, columns, drows, input_precision=PRECISION)
    _store_rows(dq, drows * scale, begin_q, dq_token, h * dq_head, queries, head_dim, M, D)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "batch", "blocks", "threshold", "site"])
def _backward_keys(
    dout, q, k, v, logsumexp, dots, dk, dv, cu_seqlens_q, cu_seqlens_k, seed,
    tokens_q, tokens_k, batch, blocks, heads, head_dim: tl.constexpr,
    q_token, q_head, k_token, k_head, v_token, v_head, dk_token, dk_head, dv_token, dv_head,
    scale, threshold, site, kept_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    h = tl.program_id(1).to(tl.int64)
    token, head = heads * head_dim, head_dim
    _clear_storage(dk, cu_seqlens_k, batch, tokens_k, dk_token, dk_head, h, head_dim, N, D)
    _clear_storage(dv, cu_seqlens_k, batch, tokens_k, dv_token, dv_head, h, head_dim, N, D)
    i, first_key = _block_of(cu_seqlens_k, tl.program_id(0), blocks, batch, N, SEARCH)
    begin_q, queries = _bounds(cu_seqlens_q, i, tokens_q)
    begin_k, keys = _bounds(cu_seqlens_k, i, tokens_k)
    if first_key < keys:
        row, left = begin_k + first_key, keys - first_key
        columns = _load_rows(k, row, k_token, h * k_head, left, head_dim, N, D)
        values = _load_rows(v, row, v_token, h * v_head, left, head_dim, N, D)
        dcolumns = tl.zeros((N, D), tl.float32)
        dvalues = tl.zeros((N, D), tl.float32)
        begin = 0
        if CAUSAL:
            # The first query that sees the first of these keys, at a block's start.
            begin = tl.maximum(first_key + queries - keys, 0) // M * M
        for first in range(begin, queries, M):
            rows = _load_rows(
                q, begin_q + first, q_token, h * q_head, queries - first, head_dim, M, D
            )
            douts = _load_rows(
                dout, begin_q + first, token, h * head, queries - first, head_dim, M, D
            )
            r = first + tl.arange(0, M)
            at = h * tokens_q + begin_q + r
            lse = tl.load(logsumexp + at, mask=r < queries, other=float("-inf"))
            row_dots = tl.load(dots + at, mask=r < queries, other=0.0)
            kept, ds = _gradients(
                rows, douts, columns, values, lse, row_dots,
                _visible(first, first_key, queries, keys, CAUSAL, M, N), seed, threshold, site,
                (begin_q + r) * heads + h, first_key, scale, kept_scale, DROPOUT, PRECISION, N,
            )  # fmt: skip
            kept, ds = kept.to(rows.dtype), ds.to(rows.dtype)
            dvalues = tl.dot(tl.trans(kept), douts, dvalues, input_precision=PRECISION)
            dcolumns = tl.dot(tl.trans(ds), rows, dcolumns, input_precision=PRECISION)
        _store_rows(dk, dcolumns * scale, row, dk_token, h * dk_head, left, head_dim, N, D)
        _store_rows(dv, dvalues * kept_scale, row, dv_token, h * dv_head, left, head_dim, N, D)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "batch", "blocks", "threshold", "site"])
def _backward_queries(
    dout, q, k, v, logsumexp, dots, dq, cu_seqlens_q, cu_seqlens_k, seed,
    tokens_q, tokens_k, batch, blocks, heads, head_dim: tl.constexpr,
    q_token, q_head, k_token, k_head, v_token, v_head, dq_token, dq_head,
    scale, threshold, site, kept_scale,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries."""
    h = tl.program_id(1).to(tl.int64)
    token, head = heads * head_dim, head_dim
    _clear_storage(dq, cu_seqlens_q, batch, tokens_q, dq_token, dq_head, h, head_dim, M, D)
    i, first = _block_of(cu_seqlens_q, tl.program_id(0), blocks, batch, M, SEARCH)
    begin_q, queries = _bounds(cu_seqlens_q, i, tokens_q)
    begin_k, keys = _bounds(cu_seqlens_k, i, tokens_k)
    if first < queries:
        rows = _load_rows(q, begin_q + first, q_token, h * q_head, queries - first, head_dim, M, D)
        douts = _load_rows(dout, begin_q + first, token, h * head, queries - first, head_dim, M, D)
        r = first + tl.arange(0, M)
        at = h * tokens_q + begin_q + r
        lse = tl.load(logsumexp + at, mask=r < queries, other=float("-inf"))
        row_dots = tl.load(dots + at, mask=r < queries, other=0.0)
        drows = tl.zeros((M, D), tl.float32)
        end = keys
        if CAUSAL:
            end = tl.minimum(keys, tl.maximum(first + M + keys - queries, 0))
        for first_key in range(0, end, N):
            columns = _load_rows(
                k, begin_k + first_key, k_token, h * k_head, keys - first_key, head_dim, N, D
            )
            values = _load_rows(
                v, begin_k + first_key, v_token, h * v_head, keys - first_key, head_dim, N, D
            )
            _, ds = _gradients(
                rows, douts, columns, values, lse, row_dots,
                _visible(first, first_key, queries, keys, CAUSAL, M, N),
                seed, threshold, site, (begin_q + r) * heads + h, first_key, scale, kept_scale,
                DROPOUT, PRECISION, N,
            )  # fmt: skip
            drows = tl.dot(ds.to(rows.dtype), columns, drows, input_precision=PRECISION)
        _store_rows(
            dq, drows * scale, begin_q + first, dq_token, h * dq_head, queries - first,
            head_dim, M, D,
        )  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in tensors for i in (0, 1))


def _programs(tokens: int, batch: int, longest: int, block: int) -> tuple[int, int, bool]:
    """How many programs a head has, how many a sequence, and whether they must be searched for.

    Only the longest sequence is known here: either all have as many programs as it needs, or as
    many as the tokens need with one more for each sequence, whichever are fewer.
    """
    blocks = triton.cdiv(longest, block)
    bound = tokens // block + batch
    return (bound, 1, True) if bound < batch * blocks else (batch * blocks, blocks, False)


def _head_block(head_dim: int) -> int:
    return max(16, shared.power_of_two(head_dim))


# Queries, warps and stages of a kernel for heads of up to so many columns, of the generation or any
# (0): the largest that leave no register to be spilled with or without dropout, in 16 bits, which
# tests/ops/triton_compiled.json shows. Generation 8 has both operands of a product in registers.
_TILES = {
    "attention_forward": [
        (0, 256, (32, 8, 1)),
        (0, 128, (128, 8, 2)),
        (10, 64, (128, 8, 1)),
        (10, 32, (128, 8, 2)),
    ],
    # Of sequences with at most 64 queries.
    "attention_short_forward": [
        (0, 256, (32, 8, 1)),
        (0, 128, (64, 8, 2)),
        (0, 64, (64, 4, 2)),
        (10, 32, (64, 4, 1)),
    ],
    "attention_heads": [(0, 64, (128, 8, 2))],
    "attention_short_heads": [(0, 64, (64, 8, 2)), (0, 32, (64, 4, 2))],
    "attention_keys": [(0, 256, (16, 8, 1)), (0, 128, (32, 8, 1)), (0, 64, (64, 4, 1))],
    "attention_queries": [
        (0, 256, (32, 8, 1)),
        (0, 128, (64, 8, 2)),
        (9, 64, (64, 4, 2)),
        (10, 64, (64, 4, 1)),
    ],
}


def tile_of(
    kernel: str, head_dim: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tile:
    """What a kernel's programs work on: measured, or the last that fits in :data:`_TILES`."""
    width = _head_block(head_dim)
    if dtype == torch.float32:
        # Products on the plain cores, whose operands are all in registers.
        return Tile(32 if kernel == "attention_queries" and width <= 64 else 16, width, 8)
    measured = shared.measured_tile(kernel, width, device)
    if measured is not None:
        return measured
    here = (0, generation(device))
    fitting = [tile for of, most, tile in _TILES[kernel] if width <= most and of in here]
    rows, warps, stages = fitting[-1]
    return Tile(rows, width, warps, stages=stages)


def _fits_a_program(queries: int, width: int, q: Tensor) -> bool:
    """Whether one program can do a head's whole backward without spilling."""
    if q.dtype == torch.float32:
        return False
    return queries <= _SHORT and width <= (32 if generation(q.device) == 8 else 64)


def _short(kernel: str, queries: int) -> str:
    """The kernel's name in :data:`_TILES`, which for few queries is another."""
    return f"attention_short_{kernel}" if queries <= 64 else f"attention_{kernel}"


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
    tokens_q, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(heads, tokens_q, dtype=torch.float32, device=q.device)
    batch = cu_seqlens_q.shape[0] - 1
    width = _head_block(head_dim)
    tile = tile_of(_short("forward", max_seqlen_q), head_dim, q.device, q.dtype)
    programs, blocks, search = _programs(tokens_q, batch, max_seqlen_q, tile.rows)
    if programs == 0:
        return out.zero_(), logsumexp.zero_()
    with on_device(q):
        _forward[programs, heads](
            q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, seed,
            tokens_q, k.shape[0], batch, blocks, heads, head_dim, *_strides(q, k, v),
            scale, threshold, signed(site), dropout_scale(threshold),
            causal, seed is not None, search, product_precision(q), tile.rows, _KEYS, width,
            num_warps=tile.warps, num_stages=tile.stages,
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
    dq, dk, dv = gradients
    tokens_q, heads, head_dim = q.shape
    tokens_k, batch = k.shape[0], cu_seqlens_q.shape[0] - 1
    width = _head_block(head_dim)
    if batch == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    sizes, precision = (tokens_q, tokens_k, batch), product_precision(q)
    options = (
        scale, threshold, signed(site), dropout_scale(threshold), causal, seed is not None
    )  # fmt: skip
    with on_device(q):
        if _fits_a_program(max_seqlen_q, width, q):
            tile = tile_of(_short("heads", max_seqlen_q), head_dim, q.device, q.dtype)
            _backward_heads[batch, heads](
                dout, q, k, v, out, logsumexp, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seed,
                *sizes, heads, head_dim, *_strides(q, k, v, dq, dk, dv), *options, precision,
                tile.rows, _KEYS, width, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return
        dots = torch.empty(heads, tokens_q, dtype=torch.float32, device=q.device)
        if tokens_q:
            _row_dots[triton.cdiv(tokens_q, 64), heads](
                dout, out, dots, tokens_q, heads, head_dim, 64, width
            )
        tile = tile_of("attention_keys", head_dim, q.device, q.dtype)
        programs, blocks, search = _programs(tokens_k, batch, max(max_seqlen_k, 1), _KEYS)
        _backward_keys[programs, heads](
            dout, q, k, v, logsumexp, dots, dk, dv, cu_seqlens_q, cu_seqlens_k, seed,
            *sizes, blocks, heads, head_dim, *_strides(q, k, v, dk, dv), *options, search,
            precision, tile.rows, _KEYS, width, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tile_of("attention_queries", head_dim, q.device, q.dtype)
        programs, blocks, search = _programs(tokens_q, batch, max(max_seqlen_q, 1), tile.rows)
        _backward_queries[programs, heads](
            dout, q, k, v, logsumexp, dots, dq, cu_seqlens_q, cu_seqlens_k, seed,
            *sizes, blocks, heads, head_dim, *_strides(q, k, v, dq), *options, search,
            precision, tile.rows, _KEYS, width, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
