"""``accelerate(model)`` and ``restore(model)``."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from bertfast.integrations._heads import (
    AcceleratedBertMaskedLM,
    AcceleratedBertPreTraining,
    AcceleratedDistilBertMaskedLM,
    AcceleratedElectraMaskedLM,
    AcceleratedMaskedLM,
    AcceleratedRobertaMaskedLM,
)
from bertfast.integrations._layers import (
    Accelerated,
    AcceleratedBert,
    AcceleratedBertLayer,
    AcceleratedDistilBert,
    AcceleratedDistilBertLayer,
    AcceleratedModel,
)

Model = TypeVar("Model", bound=nn.Module)

# What each part of a model must be, by its path below the model; "*" is every layer. Parts that are
# not called, because their parameters are read or a kernel does what they do; all others may be
# anything.
Parts = dict[str, type[nn.Module]]
_DROPOUTS = (nn.Dropout, nn.Identity)  # one that was taken out leaves an Identity


def _bert_parts(modeling: Any, prefix: str) -> Parts:
    names = {
        "embeddings": "Embeddings",
        "encoder": "Encoder",
        "encoder.layer.*": "Layer",
        "encoder.layer.*.attention": "Attention",
        "encoder.layer.*.attention.self": "SelfAttention",
        "encoder.layer.*.attention.output": "SelfOutput",
        "encoder.layer.*.intermediate": "Intermediate",
        "encoder.layer.*.output": "Output",
    }
    dropouts = ("attention.self", "attention.output", "output")
    return {
        **{path: getattr(modeling, prefix + name) for path, name in names.items()},
        "embeddings.dropout": nn.Dropout,
        **{f"encoder.layer.*.{part}.dropout": nn.Dropout for part in dropouts},
    }


PARTS: dict[type[nn.Module], Parts] = {
    modeling_bert.BertModel: _bert_parts(modeling_bert, "Bert"),
    modeling_roberta.RobertaModel: _bert_parts(modeling_roberta, "Roberta"),
    modeling_xlm_roberta.XLMRobertaModel: _bert_parts(modeling_xlm_roberta, "XLMRoberta"),
    modeling_electra.ElectraModel: _bert_parts(modeling_electra, "Electra"),
    modeling_distilbert.DistilBertModel: {
        "embeddings": modeling_distilbert.Embeddings,
        "transformer": modeling_distilbert.Transformer,
        "transformer.layer.*": modeling_distilbert.TransformerBlock,
        "transformer.layer.*.attention": modeling_distilbert.DistilBertSelfAttention,
        "transformer.layer.*.ffn": modeling_distilbert.FFN,
        "embeddings.dropout": nn.Dropout,
        "transformer.layer.*.attention.dropout": nn.Dropout,
        "transformer.layer.*.ffn.dropout": nn.Dropout,
    },
}

# What each class becomes. The forward of a subclass that has its own is never replaced.
_BERT_LIKE = (
    (modeling_bert, "Bert"),
    (modeling_roberta, "Roberta"),
    (modeling_xlm_roberta, "XLMRoberta"),
    (modeling_electra, "Electra"),
)
REPLACEMENTS: dict[type[nn.Module], type[Accelerated]] = {
    **{getattr(modeling, prefix + "Model"): AcceleratedBert for modeling, prefix in _BERT_LIKE},
    **{
        getattr(modeling, prefix + "Layer"): AcceleratedBertLayer for modeling, prefix in _BERT_LIKE
    },
    modeling_distilbert.DistilBertModel: AcceleratedDistilBert,
    modeling_distilbert.TransformerBlock: AcceleratedDistilBertLayer,
    modeling_bert.BertForPreTraining: AcceleratedBertPreTraining,
    modeling_bert.BertForMaskedLM: AcceleratedBertMaskedLM,
    modeling_roberta.RobertaForMaskedLM: AcceleratedRobertaMaskedLM,
    modeling_xlm_roberta.XLMRobertaForMaskedLM: AcceleratedRobertaMaskedLM,
    modeling_electra.ElectraForMaskedLM: AcceleratedElectraMaskedLM,
    modeling_distilbert.DistilBertForMaskedLM: AcceleratedDistilBertMaskedLM,
}
HEADS = tuple(cls for cls, made in REPLACEMENTS.items() if issubclass(made, AcceleratedMaskedLM))

_made: dict[type[nn.Module], Any] = {}


def accelerated_class(cls: Any) -> Any:
    """A subclass of a class in :data:`REPLACEMENTS`, or of a subclass, that goes by its name."""
    if cls in _made:
        return _made[cls]
    (base,) = (made for known, made in REPLACEMENTS.items() if issubclass(cls, known))
    # The name goes into config.json and messages, and transformers looks up by it what it records.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = {"accelerated_from": cls, "parts": _parts_of(cls)}
    made: Any = type(cls.__name__, (base, cls), {**names, **own})
    if "forward" not in made.__dict__:  # layers have one, which checkpoints

        @functools.wraps(cls.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return base.forward(self, *args, **kwargs)

        # Trainer looks at the parameters to find the columns that a model takes. And through
        # __wrapped__ the accelerate library, taking wrappers off, would go on to transformers'.
        signature = inspect.signature(cls.forward)
        del forward.__wrapped__
        vars(forward)["__signature__"] = signature
        made.forward = forward
    _made[cls] = made
    return made


def _parts_of(cls: type[nn.Module]) -> tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...]:
    """The parts of a model but for its layers', or those of a layer: paths and forwards."""
    found: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for model, parts in PARTS.items():
        for path, part in parts.items():
            before, star, after = path.partition(".*.")
            owner = parts[f"{before}.*"] if star else model
            if issubclass(cls, owner) and not path.endswith("*"):
                kinds = _DROPOUTS if part is nn.Dropout else (part,)
                found[tuple((after if star else path).split("."))] = tuple(
                    kind.forward for kind in kinds
                )
    return tuple(found.items())


def accelerate(model: Model, *, unpad: bool | None = None, output_logits: bool = True) -> Model:
    """Run the BERT, RoBERTa, XLM-RoBERTa, DistilBERT or ELECTRA in ``model`` on bertfast's kernels.

    The instance itself is changed, no class and no config: other models are as before. Parameters,
    their names, checkpoints and the arguments and outputs of ``forward`` stay; :func:`restore`
    undoes it.

    Attended positions and the first column get transformers' outputs; on other padding, which is
    not computed, they are zeros.

    Args:
        model: a transformers model of these families, any head, or a module that holds one or
            several (a ``SentenceTransformer``, say).
        unpad: whether padding is left out. None: yes, but for question answering, where
            transformers' softmax runs over padding, too.
        output_logits: False: a masked-LM model in training mode, given labels, leaves the logits
            out (None) and runs its head on labelled tokens alone.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: ``model`` is none of them, is accelerated already, is a decoder, or
            has parts that were replaced; the message names what. Nothing is changed then. Heads are
            not refused: what is no head of transformers' computes as it did.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if unpad is not None and not isinstance(unpad, bool):
        raise TypeError(f"unpad: expected a bool or None, got {type(unpad).__name__}")
    if not isinstance(output_logits, bool):
        raise TypeError(f"output_logits: expected a bool, got {type(output_logits).__name__}")
    found: dict[str, Any] = {
        name: part for name, part in model.named_modules() if isinstance(part, tuple(PARTS))
    }
    if not found:
        known = ", ".join(cls.__name__ for cls in PARTS)
        raise TypeError(
            f"model: expected one of {known} or a module that holds one, got {type(model).__name__}"
        )
    for name, part in found.items():
        _check(f"model.{name}" if name else "model", part)
    if unpad is None:
        classes_of = (cls for part in model.modules() for cls in type(part).__mro__)
        unpad = not any(cls.__name__.endswith("ForQuestionAnswering") for cls in classes_of)
    # All classes are made before one is given: an error changes nothing. A part that is there twice
    # (ALBERT's way to share a layer) has one.
    classes = {part: accelerated_class(type(part)) for part in found.values()}
    for part, cls in list(classes.items()):
        classes.update((layer, accelerated_class(type(layer))) for layer in cls._layers(part))
    heads: list[Any] = [
        part
        for part in model.modules()
        # One with a forward of its own keeps it.
        if isinstance(part, HEADS) and any(_has_forward_of(part, known) for known in HEADS)
    ]
    classes.update((head, accelerated_class(type(head))) for head in heads)
    for part, cls in classes.items():
        _become(part, cls)
    for part in found.values():
        part.bertfast_unpad = unpad
    for head in heads:
        head.bertfast_logits = output_logits
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: transformers' own code computes again, bit for bit as before.

    Args:
        model: what was given to :func:`accelerate`, or a copy of it.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing in it is accelerated, or something wrapped its ``forward`` since.
    """
    found: list[tuple[str, Any]] = [
        (f"model.{name}" if name else "model", part)
        for name, part in model.named_modules()
        if isinstance(part, Accelerated)
    ]
    if not found:
        raise ValueError(f"model: expected an accelerated model, got {type(model).__name__}")
    for name, part in found:
        if _is_wrapped(part) or "accelerated_from" not in type(part).__dict__:
            raise ValueError(
                f"{name}: its forward or class was wrapped after accelerate(); unwrap it first "
                "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
    for _, part in found:
        for option in ("bertfast_unpad", "bertfast_logits"):
            part.__dict__.pop(option, None)
        _become(part, type(part).accelerated_from)
    return model


def _become(part: nn.Module, cls: type[nn.Module]) -> None:
    part.__dict__.pop("forward", None)
    part.__class__ = cls


def _is_wrapped(part: nn.Module) -> bool:
    """Whether the instance has another forward than its class. What a wrapper leaves behind when
    it goes, the class's own bound to the instance, is none."""
    own = part.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(part).forward


def _check(name: str, model: Any) -> None:
    """Refuse a base model whose forward is not what the kernels compute."""
    if isinstance(model, AcceleratedModel):
        raise ValueError(f"{name}: expected a model as transformers made it, it is accelerated")
    (cls,) = (cls for cls in PARTS if isinstance(model, cls))
    _check_forward(name, model, cls)
    for path, expected in PARTS[cls].items():
        for found, part in _at(model, path):
            if expected is not nn.Dropout:
                _check_forward(f"{name}.{found}", part, expected)
            elif type(part) not in _DROPOUTS:
                raise TypeError(
                    f"{name}.{found}: expected an nn.Dropout, got {type(part).__name__}"
                )
    config = model.config
    for option in ("is_decoder", "add_cross_attention", "chunk_size_feed_forward"):
        if getattr(config, option, False):
            raise ValueError(
                f"{name}.config.{option}: expected {'0' if 'chunk' in option else 'False'}, "
                f"got {getattr(config, option)}"
            )
    relative = getattr(config, "position_embedding_type", None) or "absolute"
    if relative != "absolute":
        raise ValueError(
            f"{name}.config.position_embedding_type: expected 'absolute', got {relative!r}"
        )
    if any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise ValueError(
            f"{name}: expected a model on one device, it is dispatched or offloaded by accelerate"
        )


def _check_forward(name: str, part: nn.Module, expected: type[nn.Module]) -> None:
    if not isinstance(part, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(part).__name__}")
    if isinstance(part, Accelerated):
        raise ValueError(f"{name}: expected a layer as transformers made it, it is accelerated")
    if not _has_forward_of(part, expected):
        raise TypeError(
            f"{name}: expected {expected.__name__}'s forward, got that of {type(part).__name__}, "
            "which would not be called"
        )


def _has_forward_of(part: nn.Module, expected: type[nn.Module]) -> bool:
    return type(part).forward is expected.forward and not _is_wrapped(part)


def _at(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules at a path of :data:`PARTS`, with their names."""
    before, star, after = path.partition(".*")
    if not star:
        yield path, model.get_submodule(path)
        return
    for index, layer in model.get_submodule(before).named_children():
        yield f"{before}.{index}{after}", layer.get_submodule(after.lstrip("."))
