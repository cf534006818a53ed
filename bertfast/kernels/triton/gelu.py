"""gelu in Triton: tiles of up to 1024 columns; the bias's gradient in two stages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device
from bertfast.kernels.layout import dense, dense_or_none, rows_and_columns
from bertfast.kernels.triton import MOST_COLUMNS, Tile
from bertfast.kernels.triton._norm import sum_one

supports = shared.unsupported

# sqrt(2/pi) and the cubic's coefficient.
_C = tl.constexpr(0.7978845608)
_A = tl.constexpr(0.044715)


@triton.jit
def _cdf(z):
    """Phi(z), the normal distribution function.

    1/2 + z P(z^2) / Q(z^2) below 5.5, a minimax fit with an absolute error of 7e-9, the one of
    ``csrc/cpu/gelu.cpp``: half the instructions of erf.
    """
    t = z * z
    p = 2.27493426e-8 * t + 6.35207404e-6
    p = p * t + 1.68823717e-4
    p = p * t + 4.67724838e-3
    p = p * t + 3.38524889e-2
    p = p * t + 3.98942235e-1
    q = 1.1975e-6 * t + 7.36467141e-5
    q = q * t + 1.88443390e-3
    q = q * t + 2.86457747e-2
    q = q * t + 2.51521524e-1
    q = q * t + 1.0
    # False for NaN, which then stays NaN.
    return tl.where(tl.abs(z) >= 5.5, tl.where(z > 0.0, 1.0, 0.0), z * p / q + 0.5)


@triton.jit
def _slope(z):
    """d/dz z Phi(z) = Phi(z) + z phi(z), the same way: below 5.9, absolute error 4e-9."""
    t = z * z
    p = -2.83681619e-11 * t + 1.22115154e-8
    p = p * t + 1.00125582e-6
    p = p * t + 3.20416285e-5
    p = p * t + 2.39515219e-4
    p = p * t + 1.36698693e-2
    p = p * t - 2.05656518e-2
    p = p * t + 7.97884531e-1
    q = 3.31207237e-7 * t + 1.02230034e-5
    q = q * t + 2.47287576e-4
    q = q * t + 4.02095098e-3
    q = q * t + 4.46529986e-2
    q = q * t + 3.07557730e-1
    q = q * t + 1.0
    return tl.where(tl.abs(z) >= 5.9, tl.where(z > 0.0, 1.0, 0.0), z * p / q + 0.5)


@triton.jit
def _tanh_cdf(z):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)."""
    return 1.0 / (1.0 + tl.exp(z * (z * z * (-2.0 * _C * _A) - 2.0 * _C)))


@triton.jit
def _tanh_slope(z):
    # Beyond 20 the slope is 0 or 1 to the last bit, and z * z might overflow.
    z = tl.where(z > 20.0, 20.0, tl.where(z < -20.0, -20.0, z))
    s = _tanh_cdf(z)
    return s + z * s * (1.0 - s) * (z * z * (6.0 * _C * _A) + 2.0 * _C)


@triton.jit(do_not_specialize=["pieces", "rows"])
def _forward(
    x,
    bias,
    out,
    pieces,
    rows,
    columns,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = (tl.program_id(0) // pieces).to(tl.int64) * ROWS
    c0 = (tl.program_id(0) % pieces).to(tl.int64) * COLUMNS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
    column_there = c < tl.minimum(columns - c0, COLUMNS).to(tl.int32)
    inside = row_there[:, None] & column_there[None, :]
    base = first * columns + c0
    at = r[:, None] * columns + c[None, :]
    z = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + c0 + c, mask=column_there, other=0.0).to(tl.float32)[None, :]
    y = z * (_tanh_cdf(z) if TANH else _cdf(z))
    tl.store(out + base + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "pieces", "rows"])
def _backward(
    dout, x, bias, dx, partial, tiles, pieces, rows, columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of one piece of the columns; without a bias, one tile."""
    program, programs = (tl.program_id(0) // pieces).to(tl.int64), tl.num_programs(0) // pieces
    c0 = (tl.program_id(0) % pieces).to(tl.int64) * COLUMNS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column_there = c < tl.minimum(columns - c0, COLUMNS).to(tl.int32)
    if bias is not None:
        b = tl.load(bias + c0 + c, mask=column_there, other=0.0).to(tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        first = tile * ROWS
        row_there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
        inside = row_there[:, None] & column_there[None, :]
        base = first * columns + c0
        at = r[:, None] * columns + c[None, :]
        dy = tl.load(dout + base + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            z += b[None, :]
        dz = dy * (_tanh_slope(z) if TANH else _slope(z))
        if bias is not None:
            dbias += tl.sum(dz, axis=0)
        tl.store(dx + base + at, dz.to(dx.dtype.element_ty), mask=inside)
    if bias is not None:
        tl.store(partial + program * columns + c0 + c, dbias, mask=column_there)


_TILES = {
    "gelu_forward": {"elements": 4096, "widest": 1024, "per_thread": 32},
    "gelu_backward": {"elements": 2048, "widest": 512, "per_thread": 16},
}


def tile_of(kernel: str, columns: int, device: torch.device) -> Tile:
    # Without a bias all is one long row, four times as much of which makes up for the other rows.
    known = _TILES[kernel]
    widest = known["widest"] * (4 if columns > MOST_COLUMNS else 1)
    return shared.tile(kernel, columns, device, **{**known, "widest": widest})


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x, bias = dense(x), dense_or_none(bias)
    out = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    t = tile_of("gelu_forward", columns, x.device)
    if x.numel():
        pieces = triton.cdiv(columns, t.columns)
        with on_device(x):
            _forward[triton.cdiv(rows, t.rows) * pieces,](
                x, bias, out, pieces, rows, columns, approximate == "tanh", t.rows, t.columns,
                num_warps=t.warps,
            )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    dout, x, bias = dense(dout), dense(x), dense_or_none(bias)
    dx = torch.empty_like(x)
    rows, columns = rows_and_columns(x, bias)
    t = tile_of("gelu_backward", columns, x.device)
    tiles, pieces = triton.cdiv(rows, t.rows), triton.cdiv(columns, t.columns)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    partial, programs = None, tiles
    if bias is not None:
        programs = shared.programs_for(x.device, t.per_processor, tiles, pieces)
        partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    if columns:
        with on_device(x):
            if programs:
                _backward[programs * pieces,](
                    dout, x, bias, dx, partial, tiles, pieces, rows, columns,
                    approximate == "tanh", t.rows, t.columns, t.stages, num_warps=t.warps,
                )  # fmt: skip
            if partial is not None:
                sum_one(partial, dbias)
    return dx, dbias
