"""What a model returns: named fields that are a dictionary, too, and index like a tuple."""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.utils._pytree import register_pytree_node


class ModelOutput(dict[str, Any]):
    """Base of the outputs, which behave as transformers' do.

    ``out.logits``, ``out["logits"]`` and ``out[0]`` are the same. A field that was not computed is
    None and is no item. Iterating gives the items' names, as of any dictionary, and
    :meth:`to_tuple` their values: ``loss, logits = out.to_tuple()``.
    """

    def __init_subclass__(cls) -> None:
        # So that torch.export, DistributedDataParallel and others find the tensors in it.
        register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        # Libraries that move or cast an output's tensors make it anew from one argument, its names
        # and values, as they would any dictionary.
        first = next(iter(self.__dataclass_fields__))  # type: ignore[attr-defined]
        given = self.get(first)
        if given is None or isinstance(given, Tensor) or len(self) > 1:
            return
        setattr(self, first, None)
        for name, value in dict(given).items():
            self[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is not None:
            dict.__setitem__(self, name, value)
        else:
            dict.pop(self, name, None)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise KeyError(f"{type(self).__name__} has no field {name!r}")
        setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{type(self).__name__} has {', '.join(self)}; got {key!r}")
        return dict.__getitem__(self, key)

    def __delitem__(self, key: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: its fields cannot be removed, got {key!r}")

    def pop(self, key: Any, *default: Any) -> NoReturn:
        self.__delitem__(key)

    def setdefault(self, key: Any, default: Any = None) -> NoReturn:
        self.__delitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.__delitem__("update")

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.__dataclass_fields__)  # type: ignore[attr-defined]
        return type(self), tuple(values)

    def to_tuple(self) -> tuple[Any, ...]:
        """The computed fields' values."""
        return tuple(self.values())


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
