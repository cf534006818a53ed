"""From texts to packed batches, for every task: encode, cut to windows, sort, pack.

A text is tokenized once, as a whole and without special tokens. What the model reads are rows: a
text or a window of one, or a pair, between the special tokens of the tokenizer's template. Rows of
like length go into one batch of at most so many tokens, without padding.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from bertfast.data.batching import group, pack_inputs, to_device
from bertfast.data.vocab import mask_token


class Row(NamedTuple):
    """One sequence of a batch.

    input_ids, token_type_ids: int64 ``(tokens,)``. owner: index of the input it is made of. It
    holds ``size`` tokens of that input's text (of a pair: of the second text), from its token
    ``first`` on, and they start at ``start`` in ``input_ids``.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    owner: int
    start: int
    first: int
    size: int


class TextRows:
    """The rows of one text, in order, to ask which one to believe."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._starts = [row.first for row in rows]
        self._ends = [row.first + row.size for row in rows]

    def best(self, first: int, last: int) -> int | None:
        """Of the rows that hold the token ``first``, the one with most of the text around the
        tokens ``first`` to ``last``; None if no row holds it."""
        holding = range(bisect_right(self._ends, first), bisect_right(self._starts, first))
        return max(holding, key=lambda i: self._context(i, first, last), default=None)

    def _context(self, i: int, first: int, last: int) -> int:
        # To the row's nearer end. At the ends of the text nothing is cut off, but there the first
        # and the last row win anyway: no other reaches as far on the other side.
        return min(first - self._starts[i], self._ends[i] - 1 - last)


class Template:
    """Where the tokenizer puts special tokens, learned from what it makes of ``[MASK]`` (or
    RoBERTa's ``<mask>``).

    ``token_types``: how many the model has. Where it has one, as RoBERTa and DistilBERT, the second
    text is of it, too, whatever the tokenizer says.

    Raises ValueError for a tokenizer to which its mask is not one token.
    """

    def __init__(self, tokenizer: Tokenizer, token_types: int = 2) -> None:
        mask = mask_token(tokenizer)
        self._single = _surroundings(tokenizer.encode(mask), mask, 1, token_types)
        self._pair = _surroundings(tokenizer.encode(mask, mask), mask, 2, token_types)
        # Special tokens around one text, and around two.
        self.single, self.pair = (
            sum(len(ids) for ids, _ in parts[::2]) for parts in (self._single, self._pair)
        )

    def row(self, owner: int, texts: Sequence[np.ndarray], first: int = 0) -> Row:
        """One text, or a pair, between special tokens; ``first`` as in :class:`Row`."""
        parts = self._single if len(texts) == 1 else self._pair
        ids, types, start = [], [], 0
        for i, (special, special_types) in enumerate(parts):
            if i % 2 == 0:
                ids.append(special)
                types.append(special_types)
            else:
                text = texts[i // 2]
                start = sum(map(len, ids))
                ids.append(text)
                types.append(np.full(len(text), special_types[0], dtype=np.int64))
        return Row(np.concatenate(ids), np.concatenate(types), owner, start, first, len(texts[-1]))


def _surroundings(
    encoding: Encoding, mask: str, texts: int, token_types: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and types of: special tokens, the text, special tokens, the second text, …"""
    sequences, wanted = encoding.sequence_ids, list(range(texts))
    places = [i for i, sequence in enumerate(sequences) if sequence is not None]
    if [sequences[i] for i in places] != wanted:
        raise ValueError(
            f"tokenizer: expected {mask} to be one token, got {' '.join(encoding.tokens)}"
        )
    bounds = [0, *(edge for place in places for edge in (place, place + 1)), len(sequences)]
    ids = np.array(encoding.ids, dtype=np.int64)
    types = np.array(encoding.type_ids, dtype=np.int64).clip(max=token_types - 1)
    return [(ids[a:b], types[a:b]) for a, b in itertools.pairwise(bounds)]


def token_ids(encodings: Sequence[Encoding]) -> list[np.ndarray]:
    """int64 ``(tokens,)`` of each."""
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def finite(values: Tensor) -> Tensor:
    """What a model computed, if it is numbers. Raises ValueError for NaN and infinity."""
    if not values.isfinite().all():
        raise ValueError(
            "model: expected finite outputs, got NaN or infinity (damaged weights, or a dtype of "
            "too small a range)"
        )
    return values


def words_of(word_ids: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """The first and the last token of each word, of the words that tokens are of."""
    first = 0
    for i in range(1, len(word_ids) + 1):
        if i == len(word_ids) or word_ids[i] is None or word_ids[i] != word_ids[first]:
            yield first, i - 1
            first = i


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """``start`` and ``end`` without white space: some tokenizers count the space before a word as
    part of it."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def windows(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cut ``count`` tokens into windows of at most ``room``: pairs of the first token and the one
    behind the last. Neighbours share ``stride`` tokens; no tokens are one empty window."""
    starts = range(0, max(count - stride, 1), room - stride)
    return [(start, min(start + room, count)) for start in starts]


def truncated(lengths: tuple[int, int], room: int) -> tuple[int, int]:
    """How many tokens of either text of a pair are kept when there is room for so many together:
    the longer one gives way first, until both are as long (transformers' ``longest_first``)."""
    short, long = sorted(lengths)
    if short + long > room:
        long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if lengths[0] <= lengths[1] else (long, short)


# The model's packed inputs and which rows they are made of, to one value for each of these.
Reader = Callable[[dict[str, Any], Sequence[int]], Sequence[Any]]


def run(rows: Sequence[Row], read: Reader, *, tokens: int, device: torch.device) -> list[Any]:
    """Read every row, in batches of at most ``tokens`` tokens and of like length, longest first.

    ``read(inputs, places)`` is given the model's packed inputs as keyword arguments, on ``device``,
    and the places in ``rows`` of what they hold. Returns the values in the order of ``rows``.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    values: list[Any] = [None] * len(rows)
    read_so_far = 0
    for batch in group([rows[i] for i in order], tokens=tokens):
        places = order[read_so_far : read_so_far + len(batch)]
        found = read(to_device(pack_inputs(batch), device), places)
        for i, value in zip(places, found, strict=True):
            values[i] = value
        read_so_far += len(batch)
    return values
