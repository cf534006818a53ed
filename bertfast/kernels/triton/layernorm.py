"""layernorm in Triton: rows of up to 8192 columns in one tile, longer ones in pieces.

Of up to 2048, where the number of columns is no multiple of 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device
from bertfast.kernels.layout import dense, dense_or_none
from bertfast.kernels.triton import WIDEST_BLOCK, Tile, signed
from bertfast.kernels.triton._dropout import keep_rows
from bertfast.kernels.triton._norm import row_gradient, statistics_of, sum_both, without_rest
from bertfast.masks import dropout_scale

supports = shared.unsupported_rows


@triton.jit
def _sum_of(x, residual, seed, first, columns, c0, r, c, inside, threshold, site, scale, DROPOUT):
    """``residual + dropout(x)`` as stored, in float32: rows ``first + r``, columns ``c0 + c``."""
    at = r[:, None] * columns + c[None, :]
    base = first * columns + c0
    stored = tl.load(x + base + at, mask=inside, other=0.0)
    v = stored.to(tl.float32)
    if DROPOUT:
        keep = keep_rows(seed, site, threshold, first + r, c0, c.shape[0])
        v = tl.where(keep, v * scale, 0.0)
    if residual is not None:
        v += tl.load(residual + base + at, mask=inside, other=0.0).to(tl.float32)
    return v.to(stored.dtype)


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def _forward(
    x, residual, weight, bias, out, total, statistics, seed,
    rows, columns, eps, threshold, site, scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
    inside = there[:, None] & (c < columns)[None, :]
    at = r[:, None] * columns + c[None, :]
    stored = _sum_of(
        x, residual, seed, first, columns, 0, r, c, inside, threshold, site, scale, DROPOUT
    )
    if total is not None:
        tl.store(total + first * columns + at, stored, mask=inside)
    v = stored.to(tl.float32)
    mean, rstd = statistics_of(v, inside, columns, eps)
    tl.store(statistics + first + r, mean, mask=there)
    tl.store(statistics + rows + first + r, rstd, mask=there)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)
    y = (v - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + first * columns + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def _forward_long(
    x, residual, weight, bias, out, total, statistics, seed,
    rows, columns, eps, threshold, site, scale,
    DROPOUT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row, in pieces: their means and squares are joined (Chan, Golub and LeVeque, 1979)."""
    row = tl.program_id(0).to(tl.int64)
    r, c = tl.arange(0, 1), tl.arange(0, COLUMNS)
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    for c0 in range(0, columns, COLUMNS):
        inside = (c0 + c < columns)[None, :]
        stored = _sum_of(
            x, residual, seed, row, columns, c0, r, c, inside, threshold, site, scale, DROPOUT
        )
        if total is not None:
            tl.store(total + row * columns + c0 + c[None, :], stored, mask=inside)
        v = stored.to(tl.float32)
        count = tl.minimum(columns - c0, COLUMNS).to(tl.float32)
        own = tl.sum(tl.where(inside, v, 0.0), axis=1) / count
        d = tl.where(inside, v - own[:, None], 0.0)
        rest = tl.sum(d, axis=1)
        own += rest / count
        step = own - mean
        share = count / (c0 + count)
        squares += without_rest(tl.sum(d * d, axis=1) / count, rest / count) * count
        squares += step * step * (c0 * share)
        mean += step * share
    rstd = tl.rsqrt(squares / columns + eps)
    tl.store(statistics + row + r, mean)
    tl.store(statistics + rows + row + r, rstd)
    for c0 in range(0, columns, COLUMNS):
        inside = (c0 + c < columns)[None, :]
        v = _sum_of(
            x, residual, seed, row, columns, c0, r, c, inside, threshold, site, scale, DROPOUT
        ).to(tl.float32)
        w = tl.load(weight + c0 + c[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + c0 + c[None, :], mask=inside, other=0.0).to(tl.float32)
        y = (v - mean[:, None]) * rstd[:, None] * w + b
        to = out + row * columns + c0 + c[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_row_gradient(dout, total, w, statistics, rows, columns, first, c0, r, c, there, inside):
    """``dout``, ``xhat`` and ``g = dout * w`` of a tile, float32, and its rows' rstd."""
    at = first * columns + c0 + r[:, None] * columns + c[None, :]
    dy = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(statistics + first + r, mask=there, other=0.0)
    rstd = tl.load(statistics + rows + first + r, mask=there, other=0.0)
    xhat = tl.where(inside, (v - mean[:, None]) * rstd[:, None], 0.0)
    return dy, xhat, dy * w[None, :], rstd


@triton.jit
def _store_row_gradient(
    ds, dx, dresidual, seed, columns, first, c0, r, c, inside, threshold, site, scale, DROPOUT
):
    at = first * columns + c0 + r[:, None] * columns + c[None, :]
    if dresidual is not None:
        tl.store(dresidual + at, ds.to(dx.dtype.element_ty), mask=inside)
    if DROPOUT:
        keep = keep_rows(seed, site, threshold, first + r, c0, c.shape[0])
        ds = tl.where(keep, ds * scale, 0.0)
    tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "rows", "threshold", "site"])
def _backward(
    dout, total, weight, statistics, dx, dresidual, partial, seed,
    tiles, rows, columns, threshold, site, scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of whole rows; the sums over them stay in registers."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    dweight = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    w = tl.load(weight + c, mask=c < columns, other=0.0).to(tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        first = tile * ROWS
        there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
        inside = there[:, None] & (c < columns)[None, :]
        dy, xhat, g, rstd = _load_row_gradient(
            dout, total, w, statistics, rows, columns, first, 0, r, c, there, inside
        )
        dweight += tl.sum(dy * xhat, axis=0)
        dbias += tl.sum(dy, axis=0)
        ds = row_gradient(g, xhat, rstd, columns)
        _store_row_gradient(
            ds, dx, dresidual, seed, columns, first, 0, r, c, inside, threshold, site, scale,
            DROPOUT,
        )  # fmt: skip
    to = partial + program * 2 * columns + c
    tl.store(to, dweight, mask=c < columns)
    tl.store(to + columns, dbias, mask=c < columns)


@triton.jit(do_not_specialize=["rows"])
def _backward_long_rows(
    dout, total, weight, statistics, means, rows, columns, COLUMNS: tl.constexpr
):
    """The means of ``g`` and ``g * xhat`` of one long row."""
    row = tl.program_id(0).to(tl.int64)
    r, c = tl.arange(0, 1), tl.arange(0, COLUMNS)
    sum_g = tl.zeros((1,), tl.float32)
    sum_gx = tl.zeros((1,), tl.float32)
    for c0 in range(0, columns, COLUMNS):
        inside = (c0 + c < columns)[None, :]
        w = tl.load(weight + c0 + c, mask=c0 + c < columns, other=0.0).to(tl.float32)
        _, xhat, g, _ = _load_row_gradient(
            dout, total, w, statistics, rows, columns, row, c0, r, c, r < 1, inside
        )
        sum_g += tl.sum(g, axis=1)
        sum_gx += tl.sum(g * xhat, axis=1)
    tl.store(means + row + r, sum_g / columns)
    tl.store(means + rows + row + r, sum_gx / columns)


@triton.jit(do_not_specialize=["tiles", "rows", "threshold", "site"])
def _backward_long(
    dout, total, weight, statistics, means, dx, dresidual, partial, seed,
    tiles, rows, columns, threshold, site, scale,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of one piece of the columns, once the rows' means are known."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    c0 = tl.program_id(1) * COLUMNS
    dweight = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    w = tl.load(weight + c0 + c, mask=c0 + c < columns, other=0.0).to(tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        first = tile * ROWS
        there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
        inside = there[:, None] & (c0 + c < columns)[None, :]
        dy, xhat, g, rstd = _load_row_gradient(
            dout, total, w, statistics, rows, columns, first, c0, r, c, there, inside
        )
        dweight += tl.sum(dy * xhat, axis=0)
        dbias += tl.sum(dy, axis=0)
        mean_g = tl.load(means + first + r, mask=there, other=0.0)
        mean_gx = tl.load(means + rows + first + r, mask=there, other=0.0)
        ds = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        _store_row_gradient(
            ds, dx, dresidual, seed, columns, first, c0, r, c, inside, threshold, site, scale,
            DROPOUT,
        )  # fmt: skip
    to = partial + program * 2 * columns + c0 + c
    tl.store(to, dweight, mask=c0 + c < columns)
    tl.store(to + columns, dbias, mask=c0 + c < columns)


_TILES = {
    "layernorm_forward": {"elements": 2048, "widest": WIDEST_BLOCK, "per_thread": 16},
    "layernorm_backward": {"elements": 2048, "widest": WIDEST_BLOCK, "per_thread": 16},
    "layernorm_long_backward": {"elements": 2048, "widest": 1024, "per_thread": 16},
}


def tile_of(kernel: str, columns: int, device: torch.device) -> Tile:
    return shared.tile(kernel, columns, device, **_TILES[kernel])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = dense(x), dense(weight), dense(bias)
    residual = dense_or_none(residual)
    columns = x.shape[-1]
    rows = x.numel() // columns
    out = torch.empty_like(x)
    keeps_sum = needs_backward and (residual is not None or seed is not None)
    total = torch.empty_like(x) if keeps_sum else None
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    t = tile_of("layernorm_forward", columns, x.device)
    arguments = (
        x, residual, weight, bias, out, total, statistics, seed,
        rows, columns, eps, threshold, signed(site), dropout_scale(threshold),
        seed is not None,
    )  # fmt: skip
    if rows:
        with on_device(x):
            if columns > t.columns:
                _forward_long[rows,](*arguments, t.columns, num_warps=t.warps)
            else:
                grid = (triton.cdiv(rows, t.rows),)
                _forward[grid](*arguments, t.rows, t.columns, num_warps=t.warps)
    return out, x.new_empty(0) if total is None else total, statistics


def backward(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    threshold: int,
    site: int,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, total, weight = dense(dout), dense(total), dense(weight)
    columns = total.shape[-1]
    rows = total.numel() // columns
    dx = torch.empty_like(total)
    both = has_residual and seed is not None
    dresidual = torch.empty_like(total) if both else None
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    device = total.device
    t = tile_of("layernorm_backward", columns, device)
    long = columns > t.columns
    if long:
        t = tile_of("layernorm_long_backward", columns, device)
    tiles, pieces = triton.cdiv(rows, t.rows), triton.cdiv(columns, t.columns)
    programs = shared.programs_for(device, t.per_processor, tiles, pieces)
    partial = torch.empty(programs, 2, columns, dtype=torch.float32, device=device)
    before = dout, total, weight, statistics
    behind = (
        dx, dresidual, partial, seed, tiles, rows, columns, threshold, signed(site),
        dropout_scale(threshold), seed is not None, t.rows, t.columns, t.stages,
    )  # fmt: skip
    with on_device(total):
        if long:
            means = torch.empty_like(statistics)
            if rows:
                _backward_long_rows[rows,](
                    *before, means, rows, columns, t.columns, num_warps=t.warps
                )
            _backward_long[programs, pieces](*before, means, *behind, num_warps=t.warps)
        else:
            _backward[programs,](*before, *behind, num_warps=t.warps)
        sum_both(partial, dweight, dbias)
    return dx, total.new_empty(0) if dresidual is None else dresidual, dweight, dbias
