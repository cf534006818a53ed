"""layernorm: dropout, residual addition and LayerNorm in one pass."""

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.ops._checks import check_floating, check_like, check_norm, check_shape
from bertfast.ops._operator import Operator
from bertfast.ops._recorders import is_graph_recorded
from bertfast.ops.dropout import dropout_arguments


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    needs_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("layernorm", backend).forward(
        x, weight, bias, residual, seed, eps, threshold, site, needs_backward
    )


def _forward_fake(
    x, weight, bias, residual, seed, eps, threshold, site, needs_backward, backend
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    keeps_sum = needs_backward and (residual is not None or threshold > 0)
    total = torch.empty_like(out) if keeps_sum else x.new_empty(0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return out, total, x.new_empty(2, x.numel() // x.shape[-1], dtype=dtype)


def _backward(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    threshold: int,
    site: int,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernel("layernorm", backend).backward(
        dout, total, weight, bias, statistics, seed, threshold, site, has_residual
    )


def _backward_fake(
    dout, total, weight, bias, statistics, seed, threshold, site, has_residual, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if has_residual and threshold > 0 else total.new_empty(0)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, outputs) -> None:
    x, weight, bias, residual, seed, _, ctx.threshold, ctx.site, _, ctx.backend = inputs
    _, total, statistics = outputs
    ctx.has_residual = residual is not None
    # Without residual and dropout the sum before the norm is x itself.
    total = total if ctx.has_residual or ctx.threshold > 0 else x
    ctx.save_for_backward(total, weight, bias, statistics, seed)


def _gradients(ctx, saved, dout, backward):
    options = ctx.threshold, ctx.site, ctx.has_residual, ctx.backend
    dx, dresidual, dweight, dbias = backward(dout, *saved, *options)
    if not ctx.has_residual:
        dresidual = None
    elif ctx.threshold == 0:
        dresidual = dx
    return dx, dweight, dbias, dresidual, None, None, None, None, None, None


_layernorm = Operator(
    "layernorm",
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``LayerNorm(residual + dropout(x)) * weight + bias`` over the last dimension.

    LayerNorm is Ba, Kiros and Hinton, "Layer Normalization", 2016, with the biased variance.

    Args:
        x: ``(..., C)`` floating point, C >= 1; its leading dimensions, flattened, are the rows of
            the dropout mask (packed token indices).
        weight, bias: ``(C,)`` in ``x``'s dtype or float32.
        eps: added to the variance, >= 0.
        residual: like ``x``, or None.
        dropout_p: probability in [0, 1] that an element of ``x`` is dropped (not of ``residual``).
        seed: int64, one element, on ``x``'s device; needed when ``dropout_p > 0``.
        site: 32-bit number of the place in the model.
        backend: see :mod:`bertfast.backends`.

    Returns:
        ``x``'s shape and dtype. Statistics are taken in float32 at least.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.
        BackendError: ``backend`` cannot run this.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., C) with C >= 1, got {tuple(x.shape)}")
    check_norm(weight, bias, eps, x.shape[-1], "x", x)
    if residual is not None:
        check_like("residual", residual, "x", x)
        check_shape("residual", residual, x.shape)
    threshold, seed = dropout_arguments(dropout_p, seed, site, "x", x)
    return _layernorm(
        x,
        weight,
        bias,
        residual,
        seed,
        eps,
        threshold,
        site,
        # A graph recorded without gradients may be run with them.
        torch.is_grad_enabled() or is_graph_recorded(),
        choose("layernorm", x, backend),
    )
