"""cross_entropy: the decoder's matmul and the loss over the vocabulary, in one op."""

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.ops._checks import (
    check_device,
    check_floating,
    check_integer,
    check_integers,
    check_parameter,
    check_range,
    check_shape,
    values_are_checked,
)
from bertfast.ops._operator import Operator

REDUCTIONS = ("mean", "sum")


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if values_are_checked(labels):
        check_range("labels", labels, weight.shape[0], ignored=ignore_index)
    return kernel("cross_entropy", backend).forward(
        hidden, weight, bias, labels, ignore_index, reduction
    )


def _forward_fake(
    hidden, weight, bias, labels, ignore_index, reduction, backend
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


def _backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("cross_entropy", backend).backward(
        dloss, hidden, weight, bias, labels, logsumexp, ignore_index, reduction
    )


def _backward_fake(
    dloss, hidden, weight, bias, labels, logsumexp, ignore_index, reduction, backend
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dbias


def _save(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(*inputs[:4], outputs[1])
    ctx.options = inputs[4:]


def _gradients(ctx, saved, dloss, backward):
    dhidden, dweight, dbias = backward(dloss, *saved, *ctx.options)
    has_bias = saved[2] is not None
    return dhidden, dweight, dbias if has_bias else None, None, None, None, None


_cross_entropy = Operator(
    "cross_entropy",
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of ``softmax(hidden weight^T + bias)`` against ``labels``.

    The masked-LM loss (Devlin et al., "BERT", 2019, section 3.1). The logits of all tokens over
    the vocabulary never exist at once, and tokens labelled ``ignore_index`` are not multiplied.
    Backward on the CPU holds a float32 ``(labelled tokens, C)`` for each of up to 16 threads, and
    one more.

    On a GPU the number of labelled tokens is not read, and memory is that of T of them: forward
    holds ``T V / 16`` bytes of statistics, backward ``T C`` and ``T V / 128`` numbers in float32
    and gradients of logits for 1024 to 8192 classes (16 MB, or 1024 classes where that is more).
    So pass the labelled ones alone where they are few and known.

    Args:
        hidden: ``(T, C)`` floating point.
        weight: ``(V, C)`` decoder, in ``hidden``'s dtype or float32.
        bias: ``(V,)`` likewise, or None.
        labels: int64 or int32 ``(T,)``: a class below ``V``, or ``ignore_index``.
        ignore_index: the label of tokens that do not count.
        reduction: ``"mean"`` over the labelled tokens, or ``"sum"``.
        backend: see :mod:`bertfast.backends`.

    Returns:
        A scalar, float32 (float64 on float64 inputs). 0 with zero gradients where no token is
        labelled.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type. On CUDA,
            labels are looked at only under ``BERTFAST_CHECK=1``.
        BackendError: ``backend`` cannot run this.
    """
    check_floating("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: expected shape (T, C) with C >= 1, got {tuple(hidden.shape)}")
    vocabulary = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    check_parameter("weight", weight, (vocabulary, hidden.shape[1]), "hidden", hidden)
    if vocabulary < 1:
        raise ValueError(f"weight: expected shape (V, C) with V >= 1, got {tuple(weight.shape)}")
    if bias is not None:
        check_parameter("bias", bias, (vocabulary,), "hidden", hidden)
    check_integers("labels", labels)
    check_shape("labels", labels, (hidden.shape[0],))
    check_device("labels", labels, "hidden", hidden)
    check_integer("ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    return _cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        ignore_index,
        reduction,
        choose("cross_entropy", hidden, backend),
    )
