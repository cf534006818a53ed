"""What a model returns: named fields that also index and unpack like a tuple."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


class ModelOutput:
    """Base of the outputs. A field that was not computed is None and does not count as an item.

    ``out.logits``, ``out["logits"]``, ``out[0]`` and ``loss, logits = out`` all work; iterating
    gives the values, and ``keys()`` / ``items()`` their names.
    """

    def keys(self) -> list[str]:
        """The names of the fields that were computed, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def items(self) -> list[tuple[str, Any]]:
        """The computed fields as pairs of name and value."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The computed fields' values."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has {', '.join(self.keys())}; got {key!r}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(eq=False)
class EncoderOutput(ModelOutput):
    """``BertModel``'s output; ``(B, S, H)`` stands for ``(T, H)`` when the input was packed.

    Args:
        last_hidden_state: ``(B, S, H)``; zeros on padding.
        pooler_output: ``(B, H)``, or None without a pooling layer.
        hidden_states: ``1 + num_hidden_layers`` tensors ``(B, S, H)``, the embedding first.
        attentions: per layer ``(B, heads, S, S)``, zeros on padding.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class LogitsOutput(ModelOutput):
    """The output of every head with one ``logits`` tensor; the head says its shape.

    Args:
        loss: scalar, when labels were given.
        logits: the head's scores.
        hidden_states, attentions: as in :class:`EncoderOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class PreTrainingOutput(ModelOutput):
    """``BertForPreTraining``'s output.

    Args:
        loss: scalar, when labels were given.
        prediction_logits: ``(B, S, vocab)`` or packed ``(T, vocab)``, zeros on padding.
        seq_relationship_logits: ``(B, 2)``.
        hidden_states, attentions: as in :class:`EncoderOutput`.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """``BertForQuestionAnswering``'s output.

    Args:
        loss: scalar, when both positions were given.
        start_logits, end_logits: ``(B, S)`` or packed ``(T,)``; on padding the dtype's lowest
            number, so that it is never chosen.
        hidden_states, attentions: as in :class:`EncoderOutput`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
