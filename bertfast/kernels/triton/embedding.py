"""embedding in Triton.

Backward: LayerNorm's gradient ``ds`` of every token, then each table's rows are summed over the
tokens that read them. The tokens are sorted by id and taken 16 at a time; rows that more than one
such chunk reads are joined afterwards. Every sum has one order, so the bits do not change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device
from bertfast.kernels.layout import dense, dense_or_none
from bertfast.kernels.triton import (
    WIDEST_BLOCK,
    Tile,
    dropout,
    layernorm,
    signed,
)
from bertfast.kernels.triton._dropout import keep_rows
from bertfast.kernels.triton._norm import row_gradient, statistics_of, sum_both
from bertfast.masks import dropout_scale

supports = shared.unsupported_rows

# Sorted tokens that one program sums up, and chunks that are joined at a time.
_CHUNK = 16
_JOINED = 64
_COLUMNS = 128


@triton.jit
def _read(table, table_rows, ids, tokens, columns, c0, c, there, inside):
    """Rows of ``table`` in float32; zeros where an id is no row of it."""
    row = tl.load(ids + tokens, mask=there, other=-1).to(tl.int64)
    known = (row >= 0) & (row < table_rows)
    at = tl.where(known, row, 0)[:, None] * columns + c0 + c[None, :]
    return tl.load(table + at, mask=known[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_of(
    input_ids, token_type_ids, position_ids, word, token_type, position,
    words, types, positions, tokens, columns, c0, c, there, inside,
):  # fmt: skip
    """``word + token_type + position`` of the tokens, float32."""
    v = _read(word, words, input_ids, tokens, columns, c0, c, there, inside)
    v += _read(position, positions, position_ids, tokens, columns, c0, c, there, inside)
    if token_type_ids is not None:
        v += _read(token_type, types, token_type_ids, tokens, columns, c0, c, there, inside)
    return v


@triton.jit(do_not_specialize=["words", "types", "positions", "tokens", "threshold", "site"])
def _forward(
    input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, out,
    statistics, seed, words, types, positions, tokens, columns, eps, threshold, site, scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = r < tl.minimum(tokens - first, ROWS).to(tl.int32)
    inside = there[:, None] & (c < columns)[None, :]
    v = _sum_of(
        input_ids, token_type_ids, position_ids, word, token_type, position,
        words, types, positions, first + r, columns, 0, c, there, inside,
    )  # fmt: skip
    mean, rstd = statistics_of(v, inside, columns, eps)
    tl.store(statistics + first + r, mean, mask=there)
    tl.store(statistics + tokens + first + r, rstd, mask=there)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)
    y = (v - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    if DROPOUT:
        y = tl.where(keep_rows(seed, site, threshold, first + r, 0, COLUMNS), y * scale, 0.0)
    to = out + first * columns + (r[:, None] * columns + c[None, :])
    tl.store(to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["tiles", "words", "types", "positions", "tokens", "threshold", "site"]
)
def _backward(
    dout, input_ids, token_type_ids, position_ids, word, token_type, position, weight,
    statistics, ds, partial, seed, tiles, words, types, positions, tokens, columns,
    threshold, site, scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``ds``, float32, of every so many tiles; the sums over them stay in registers."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        first = tile * ROWS
        there = r < tl.minimum(tokens - first, ROWS).to(tl.int32)
        inside = there[:, None] & (c < columns)[None, :]
        at = first * columns + (r[:, None] * columns + c[None, :])
        dy = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_rows(seed, site, threshold, first + r, 0, COLUMNS)
            dy = tl.where(keep, dy * scale, 0.0)
        v = _sum_of(
            input_ids, token_type_ids, position_ids, word, token_type, position,
            words, types, positions, first + r, columns, 0, c, there, inside,
        )  # fmt: skip
        mean = tl.load(statistics + first + r, mask=there, other=0.0)
        rstd = tl.load(statistics + tokens + first + r, mask=there, other=0.0)
        xhat = tl.where(inside, (v - mean[:, None]) * rstd[:, None], 0.0)
        dweight += tl.sum(dy * xhat, axis=0)
        dbias += tl.sum(dy, axis=0)
        tl.store(ds + at, row_gradient(dy * w[None, :], xhat, rstd, columns), mask=inside)
    to = partial + program * 2 * columns + c
    tl.store(to, dweight, mask=c < columns)
    tl.store(to + columns, dbias, mask=c < columns)


@triton.jit(do_not_specialize=["words", "types", "positions", "tokens"])
def _gather(
    input_ids, token_type_ids, position_ids, word, token_type, position, out,
    words, types, positions, tokens, columns, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of one token with a long row, float32."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    c0 = tl.program_id(1) * COLUMNS
    c = tl.arange(0, COLUMNS)
    there = token < tokens
    inside = there[:, None] & (c0 + c < columns)[None, :]
    v = _sum_of(
        input_ids, token_type_ids, position_ids, word, token_type, position,
        words, types, positions, token, columns, c0, c, there, inside,
    )  # fmt: skip
    tl.store(out + token[:, None] * columns + c0 + c[None, :], v, mask=inside)


@triton.jit
def _id_at(ids, at, tokens):
    """The sorted id at position ``at``, or one that none is where there is no such position."""
    return tl.load(ids + at, mask=(at >= 0) & (at < tokens), other=-(1 << 31)).to(tl.int64)


@triton.jit(do_not_specialize=["tokens", "table_rows", "skip"])
def _sum_chunks(
    ids, order, ds, dtable, parts, tokens, table_rows, skip, columns,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums ``ds`` over each run of equal ids among one chunk of the sorted tokens.

    A run within the chunk is a row of ``dtable``. One that began before it goes to
    ``parts[chunk, 0]``, and one that only goes on after it to ``parts[chunk, 1]``.
    """
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    i, c = tl.arange(0, CHUNK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    there = begin + i < tokens
    own = tl.load(ids + begin + i, mask=there, other=-(1 << 31)).to(tl.int64)
    token = tl.load(order + begin + i, mask=there, other=0)
    rows = tl.load(
        ds + token[:, None] * columns + c[None, :],
        mask=there[:, None] & inside[None, :],
        other=0.0,
    )
    first = _id_at(ids, begin, tokens)
    began_before = (begin > 0) & (_id_at(ids, begin - 1, tokens) == first)
    after = _id_at(ids, begin + CHUNK, tokens)
    for e in tl.static_range(CHUNK):
        if begin + e < tokens:
            id = _id_at(ids, begin + e, tokens)
            goes_on = id == after if e == CHUNK - 1 else False
            if e == CHUNK - 1 or _id_at(ids, begin + e + 1, tokens) != id:
                total = tl.sum(tl.where((own == id)[:, None], rows, 0.0), axis=0)
                if began_before & (id == first):
                    tl.store(parts + (2 * chunk) * columns + c, total, mask=inside)
                elif goes_on:
                    tl.store(parts + (2 * chunk + 1) * columns + c, total, mask=inside)
                elif (id >= 0) & (id < table_rows) & (id != skip):
                    to = dtable + id * columns + c
                    tl.store(to, total.to(dtable.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "table_rows", "skip"])
def _join_chunks(
    ids, dtable, parts, tokens, table_rows, skip, columns,
    CHUNK: tl.constexpr, JOINED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the run that begins in one chunk and ends in another."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    id = _id_at(ids, begin + CHUNK - 1, tokens)
    goes_on = (begin + CHUNK < tokens) & (_id_at(ids, begin + CHUNK, tokens) == id)
    begins_here = (begin == 0) | (_id_at(ids, begin - 1, tokens) != id)
    known = (id >= 0) & (id < table_rows) & (id != skip)
    if goes_on & begins_here & known:
        c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = c < columns
        j = tl.arange(0, JOINED)
        total = tl.load(parts + (2 * chunk + 1) * columns + c, mask=inside, other=0.0)
        sums = tl.zeros((JOINED, COLUMNS), tl.float32)
        following = chunk + 1
        while _id_at(ids, following * CHUNK, tokens) == id:
            others = following + j
            same = _id_at(ids, others * CHUNK, tokens) == id
            sums += tl.load(
                parts + (2 * others[:, None]) * columns + c[None, :],
                mask=same[:, None] & inside[None, :],
                other=0.0,
            )
            following += JOINED
        total += tl.sum(sums, axis=0)
        to = dtable + id * columns + c
        tl.store(to, total.to(dtable.dtype.element_ty), mask=inside)


_TILES = {
    "embedding_forward": {"elements": 2048, "widest": WIDEST_BLOCK, "per_thread": 16},
    "embedding_backward": {"elements": 2048, "widest": 4096, "per_thread": 8},
}


def tile_of(kernel: str, columns: int, device: torch.device) -> Tile:
    return shared.tile(kernel, columns, device, **_TILES[kernel])


def _rows(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[0]


def forward(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    ids = dense(input_ids), dense_or_none(token_type_ids), dense(position_ids)
    tables = dense(word), dense_or_none(token_type), dense(position)
    weight, bias = dense(weight), dense(bias)
    tokens, columns = input_ids.numel(), word.shape[1]
    sizes = word.shape[0], _rows(token_type), position.shape[0], tokens, columns
    # The interpreter writes bfloat16, which only autocast asks for, wrongly.
    wrong = shared.interpreted and dtype == torch.bfloat16
    out = word.new_empty((*input_ids.shape, columns), dtype=torch.float32 if wrong else dtype)
    statistics = torch.empty(2, tokens, dtype=torch.float32, device=word.device)
    t = tile_of("embedding_forward", columns, word.device)
    with on_device(word):
        if columns > t.columns:
            total = _gathered(ids, tables, sizes, t)
            normed, _, statistics = layernorm.forward(
                total, weight, bias, None, None, eps, 0, 0, False
            )
            if seed is not None:
                normed = dropout.forward(normed, seed, threshold, site)
            out.copy_(normed.view(out.shape))
        elif tokens:
            _forward[triton.cdiv(tokens, t.rows),](
                *ids, *tables, weight, bias, out, statistics, seed, *sizes, eps, threshold,
                signed(site), dropout_scale(threshold), seed is not None, t.rows, t.columns,
                num_warps=t.warps,
            )  # fmt: skip
    return out.to(dtype), statistics


def _gathered(
    ids: tuple[Tensor | None, ...],
    tables: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    t: Tile,
) -> Tensor:
    """The tokens' sums, float32, where a row does not fit a tile and layernorm's kernels take it in
    pieces."""
    *_, tokens, columns = sizes
    assert ids[0] is not None
    total = torch.empty(tokens, columns, dtype=torch.float32, device=ids[0].device)
    if tokens:
        _gather[tokens, triton.cdiv(columns, t.columns)](
            *ids, *tables, total, *sizes, t.columns, num_warps=t.warps
        )
    return total


def backward(
    dout: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    padding_idx: int,
    threshold: int,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if shared.interpreted and dout.dtype == torch.bfloat16:
        dout = dout.float()
    dout, weight = dense(dout), dense(weight)
    ids = dense(input_ids), dense_or_none(token_type_ids), dense(position_ids)
    tables = dense(word), dense_or_none(token_type), dense(position)
    tokens, columns = input_ids.numel(), word.shape[1]
    sizes = word.shape[0], _rows(token_type), position.shape[0], tokens, columns
    t = tile_of("embedding_backward", columns, word.device)
    with on_device(word):
        if columns > t.columns:
            dout = dout.view(tokens, columns)
            total = _gathered(ids, tables, sizes, t)
            if seed is not None:
                dout = dropout.forward(dout.float(), seed, threshold, site)
            ds, _, dweight, dbias = layernorm.backward(
                dout, total, weight, bias, statistics, None, 0, 0, False
            )
        else:
            ds = torch.empty(tokens, columns, dtype=torch.float32, device=word.device)
            dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
            tiles = triton.cdiv(tokens, t.rows)
            programs = shared.programs_for(word.device, t.per_processor, tiles)
            partial = torch.empty(programs, 2, columns, dtype=torch.float32, device=word.device)
            _backward[programs,](
                dout, *ids, *tables, weight, statistics, ds, partial, seed, tiles, *sizes,
                threshold, signed(site), dropout_scale(threshold), seed is not None, t.rows,
                t.columns, t.stages, num_warps=t.warps,
            )  # fmt: skip
            sum_both(partial, dweight, dbias)
        dword = _table_gradient(ids[0], ds, tables[0], padding_idx)
        dposition = _table_gradient(ids[2], ds, tables[2], -1)
        if ids[1] is None or tables[1] is None:
            dtoken_type = word.new_empty(0)
        else:
            dtoken_type = _table_gradient(ids[1], ds, tables[1], -1)
    return dword, dtoken_type, dposition, dweight, dbias


def _table_gradient(ids: Tensor, ds: Tensor, table: Tensor, skip: int) -> Tensor:
    """The sum of ``ds`` over the tokens that read each row of ``table``."""
    dtable = torch.zeros_like(table)
    tokens, columns = ds.shape
    if tokens == 0:
        return dtable
    ids, order = torch.sort(ids.view(-1), stable=True)
    chunks, pieces = triton.cdiv(tokens, _CHUNK), triton.cdiv(columns, _COLUMNS)
    parts = torch.empty(chunks, 2, columns, dtype=torch.float32, device=ds.device)
    sizes = tokens, table.shape[0], skip, columns
    _sum_chunks[chunks, pieces](
        ids, order, ds, dtable, parts, *sizes, _CHUNK, _COLUMNS, num_warps=1
    )
    _join_chunks[chunks, pieces](ids, dtable, parts, *sizes, _CHUNK, _JOINED, _COLUMNS, num_warps=8)
    return dtable
