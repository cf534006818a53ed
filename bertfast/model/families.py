"""What BERT's relatives, and Google's own checkpoints, call BERT's weights and config fields.

RoBERTa, XLM-R, DistilBERT and ELECTRA compute what BERT computes, with these differences, which
loading undoes so that what comes out is a BERT:

* RoBERTa and XLM-R number positions from ``pad_token_id + 1``: the rows of the position table
  before that are dropped. (They count tokens, and BERT columns: under left padding give
  ``position_ids``.) Their sequence classifier has its own dense layer in place of a pooler.
* DistilBERT has no token types: its type table is one row of zeros. It has no pooler.
* ELECTRA has no pooler. What tells original from replaced tokens is a head that is not loaded.

What differs beyond that is refused with the reason.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bertfast.errors import CheckpointError, short
from bertfast.model.config import BertConfig

POOLER, CLASSIFIER, PREDICTIONS = "bert.pooler.", "classifier.", "cls.predictions."


class Name(NamedTuple):
    """Weights whose stored names start with the expression ``stored`` are BERT's ``bert``, or are
    left out if that is None or the model lacks one of ``parts``. A model that has them all is
    refused if ``unlike`` says why these weights are none of BERT's."""

    stored: str
    bert: str | None
    parts: tuple[str, ...] = ()
    unlike: str = ""


class Family(NamedTuple):
    """Differences to BERT. ``fields`` are names of config fields, ``defaults`` what Hugging Face
    takes for missing ones, ``has_token_types`` and ``has_pooler`` as they say;
    ``positions_after_padding``: the position table starts at ``pad_token_id + 1``;
    ``prediction_act``: the masked-LM head's activation, where the config does not choose it."""

    names: tuple[Name, ...] = ()
    fields: dict[str, str] = {}  # noqa: RUF012
    defaults: dict[str, Any] = {}  # noqa: RUF012
    has_token_types: bool = True
    has_pooler: bool = True
    positions_after_padding: bool = False
    prediction_act: str | None = None


BERT = Family()

_ROBERTA = Family(
    names=(
        Name(r"roberta\.", "bert."),
        Name(r"lm_head\.dense\.", "cls.predictions.transform.dense."),
        Name(r"lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
        Name(r"lm_head\.decoder\.", "cls.predictions.decoder."),
        Name(r"lm_head\.bias", "cls.predictions.bias"),
        Name(r"classifier\.dense\.", "bert.pooler.dense.", (POOLER, CLASSIFIER)),
        Name(r"classifier\.out_proj\.", "classifier.", (POOLER, CLASSIFIER)),
    ),
    defaults={"vocab_size": 50265, "pad_token_id": 1},
    positions_after_padding=True,
    prediction_act="gelu",
)

FAMILIES = {
    "bert": BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        names=(
            Name(r"(?:distilbert\.)?embeddings\.", "bert.embeddings."),
            *(
                Name(rf"(?:distilbert\.)?transformer\.layer\.(\d+)\.{theirs}\.",
                     rf"bert.encoder.layer.\1.{ours}.")
                for theirs, ours in (
                    ("attention.q_lin", "attention.self.query"),
                    ("attention.k_lin", "attention.self.key"),
                    ("attention.v_lin", "attention.self.value"),
                    ("attention.out_lin", "attention.output.dense"),
                    ("sa_layer_norm", "attention.output.LayerNorm"),
                    ("ffn.lin1", "intermediate.dense"),
                    ("ffn.lin2", "output.dense"),
                    ("output_layer_norm", "output.LayerNorm"),
                )
            ),
            Name(r"vocab_transform\.", "cls.predictions.transform.dense."),
            Name(r"vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
            Name(r"vocab_projector\.weight", "cls.predictions.decoder.weight"),
            Name(r"vocab_projector\.bias", "cls.predictions.bias"),
            Name(r"pre_classifier\.", None, (CLASSIFIER,),
                 "DistilBERT's classifier of sequences has a ReLU where BERT's pooler has tanh"),
        ),
        fields={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "activation": "hidden_act",
        },
        defaults={"num_hidden_layers": 6},
        has_token_types=False,
        has_pooler=False,
    ),
    "electra": Family(
        names=(
            Name(r"electra\.", "bert."),
            Name(r"generator_predictions\.", "cls.predictions.transform."),
            Name(r"generator_lm_head\.weight", "cls.predictions.decoder.weight"),
            Name(r"generator_lm_head\.bias", "cls.predictions.bias"),
            Name(r"discriminator_predictions\.", None),
            Name(r"classifier\.(dense|out_proj)\.", None, (CLASSIFIER,),
                 "ELECTRA's classifier of sequences has a GELU where BERT's pooler has tanh"),
            Name(r"sequence_summary\.", None, (CLASSIFIER,),
                 "ELECTRA's multiple choice has a GELU where BERT's pooler has tanh"),
        ),
        defaults={
            "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        has_pooler=False,
        prediction_act="gelu",
    ),
}  # fmt: skip

UNLIKE = {
    "albert": "its layers share their weights, and its word vectors are narrower than its layers",
    "big_bird": "its attention is sparse",
    "deberta": "its attention reads relative positions",
    "deberta-v2": "its attention reads relative positions",
    "gpt2": "it reads from left to right",
    "longformer": "its attention is sparse",
    "mobilebert": "its layers have bottlenecks",
    "modernbert": "it rotates positions into attention and normalises before each block",
    "mpnet": "its attention adds a bias for relative positions",
    "roformer": "it rotates positions into attention",
    "t5": "it is an encoder and a decoder with relative positions",
    "xlnet": "its attention reads relative positions",
}

# Google's names become Hugging Face's by these replacements, one after the other. A head at the
# top is run_classifier's.
_GOOGLE = (
    (r"^output_(?=weights$|bias$)", "classifier/output_"),
    (r"^cls/squad/", "qa_outputs/"),
    (r"/layer_(\d+)/", r"/layer/\1/"),
    (r"_embeddings$", "_embeddings/weight"),
    (r"/(kernel|gamma|output_weights)$", "/weight"),
    (r"/(beta|output_bias)$", "/bias"),
    (r"/", "."),
)


def bert_config(values: Any) -> tuple[Family, BertConfig]:
    """The family that a parsed ``config.json`` names, and the BERT that it describes.

    Raises:
        TypeError, ValueError: the message names the field.
    """
    model_type = values.get("model_type", "bert") if isinstance(values, dict) else "bert"
    if model_type == "bert":
        return BERT, BertConfig.from_dict(values)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = UNLIKE.get(model_type) if isinstance(model_type, str) else None
        raise ValueError(
            f"model_type: expected one of {', '.join(FAMILIES)}, got {short(model_type)}: "
            f"{reason or 'it is not known to compute what BERT computes'}"
        )
    family = FAMILIES[model_type]
    values = {family.fields.get(name, name): value for name, value in values.items()}
    values = {**family.defaults, **values, "model_type": "bert"}
    if not family.has_token_types:
        values["type_vocab_size"] = 1
    config = BertConfig.from_dict(values)
    config.extra.pop("embedding_size", None)  # the hidden_size, as was checked
    if family.positions_after_padding:
        if config.pad_token_id is None:
            raise ValueError("pad_token_id: expected an integer, which positions start from")
        config = config.replace(max_position_embeddings=config.max_position_embeddings
                                - config.pad_token_id - 1)  # fmt: skip
    return family, config


def as_config(config: Any) -> tuple[Family, BertConfig]:
    """A config of ours as it is, and transformers' as the BERT that it describes.

    Raises:
        TypeError: it is neither.
        TypeError, ValueError: transformers' describes what no BERT of ours is.
    """
    if isinstance(config, BertConfig):
        return BERT, config
    if isinstance(getattr(config, "model_type", None), str) and hasattr(config, "to_dict"):
        return bert_config(config.to_dict())
    raise TypeError(f"config: expected a BertConfig, got {type(config).__name__}")


def bert_names(
    file: Path, family: Family, stored: dict[str, Tensor], parts: set[str]
) -> dict[str, str | None]:
    """What BERT calls the stored weights, for a model with these ``parts``; None leaves one out.

    Raises:
        CheckpointError: a part of the model is not BERT's in this family.
    """
    names: dict[str, str | None] = {}
    for name in stored:
        names[name] = name
        for rule in family.names:
            if re.match(rule.stored, name):
                wanted = parts.issuperset(rule.parts)
                if wanted and rule.unlike:
                    raise CheckpointError(
                        f"{file}: expected a head of BERT, got {name}: {rule.unlike}"
                    )
                names[name] = (
                    re.sub(f"^{rule.stored}", rule.bert, name) if wanted and rule.bert else None
                )
                break
    # A pooler that a sequence classifier stores besides its own dense layer is not used.
    taken = {new for name, new in names.items() if new and name.startswith(CLASSIFIER)}
    for name, new in names.items():
        if new in taken and not name.startswith(CLASSIFIER):
            names[name] = None
    return names


def possible_names(family: Family, stored: Iterable[str]) -> set[str]:
    """What the stored weights may be in BERT, whichever parts a model has."""
    names = set(stored)
    for name in stored:
        for rule in family.names:
            if rule.bert and re.match(rule.stored, name):
                names.add(re.sub(f"^{rule.stored}", rule.bert, name))
    return names


def google_name(variable: str) -> str:
    """What Hugging Face calls a variable of Google's code."""
    for pattern, replacement in _GOOGLE:
        variable = re.sub(pattern, replacement, variable)
    return variable
