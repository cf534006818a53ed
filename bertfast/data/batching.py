"""Batches: examples one after another without padding (what the model is fast on), or padded (what
others need)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from bertfast.data.masking import IGNORE
from bertfast.data.pretraining import Example

# Anything with ``input_ids``.
Row = TypeVar("Row", bound=Any)


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """One packed batch of B examples and T tokens together; goes straight in as
    ``model(**pack(examples))``.

    input_ids, token_type_ids, labels: int64 ``(T,)``. cu_seqlens: int32 ``(B + 1,)``, where each
    example starts and the last one ends. max_seqlen: int, tokens of the longest.
    next_sentence_label: int64 ``(B,)``. Positions are left to the model, which counts them from 0
    in every sequence. No examples give an empty batch (T = 0).
    """
    return {
        **pack_inputs(examples),
        "labels": _join([example.labels for example in examples]),
        "next_sentence_label": _next_sentence_label(examples),
    }


def pack_inputs(examples: Sequence[Any]) -> dict[str, Any]:
    """The unlabelled part of :func:`pack`: ``input_ids``, ``token_type_ids``, ``cu_seqlens`` and
    ``max_seqlen`` of examples that have ``input_ids`` and ``token_type_ids``, int64 arrays
    ``(tokens,)``."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int32)
    cu_seqlens = np.zeros(len(examples) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return {
        "input_ids": _join([example.input_ids for example in examples]),
        "token_type_ids": _join([example.token_type_ids for example in examples]),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": int(lengths.max(initial=0)),
    }


def pad(examples: Sequence[Example], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The same batch padded on the right to its longest sequence S, for models that know no
    packing.

    input_ids, attention_mask (1 at tokens), token_type_ids, labels (−100 at padding): int64 ``(B,
    S)``. next_sentence_label: int64 ``(B,)``.
    """
    shape = (len(examples), max((len(example.input_ids) for example in examples), default=0))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    token_type_ids = torch.zeros(shape, dtype=torch.int64, device="cpu")
    labels = torch.full(shape, IGNORE, dtype=torch.int64, device="cpu")
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[row, :n] = torch.from_numpy(example.input_ids)
        attention_mask[row, :n] = 1
        token_type_ids[row, :n] = torch.from_numpy(example.token_type_ids)
        labels[row, :n] = torch.from_numpy(example.labels)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": labels,
        "next_sentence_label": _next_sentence_label(examples),
    }


def group(
    examples: Sequence[Row], *, sequences: int | None = None, tokens: int | None = None
) -> Iterator[Sequence[Row]]:
    """Cut examples, in order, into the groups that become batches; the last one may be smaller.

    Give exactly one of ``sequences`` (examples per group) and ``tokens`` (at most so many tokens
    per group; an example that is longer by itself makes a group of its own). Raises ValueError
    otherwise.
    """
    if (sequences is None) == (tokens is None):
        raise ValueError(
            "sequences, tokens: expected exactly one of them, "
            f"got sequences={sequences}, tokens={tokens}"
        )
    if sequences is not None:
        if sequences < 1:
            raise ValueError(f"sequences: expected at least 1, got {sequences}")
        for start in range(0, len(examples), sequences):
            yield examples[start : start + sequences]
        return
    if tokens is None or tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    start, total = 0, 0
    for i, example in enumerate(examples):
        if i > start and total + len(example.input_ids) > tokens:
            yield examples[start:i]
            start, total = i, 0
        total += len(example.input_ids)
    if start < len(examples):
        yield examples[start:]


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on ``device``; everything else is passed on as it is."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def _join(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64))


def _next_sentence_label(examples: Sequence[Example]) -> torch.Tensor:
    labels = [example.next_sentence_label for example in examples]
    return torch.tensor(labels, dtype=torch.int64, device="cpu")
