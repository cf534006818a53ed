"""layernorm: with ``s = residual + dropout(x)`` in ``x``'s dtype, ``xhat = (s - mean) * rstd``,

* ``y = xhat * weight + bias``;
* ``ds = rstd * (g - mean(g) - xhat * mean(g * xhat))`` with ``g = dy * weight``;
* ``dresidual = ds``, ``dx = mask * ds / (1 - p)``, ``dweight = sum dy * xhat``, ``dbias = sum dy``.

The statistics are those of the rounded ``s``, which is what backward will see: where a row's spread
is smaller than the rounding, the statistics of the exact sum would make ``xhat`` explode there.
"""

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype
from bertfast.kernels.reference.dropout import apply_mask


def supports(x: Tensor) -> str | None:
    return None


def normalise(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``xhat`` of ``(rows, C)``, and the statistics ``(2, rows)``: mean and rstd of each row."""
    about = total.mean(-1, keepdim=True)
    # What rounding left out of the mean: in a row of equal values it is all there is to centre.
    mean = (about + (total - about).mean(-1, keepdim=True)).squeeze(-1)
    centred = total - mean.unsqueeze(-1)
    rstd = torch.rsqrt((centred * centred).mean(-1) + eps)
    return centred * rstd.unsqueeze(-1), torch.stack((mean, rstd))


def normalised(total: Tensor, statistics: Tensor) -> Tensor:
    """``xhat`` again, from what forward saved."""
    mean, rstd = statistics.unsqueeze(-1)
    return (total - mean) * rstd


def normalise_backward(
    dout: Tensor, xhat: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(ds, dweight, dbias)``, all in the dtype of ``dout``."""
    g = dout * weight.to(dout.dtype)
    along = (g * xhat).mean(-1, keepdim=True)
    ds = rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - xhat * along)
    return ds, (dout * xhat).sum(0), dout.sum(0)


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
    dtype = accumulation_dtype(x)
    columns = x.shape[-1]
    total = x.reshape(-1, columns).to(dtype)
    if seed is not None:
        total = apply_mask(total, seed, threshold, site)
    if residual is not None:
        total = residual.reshape(-1, columns).to(dtype) + total
    total = total.to(x.dtype).to(dtype)
    xhat, statistics = normalise(total, eps)
    out = (xhat * weight + bias).to(x.dtype).reshape(x.shape)
    if needs_backward and (residual is not None or seed is not None):
        return out, total.to(x.dtype).reshape(x.shape), statistics
    return out, x.new_empty(0), statistics


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
    dtype = accumulation_dtype(dout)
    columns = dout.shape[-1]
    xhat = normalised(total.reshape(-1, columns).to(dtype), statistics)
    dout = dout.reshape(-1, columns).to(dtype)
    ds, dweight, dbias = normalise_backward(dout, xhat, weight, statistics[1])
    dresidual = total.new_empty(0)
    dx = ds
    if seed is not None:
        dx = apply_mask(ds, seed, threshold, site)
        if has_residual:
            dresidual = ds.to(total.dtype).reshape(total.shape)
    dx = dx.to(total.dtype).reshape(total.shape)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype)
