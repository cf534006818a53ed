"""embedding: three table look-ups, LayerNorm and dropout in one pass."""

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.ops._checks import (
    check_device,
    check_floating,
    check_integer,
    check_integers,
    check_like,
    check_norm,
    check_range,
    check_shape,
    values_are_checked,
)
from bertfast.ops._operator import Operator
from bertfast.ops.dropout import dropout_arguments


def _forward(
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    seed: Tensor | None,
    eps: float,
    padding_idx: int,
    threshold: int,
    site: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if values_are_checked(input_ids):
        check_range("input_ids", input_ids, word.shape[0])
        check_range("position_ids", position_ids, position.shape[0])
        if token_type_ids is not None and token_type is not None:
            check_range("token_type_ids", token_type_ids, token_type.shape[0])
    return kernel("embedding", backend).forward(
        input_ids,
        token_type_ids,
        position_ids,
        word,
        token_type,
        position,
        weight,
        bias,
        seed,
        eps,
        threshold,
        site,
        dtype,
    )


def _forward_fake(
    word,
    token_type,
    position,
    weight,
    bias,
    input_ids,
    token_type_ids,
    position_ids,
    seed,
    eps,
    padding_idx,
    threshold,
    site,
    dtype,
    backend,
) -> tuple[Tensor, Tensor]:
    out = word.new_empty((*input_ids.shape, word.shape[1]), dtype=dtype)
    statistics_dtype = torch.promote_types(word.dtype, torch.float32)
    return out, word.new_empty(2, input_ids.numel(), dtype=statistics_dtype)


def _backward(
    dout: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    padding_idx: int,
    threshold: int,
    site: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernel("embedding", backend).backward(
        dout,
        input_ids,
        token_type_ids,
        position_ids,
        word,
        token_type,
        position,
        weight,
        bias,
        statistics,
        seed,
        padding_idx,
        threshold,
        site,
    )


def _backward_fake(
    dout,
    word,
    token_type,
    position,
    weight,
    bias,
    input_ids,
    token_type_ids,
    position_ids,
    statistics,
    seed,
    padding_idx,
    threshold,
    site,
    backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtoken_type = word.new_empty(0) if token_type is None else torch.empty_like(token_type)
    return (
        torch.empty_like(word),
        dtoken_type,
        torch.empty_like(position),
        torch.empty_like(weight),
        torch.empty_like(bias),
    )


def _save(ctx, inputs, outputs) -> None:
    tensors, seed = inputs[:8], inputs[8]
    _, ctx.padding_idx, ctx.threshold, ctx.site, _, ctx.backend = inputs[9:]
    ctx.save_for_backward(*tensors, outputs[1], seed)


def _gradients(ctx, saved, dout, backward):
    options = ctx.padding_idx, ctx.threshold, ctx.site, ctx.backend
    dword, dtoken_type, dposition, dweight, dbias = backward(dout, *saved, *options)
    if saved[1] is None:
        dtoken_type = None
    return (dword, dtoken_type, dposition, dweight, dbias, *[None] * 10)


_embedding = Operator(
    "embedding",
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def embedding(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Sum the word, token type and position rows, normalise, drop out.

    ``dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]))``,
    BERT's input representation (Devlin et al., "BERT", 2019, section 3).

    Args:
        input_ids: int64 or int32 ``(...)``, usually ``(T,)``; flattened, the rows of the mask.
        token_type_ids: like ``input_ids``, or None together with ``token_type``.
        position_ids: like ``input_ids``.
        word, token_type, position: tables ``(vocabulary, C)``, ``(types, C)``, ``(positions, C)``
            of one dtype.
        weight, bias: LayerNorm's ``(C,)`` in the tables' dtype or float32.
        eps: added to the variance, >= 0.
        padding_idx: the row of ``word`` that gets no gradient, or None.
        dropout_p, seed, site: as in :func:`bertfast.ops.layernorm`, here after the norm.
        backend: see :mod:`bertfast.backends`.

    Returns:
        ``(..., C)`` in the tables' dtype; under autocast in the autocast dtype.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type. On CUDA, ids
            are looked at only under ``BERTFAST_CHECK=1``.
        BackendError: ``backend`` cannot run this.
    """
    check_floating("word", word)
    if word.dim() != 2 or word.shape[1] == 0:
        raise ValueError(f"word: expected shape (V, C) with C >= 1, got {tuple(word.shape)}")
    columns = word.shape[1]
    check_integers("input_ids", input_ids)
    check_device("input_ids", input_ids, "word", word)
    if (token_type_ids is None) != (token_type is None):
        raise ValueError(
            "token_type_ids, token_type: expected both or neither, got "
            + ("no token_type_ids" if token_type_ids is None else "no token_type")
        )
    tables = (("position", position), ("token_type", token_type))
    for name, table in tables:
        if table is not None:
            check_like(name, table, "word", word)
            if table.dim() != 2 or table.shape[1] != columns:
                raise ValueError(
                    f"{name}: expected shape (rows, {columns}), got {tuple(table.shape)}"
                )
    for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is not None:
            check_integers(name, ids)
            check_shape(name, ids, tuple(input_ids.shape))
            check_device(name, ids, "word", word)
    check_norm(weight, bias, eps, columns, "word", word)
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx)
    if padding_idx is not None and not 0 <= padding_idx < word.shape[0]:
        raise ValueError(
            f"padding_idx: expected a row of word, 0 to {word.shape[0] - 1}, got {padding_idx}"
        )
    threshold, seed = dropout_arguments(dropout_p, seed, site, "word", word)
    device = word.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else word.dtype
    return _embedding(
        word,
        token_type,
        position,
        weight,
        bias,
        input_ids,
        token_type_ids,
        position_ids,
        seed,
        eps,
        -1 if padding_idx is None else padding_idx,
        threshold,
        site,
        dtype,
        choose("embedding", word, backend),
    )
