"""What layernorm and embedding share: a row's statistics, its gradient, sums over programs."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def statistics_of(v, inside, columns, eps):
    """Mean and 1 / sqrt(variance + eps) of each row of float32 ``v``, where ``inside``."""
    about = tl.sum(tl.where(inside, v, 0.0), axis=1) / columns
    # What rounding left out of the mean: in a row of equal values it is all there is to centre.
    d = tl.where(inside, v - about[:, None], 0.0)
    rest = tl.sum(d, axis=1) / columns
    variance = without_rest(tl.sum(d * d, axis=1) / columns, rest)
    return about + rest, tl.rsqrt(variance + eps)


@triton.jit
def without_rest(squares, rest):
    """``squares - rest^2``, at least 0; infinity and NaN stay what they are."""
    variance = tl.where(squares == float("inf"), squares, squares - rest * rest)
    return tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def row_gradient(g, xhat, rstd, columns):
    """``rstd * (g - mean(g) - xhat * mean(g * xhat))`` of whole rows; g is 0 outside of them."""
    mean_g = tl.sum(g, axis=1) / columns
    mean_gx = tl.sum(g * xhat, axis=1) / columns
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


@triton.jit
def _sum_programs(partial, out, programs, stride, columns, c, ROWS: tl.constexpr):
    r = tl.arange(0, ROWS)
    inside = c < columns
    total = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + r
        at = row[:, None].to(tl.int64) * stride + c[None, :]
        total += tl.load(partial + at, mask=(row < programs)[:, None] & inside[None, :], other=0.0)
    tl.store(out + c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_one(partial, out, programs, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _sum_programs(partial, out, programs, columns, columns, c, ROWS)


@triton.jit
def _sum_both(
    partial, dweight, dbias, programs, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(1) == 0:
        _sum_programs(partial, dweight, programs, 2 * columns, columns, c, ROWS)
    else:
        _sum_programs(partial + columns, dbias, programs, 2 * columns, columns, c, ROWS)


def sum_one(partial: Tensor, out: Tensor) -> None:
    """``out`` ``(C,)`` from float32 ``(programs, C)``, always in the same order."""
    programs, columns = partial.shape
    _sum_one[triton.cdiv(columns, 64),](partial, out, programs, columns, 32, 64)


def sum_both(partial: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """``dweight`` and ``dbias`` ``(C,)`` from float32 ``(programs, 2, C)``."""
    programs, _, columns = partial.shape
    _sum_both[triton.cdiv(columns, 64), 2](partial, dweight, dbias, programs, columns, 32, 64)
