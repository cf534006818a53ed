"""dropout in Triton; its gradient is the same launch on the incoming gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import triton as shared
from bertfast.kernels.device import on_device
from bertfast.kernels.layout import dense
from bertfast.kernels.triton import Tile, signed
from bertfast.kernels.triton._dropout import keep_rows
from bertfast.masks import dropout_scale

supports = shared.unsupported


@triton.jit(do_not_specialize=["pieces", "rows", "threshold", "site"])
def _forward(
    x, out, seed, pieces, rows, columns, threshold, site, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(0) // pieces).to(tl.int64) * ROWS
    c0 = (tl.program_id(0) % pieces).to(tl.int64) * COLUMNS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_there = r < tl.minimum(rows - first, ROWS).to(tl.int32)
    inside = row_there[:, None] & (c < tl.minimum(columns - c0, COLUMNS).to(tl.int32))[None, :]
    at = first * columns + c0 + (r[:, None] * columns + c[None, :])
    v = tl.load(x + at, mask=inside, other=0.0)
    keep = keep_rows(seed, site, threshold, first + r, c0, COLUMNS)
    y = tl.where(keep, v.to(tl.float32) * scale, 0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def tile_of(kernel: str, columns: int, device: torch.device) -> Tile:
    return shared.tile(kernel, columns, device, elements=4096, widest=1024, per_thread=32)


def forward(x: Tensor, seed: Tensor, threshold: int, site: int) -> Tensor:
    x = dense(x)
    out = torch.empty_like(x)
    columns = x.shape[-1]
    t = tile_of("dropout", columns, x.device)
    if x.numel():
        rows, pieces = x.numel() // columns, triton.cdiv(columns, t.columns)
        with on_device(x):
            _forward[triton.cdiv(rows, t.rows) * pieces,](
                x, out, seed, pieces, rows, columns, threshold, signed(site),
                dropout_scale(threshold), t.rows, t.columns, num_warps=t.warps,
            )  # fmt: skip
    return out
