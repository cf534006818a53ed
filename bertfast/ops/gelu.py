"""gelu: bias + GELU in one pass, ``gelu(x + bias)``."""

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.ops._checks import check_floating, check_parameter
from bertfast.ops._operator import Operator

APPROXIMATIONS = ("none", "tanh")


def _forward(x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
    return kernel("gelu", backend).forward(x, bias, approximate)


def _forward_fake(x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:
    return kernel("gelu", backend).backward(dout, x, bias, approximate)


def _backward_fake(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dbias


def _save(ctx, inputs, outputs) -> None:
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx, saved, dout, backward):
    x, bias = saved
    dx, dbias = backward(dout, x, bias, ctx.approximate, ctx.backend)
    return dx, None if bias is None else dbias, None, None


_gelu = Operator(
    "gelu",
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """``gelu(x + bias)`` (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016).

    Args:
        x: ``(..., C)`` floating point.
        bias: ``(C,)`` in ``x``'s dtype or float32, or None.
        approximate: ``"none"`` is ``x * Phi(x)`` by erf (Hugging Face's ``gelu``); ``"tanh"`` is
            ``x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`` (Google's original code).
        backend: see :mod:`bertfast.backends`.

    Returns:
        ``x``'s shape and dtype.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.
        BackendError: ``backend`` cannot run this.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if bias is not None:
        check_parameter("bias", bias, (x.shape[-1],), "x", x)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _gelu(x, bias, approximate, choose("gelu", x, backend))
