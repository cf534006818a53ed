"""Unpad once, pad once: the way between a padded batch and packed tokens.

A :class:`Batch` holds the ``T`` attended tokens of all sequences one after another, which is all
the encoder ever sees; padding is never computed. ``cu_seqlens`` says where each sequence starts.
A user may also hand packed tokens in, and then gets packed outputs back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertfast.ops._checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_device,
    check_floating,
    check_integers,
    check_shape,
    check_tensor,
    values_are_checked,
)
from bertfast.ops._recorders import values_are_hidden


@dataclass(frozen=True)
class Batch:
    """One batch as packed tokens, and the way back to the caller's layout.

    Args:
        input_ids: int ``(T,)``, or None with ``inputs_embeds``.
        inputs_embeds: ``(T, H)``, or None with ``input_ids``.
        token_type_ids: int ``(T,)``.
        position_ids: int ``(T,)``.
        cu_seqlens: int32 ``(B + 1,)``: sequence b is the rows from ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1]``. Rows from ``cu_seqlens[-1]`` on are storage, not tokens.
        max_seqlen: at least the longest sequence.
        padded_shape: ``(B, S)`` of a padded batch, None when the caller's input was packed.
        indices: int64 ``(T,)``, each token's place in the flattened ``(B * S)``; None when the
            batch has no padding (or was packed), and then packing is only a view.
        keeps_padding: whether the padding's places come last in ``indices``, as storage, so that
            ``T`` is ``B * S`` whatever the mask: for a graph that is recorded.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    padded_shape: tuple[int, int] | None = None
    indices: Tensor | None = None
    keeps_padding: bool = False

    @property
    def has_storage(self) -> bool:
        """Whether there may be rows behind ``cu_seqlens[-1]``."""
        return self.padded_shape is None or self.keeps_padding

    @property
    def tokens(self) -> int:
        """``T``, the number of packed rows."""
        return self.position_ids.shape[0]

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The shape of a per-token label or output in the caller's layout: (B, S) or (T,)."""
        return self.padded_shape if self.padded_shape is not None else (self.tokens,)

    def packed_inputs(self) -> dict[str, Any]:
        """The keyword arguments that hand these tokens to ``BertModel`` as packed input."""
        names = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "cu_seqlens")
        return {name: getattr(self, name) for name in names} | {"max_seqlen": self.max_seqlen}

    def pack(self, x: Tensor) -> Tensor:
        """``(B, S, ...)`` to ``(T, ...)``; what is packed already comes back as it is."""
        if self.padded_shape is None:
            return x
        return _take(x, self.padded_shape, self.indices)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``(T, ...)`` to ``(B, S, ...)`` with ``value`` on padding; no change for packed input."""
        return x if self.padded_shape is None else self.to_grid(x, value)

    def pad_all(self, tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """:meth:`pad` on each of the hidden states, if there are any."""
        return None if tensors is None else tuple(self.pad(x) for x in tensors)

    def pad_attentions(self, attentions: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Attention probabilities of packed tokens to ``(B, heads, S, S)``, zeros on padding.

        They come as ``(B, heads, s, s)``, where ``s`` is the smaller of ``max_seqlen`` and ``T``.
        """
        if attentions is None or self.padded_shape is None:
            return attentions
        sequence, column = _locate(self.cu_seqlens, self.tokens)
        padded = []
        for x in attentions:
            x = self.pad(x[sequence, :, column])  # queries: (B, S, heads, s)
            x = self.pad(x.permute(0, 3, 1, 2)[sequence, column])  # and keys: (B, S, S, heads)
            padded.append(x.permute(0, 3, 2, 1))
        return tuple(padded)

    def to_grid(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``(T, ...)`` to one row per sequence, ``(B, S, ...)``, also for packed input.

        For packed input ``S`` is ``max_seqlen`` (or ``T``, if that is less) and a token's column
        is its place in its sequence.
        """
        if self.padded_shape is not None and self.indices is None:
            return x.reshape(*self.padded_shape, *x.shape[1:])
        places, (rows, columns) = self._places()
        # Storage rows go to one more place behind the grid, which is cut off.
        extra = 1 if self.has_storage else 0
        flat = x.new_full((rows * columns + extra, *x.shape[1:]), value)
        flat = flat.index_copy(0, places, x)[: rows * columns]
        return flat.reshape(rows, columns, *x.shape[1:])

    def attended(self) -> Tensor:
        """bool ``(B, S)``: which places of :meth:`to_grid` hold a token."""
        return self.to_grid(torch.ones_like(self.position_ids, dtype=torch.bool), False)

    def labels(self, name: str, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Per-token labels in the caller's layout, packed to int64 ``(T,)``.

        Labels on padding are dropped with it, and those on storage rows are ignored.

        Raises:
            TypeError, ValueError: ``labels`` is not integer, or not of the input's shape.
        """
        check_integers(name, labels)
        check_shape(name, labels, self.leading_shape)
        check_device(name, labels, "input", self.position_ids)
        packed = self.pack(labels).long()
        return packed.masked_fill(self._storage(), ignore_index) if self.has_storage else packed

    def _storage(self) -> Tensor:
        """bool ``(T,)``: the rows that are no tokens."""
        return _storage(self.cu_seqlens, self.tokens)

    def _places(self) -> tuple[Tensor, tuple[int, int]]:
        """Each token's place in the flattened grid, and the grid's shape."""
        if self.padded_shape is not None:
            assert self.indices is not None
            places, grid = self.indices, self.padded_shape
        else:
            sequence, column = _locate(self.cu_seqlens, self.tokens)
            grid = (self.cu_seqlens.shape[0] - 1, min(self.max_seqlen, self.tokens))
            places = sequence * grid[1] + column
        if self.has_storage:
            places = places.masked_fill(self._storage(), grid[0] * grid[1])
        return places, grid


def make_batch(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    *,
    max_positions: int,
) -> Batch:
    """Check a model's input and pack it.

    Padded: ``input_ids`` int ``(B, S)`` or ``inputs_embeds`` ``(B, S, H)``; ``attention_mask`` 0/1
    ``(B, S)``, padding left, right or anywhere, None for no padding; ``token_type_ids`` and
    ``position_ids`` int ``(B, S)`` or ``(1, S)``. Positions default to the column, as in Hugging
    Face's BERT, so left padding shifts them.

    Packed: ``input_ids`` ``(T,)`` or ``inputs_embeds`` ``(T, H)`` with ``cu_seqlens`` and
    ``max_seqlen``; ``token_type_ids`` and ``position_ids`` ``(T,)``. Positions default to the
    place in the sequence.

    Args:
        max_positions: rows of the position table.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, or a
            sequence longer than the position table.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {given}")
    name = "input_ids" if input_ids is not None else "inputs_embeds"
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    if input_ids is not None:
        check_integers(name, tokens)
    else:
        check_floating(name, tokens)
    packed = cu_seqlens is not None
    if not packed and max_seqlen is not None:
        raise ValueError("cu_seqlens: expected it with max_seqlen (packed input), got None")
    layout = ("T",) if packed else ("B", "S")
    expected = layout if input_ids is not None else (*layout, "H")
    if tokens.dim() != len(expected):
        raise ValueError(
            f"{name}: expected shape ({', '.join(expected)}) for {'packed' if packed else 'padded'}"
            f" input, got {tuple(tokens.shape)}"
        )
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: expected None with cu_seqlens (packed input has none)"
            )
        return _from_packed(
            input_ids, inputs_embeds, token_type_ids, position_ids, cu_seqlens, max_seqlen,
            name, tokens, max_positions,
        )  # fmt: skip
    return _from_padded(
        input_ids, inputs_embeds, token_type_ids, position_ids, attention_mask,
        name, tokens, max_positions,
    )  # fmt: skip


def _from_padded(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    name: str,
    tokens: Tensor,
    max_positions: int,
) -> Batch:
    shape = (tokens.shape[0], tokens.shape[1])
    if position_ids is None:
        _check_length(name, shape[1], max_positions)
        position_ids = torch.arange(shape[1], device=tokens.device).unsqueeze(0)
    if token_type_ids is None:
        token_type_ids = torch.zeros((1, shape[1]), dtype=torch.int64, device=tokens.device)
    for key, value in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        check_integers(key, value)
        if tuple(value.shape) != (1, shape[1]):
            check_shape(key, value, shape)
        check_device(key, value, name, tokens)
    recorded = values_are_hidden()
    if recorded:
        _check_length(name, shape[1], max_positions)
        indices, cu_seqlens = sort_padding(attention_mask, shape, name, tokens)
        # The length that comes later is not known, and kernels take any bound.
        max_seqlen = max_positions
    else:
        indices, cu_seqlens, max_seqlen = unpad(attention_mask, shape, name, tokens)
    keeps_padding = recorded and indices is not None
    storage = _storage(cu_seqlens, shape[0] * shape[1]) if keeps_padding else None

    def take(x: Tensor | None) -> Any:
        if x is None:
            return None
        x = _take(x.expand(*shape, *x.shape[2:]), shape, indices)
        # What stands on padding is read now, and may be anything.
        return x if storage is None else x.masked_fill(storage.view(-1, *[1] * (x.dim() - 1)), 0)

    return Batch(
        take(input_ids),
        take(inputs_embeds),
        take(token_type_ids),
        take(position_ids),
        cu_seqlens,
        max_seqlen,
        shape,
        indices,
        keeps_padding,
    )


def _from_packed(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    name: str,
    tokens: Tensor,
    max_positions: int,
) -> Batch:
    count = tokens.shape[0]
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(
            "max_seqlen: expected an integer with cu_seqlens (packed input), "
            f"got {type(max_seqlen).__name__}"
        )
    check_cu_seqlens("cu_seqlens", cu_seqlens, name, tokens)
    if may_look(tokens):
        check_cu_seqlens_values("cu_seqlens", cu_seqlens, count, "max_seqlen", max_seqlen)
    if position_ids is None:
        if may_look(tokens) and cu_seqlens.shape[0] > 1:
            longest = int(cu_seqlens.diff().max())
            if longest > max_positions:
                raise ValueError(
                    f"cu_seqlens: expected sequences no longer than the position table "
                    f"(max_position_embeddings={max_positions}), got {longest} tokens"
                )
        position_ids = _locate(cu_seqlens, count)[1]
    if token_type_ids is None:
        token_type_ids = torch.zeros(count, dtype=torch.int64, device=tokens.device)
    for key, value in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        check_integers(key, value)
        check_shape(key, value, (count,))
        check_device(key, value, name, tokens)
    return Batch(input_ids, inputs_embeds, token_type_ids, position_ids, cu_seqlens, max_seqlen)


def unpad(
    attention_mask: Tensor | None, shape: tuple[int, int], name: str, tokens: Tensor
) -> tuple[Tensor | None, Tensor, int]:
    """Where the attended tokens of a padded batch are.

    Args:
        attention_mask: integer or bool ``(B, S)`` of 0 and 1, or None for no padding.
        shape: ``(B, S)`` of the input.
        name, tokens: the input, for messages and its device.

    Returns:
        indices: int64 ``(T,)`` into the flattened batch, or None when nothing is padding.
        cu_seqlens: int32 ``(B + 1,)``; an all-masked row is a sequence of length zero.
        max_seqlen: the longest sequence, 0 for an empty batch.

    Raises:
        TypeError, ValueError: the mask is float, three-dimensional, not 0/1, or of another shape.
    """
    rows, columns = shape
    if attention_mask is None:
        return None, _even_bounds(shape, tokens), columns if rows else 0
    attended = _attended(attention_mask, shape, name, tokens)
    cu_seqlens, lengths = _bounds(attended)
    indices = attended.reshape(-1).nonzero().squeeze(1)
    max_seqlen = int(lengths.max()) if rows else 0
    if indices.shape[0] == rows * columns:
        return None, cu_seqlens, max_seqlen
    return indices, cu_seqlens, max_seqlen


def sort_padding(
    attention_mask: Tensor | None, shape: tuple[int, int], name: str, tokens: Tensor
) -> tuple[Tensor | None, Tensor]:
    """As :func:`unpad`, but without a shape or a number that depends on the mask's values.

    Returns:
        indices: int64 ``(B * S,)``: the places of the attended tokens in their order, and then
            those of the padding; None without a mask.
        cu_seqlens: as of :func:`unpad`.

    Raises:
        TypeError, ValueError: as :func:`unpad`, except that values are not looked at: other numbers
            than 0 are taken for 1.
    """
    if attention_mask is None:
        return None, _even_bounds(shape, tokens)
    attended = _attended(attention_mask, shape, name, tokens)
    indices = (~attended).reshape(-1).int().argsort(stable=True)
    return indices, _bounds(attended)[0]


def _even_bounds(shape: tuple[int, int], tokens: Tensor) -> Tensor:
    return torch.arange(shape[0] + 1, dtype=torch.int32, device=tokens.device) * shape[1]


def _bounds(attended: Tensor) -> tuple[Tensor, Tensor]:
    """``cu_seqlens`` of a bool ``(B, S)``, and the length of each sequence."""
    lengths = attended.sum(1, dtype=torch.int32)
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), lengths


def _attended(attention_mask: Tensor, shape: tuple[int, int], name: str, tokens: Tensor) -> Tensor:
    """The mask, checked, as bool."""
    check_tensor("attention_mask", attention_mask)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            "attention_mask: expected integers or bools, 1 for a token and 0 for padding, got "
            f"{attention_mask.dtype}; additive float masks are not supported"
        )
    if attention_mask.dim() == 3:
        raise ValueError(
            f"attention_mask: expected shape (B, S), one row per sequence, got "
            f"{tuple(attention_mask.shape)}; masks per query are not supported"
        )
    check_shape("attention_mask", attention_mask, shape)
    check_device("attention_mask", attention_mask, name, tokens)
    attended = attention_mask != 0
    if may_look(tokens) and attention_mask.dtype != torch.bool:
        odd = attention_mask[attended & (attention_mask != 1)]
        if odd.numel():
            raise ValueError(f"attention_mask: expected only 0 and 1, got {int(odd[0])}")
    return attended


def _check_length(name: str, length: int, max_positions: int) -> None:
    if length > max_positions:
        raise ValueError(
            f"{name}: expected sequences no longer than the position table "
            f"(max_position_embeddings={max_positions}), got {length} tokens"
        )


def _storage(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """bool ``(tokens,)``: the rows behind the last sequence."""
    return torch.arange(tokens, dtype=torch.int64, device=cu_seqlens.device) >= cu_seqlens[-1]


def _take(x: Tensor, shape: tuple[int, int], indices: Tensor | None) -> Tensor:
    flat = x.reshape(shape[0] * shape[1], *x.shape[2:])
    return flat if indices is None else flat.index_select(0, indices)


def _locate(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For each packed row its sequence and its place in it, int64 ``(T,)``; zeros on storage."""
    rows = torch.arange(tokens, dtype=torch.int64, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    # right=True steps over sequences of length zero, to the one that the row lies in.
    sequence = torch.searchsorted(bounds, rows, right=True) - 1
    storage = rows >= bounds[-1]
    return sequence.masked_fill(storage, 0), (rows - bounds[sequence]).masked_fill(storage, 0)


def may_look(tokens: Tensor) -> bool:
    """Values may be read without a GPU waiting, a compiled graph breaking or a recorded graph
    being right for these values only."""
    return (
        values_are_checked(tokens) and not torch.compiler.is_compiling() and not values_are_hidden()
    )
