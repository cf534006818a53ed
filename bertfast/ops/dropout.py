"""Dropout, and how the ops take its arguments; :mod:`bertfast.masks` defines the mask."""

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.masks import dropout_threshold
from bertfast.ops._checks import check_floating, check_seed, check_site
from bertfast.ops._operator import Operator


def dropout_arguments(
    p: float, seed: Tensor | None, site: int, like_name: str, like: Tensor
) -> tuple[int, Tensor | None]:
    """An op's ``dropout_p``, ``seed`` and ``site``, checked: the threshold and the seed to use.

    The seed is None, whatever was given, where nothing is drawn.
    """
    threshold = dropout_threshold(p)
    if threshold == 0:
        return 0, None
    check_seed(seed, like_name, like)
    check_site(site)
    return threshold, seed


def _forward(x: Tensor, seed: Tensor, threshold: int, site: int, backend: str) -> Tensor:
    return kernel("dropout", backend).forward(x, seed, threshold, site)


def _fake(x: Tensor, seed: Tensor, threshold: int, site: int, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, outputs) -> None:
    _, seed, ctx.threshold, ctx.site, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _gradients(ctx, saved, dout, backward):
    (seed,) = saved
    return backward(dout, seed, ctx.threshold, ctx.site, ctx.backend), None, None, None, None


# The backward is the forward on the gradient: the same mask, the same scale.
_dropout = Operator(
    "dropout",
    forward=_forward,
    backward=_forward,
    forward_fake=_fake,
    backward_fake=_fake,
    save=_save,
    gradients=_gradients,
)


def dropout(
    x: Tensor, p: float, *, seed: Tensor | None, site: int, backend: str | None = None
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``.

    The op always drops: whether a model is training is the caller's to know.

    Args:
        x: ``(..., C)`` floating point; its leading dimensions, flattened, are the mask's rows.
        p: probability in [0, 1], rounded to a multiple of 1/65536. 0 returns ``x`` itself and
            draws nothing; 1 gives zeros.
        seed: int64, one element, on ``x``'s device; may be None when ``p`` is 0.
        site: 32-bit number of the place in the model.
        backend: see :mod:`bertfast.backends`.

    Returns:
        ``x``'s shape and dtype.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.
        BackendError: ``backend`` cannot run this.
    """
    check_floating("x", x)
    threshold = dropout_threshold(p, "p")
    if threshold == 0:
        return x
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    check_seed(seed, "x", x)
    check_site(site)
    return _dropout(x, seed, threshold, site, choose("dropout", x, backend))
