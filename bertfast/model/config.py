"""The shape and the habits of a BERT, read from and written to Hugging Face's ``config.json``."""

import json
import operator
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bertfast.errors import CheckpointError, shown

# Hugging Face's names for the GELU by erf and for its approximation by tanh.
ERF = ("gelu", "gelu_python")
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
ACTIVATIONS = (*ERF, *TANH, "relu")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Bounds that no BERT comes near; beyond them a config.json is damaged or hostile, and is refused
# before anything is allocated. The parameter count bounds every product of sizes.
MAX_PARAMETERS = 2**34
MAX_LAYERS = 1024
MAX_LABELS = 10**6
MAX_HEAD_SIZE = 256
MAX_JSON_BYTES = 2**26

_LAYER_NORM = ("layer_norm", "layernorm", "LayerNorm", None)

# Features of Hugging Face's BERT, and of models that are written as if they were one, that compute
# something else than this package does, each with the values that leave it off. Reading over them
# silently would give wrong outputs. Keys that are in none of these lists are notes.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "torchscript": (False, None),
    # Which tokens are attended to, and how.
    **dict.fromkeys(
        ("is_causal", "causal", "use_sliding_window", "relative_attention", "rotary_value",
         "use_rotary_embeddings", "use_rope", "alibi", "use_alibi", "use_qk_norm", "qk_norm",
         "qk_layernorm", "scale_attn_by_inverse_layer_idx"), (False, None),
    ),
    **dict.fromkeys(
        ("sliding_window", "attention_window", "local_attention", "global_attn_every_n_layers",
         "rope_theta", "rope_scaling", "rope_parameters", "alibi_starting_size",
         "attn_logit_softcapping"), (None,),
    ),
    **dict.fromkeys(("rotary_emb_fraction", "rotary_pct"), (0, None)),
    "attention_type": ("original_full", None),
    "scale_attn_weights": (True, None),
    # What a layer is made of.
    **dict.fromkeys(("norm_type", "layer_norm_type", "normalization_type"), _LAYER_NORM),
    **dict.fromkeys(
        ("use_rms_norm", "prenorm", "pre_norm", "norm_first", "normalize_before",
         "encoder_normalize_before", "do_layer_norm_before", "parallel_block", "parallel_attn",
         "parallel_attention", "use_parallel_residual", "use_bottleneck", "trigram_input",
         "token_dropout"), (False, None),
    ),
    **dict.fromkeys(
        ("qkv_proj_bias", "attention_bias", "mlp_bias", "mlp_fc1_bias", "mlp_fc2_bias",
         "use_bias"), (True, None),
    ),
    "activation_function": ("gelu", None),
    "feed_forward_type": ("original", None),
    **dict.fromkeys(("num_experts", "moe_every_n_layers", "num_hidden_groups"), (0, None)),
    # A model of its authors' own code; see _check_extra.
    "auto_map": ({}, None),
}  # fmt: skip

# Other models have these apart from the attribute that is named; in a BERT they are the same.
SAME = {
    "embedding_size": ("hidden_size", "no projection between its word vectors and its layers"),
    "num_key_value_heads": ("num_attention_heads", "keys and values of its own for each head"),
    "head_dim": ("head_size", "heads that together are as wide as a layer"),
    "layer_norm_epsilon": ("layer_norm_eps", "one epsilon"),
}

# The bounds of fields that are numbers.
INTEGERS: dict[str, tuple[int, int | None]] = {
    "vocab_size": (1, None),
    "hidden_size": (1, None),
    "num_hidden_layers": (0, MAX_LAYERS),
    "num_attention_heads": (1, None),
    "intermediate_size": (1, None),
    "max_position_embeddings": (1, None),
    "type_vocab_size": (1, None),
    "num_labels": (1, MAX_LABELS),
}
NUMBERS = {
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "classifier_dropout": (0.0, 1.0),
    "initializer_range": (0.0, sys.float_info.max),
    "layer_norm_eps": (0.0, 1.0),
}
LABELS = ("num_labels", "id2label", "label2id")

# What a model returns by itself. ``config.json`` has them where somebody chose otherwise.
RETURNED = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


@dataclass
class BertConfig:
    """Everything that fixes a BERT's shape and arithmetic; field names are Hugging Face's.

    Args:
        vocab_size: rows of the word table.
        hidden_size: width of a token; a multiple of ``num_attention_heads``.
        num_hidden_layers: encoder layers, 0 or more.
        num_attention_heads: heads per layer; each is ``hidden_size / heads`` wide, 256 at most.
        intermediate_size: width inside the feed-forward block.
        hidden_act: ``gelu`` and ``gelu_python`` (erf), ``gelu_new``, ``gelu_pytorch_tanh``,
            ``gelu_fast`` and ``gelu_python_tanh`` (tanh), or ``relu``.
        hidden_dropout_prob: dropout after the embedding and on both residual branches.
        attention_probs_dropout_prob: dropout on the attention probabilities.
        max_position_embeddings: rows of the position table, the longest sequence.
        type_vocab_size: rows of the token-type table.
        initializer_range: standard deviation of freshly drawn weights.
        layer_norm_eps: added to the variance in every LayerNorm.
        pad_token_id: the word whose row gets no gradient; None for no such word.
        classifier_dropout: dropout before a classifier; None takes ``hidden_dropout_prob``.
        tie_word_embeddings: the masked-LM decoder shares the word table.
        num_labels: outputs of a classifier; None takes it from ``id2label``, or 2. Where it is
            given, or assigned later, and is not the number of names, these are made up anew.
        id2label, label2id: names of the outputs; made up as ``LABEL_0`` … when both are missing.
            ``label2id`` is the inverse of ``id2label``, which has the last word where both are
            given. Assigning one changes the others along.
        problem_type: the loss of sequence classification: ``regression``,
            ``single_label_classification``, ``multi_label_classification``; None decides by the
            number of labels and their dtype.
        output_hidden_states, output_attentions, return_dict: what a model returns where the call
            does not say; as arguments of ``BertModel.forward``.
        extra: what else ``config.json`` held, kept so that it is written back: notes, which
            change nothing. What is known to change a model's outputs is refused.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, a feature this package does not have, or sizes that
            no machine holds.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    # None only until __post_init__ has settled them.
    num_labels: int = None  # type: ignore[assignment]
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    model_type = "bert"

    def __post_init__(self) -> None:
        self._name_labels(self.num_labels, self.id2label, self.label2id)
        for f in fields(self):
            if f.name not in LABELS:
                setattr(self, f.name, getattr(self, f.name))
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        # Fields are set for the first time before they are checked; ``extra`` is the last of them.
        if "extra" in self.__dict__ or name in UNSUPPORTED:
            value = RETURNED.get(name) if value is None and name in RETURNED else value
            # Before anything is stored, so that what is refused leaves the config as it was.
            _check_field(name, value)
            if name in LABELS:
                self._assign_labels(name, value)
                return
            value = float(value) if name in NUMBERS and value is not None else value
        super().__setattr__(name, value)

    def _assign_labels(self, name: str, value: Any) -> None:
        """Any of the three, with the other two along."""
        if name != "num_labels":
            self._name_labels(None, _label_names(name, value), None)
        elif value != len(self.id2label):
            self._name_labels(value, None, None)

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def num_parameters(self) -> int:
        """How many parameters an encoder with pooler, masked-LM head and classifier has."""
        h, i = self.hidden_size, self.intermediate_size
        layer = 4 * h * h + 2 * h * i + 9 * h + i
        tables = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        decoder = 0 if self.tie_word_embeddings else self.vocab_size * h
        heads = 2 * (h * h + h) + self.vocab_size + (h + 1) * self.num_labels
        return tables * h + self.num_hidden_layers * layer + decoder + heads + 4 * h

    def validate(self) -> None:
        """Check every field; models call it again, since fields may be assigned.

        Raises:
            TypeError, ValueError: as the class says; the message names the field.
        """
        for f in fields(self):
            _check_field(f.name, getattr(self, f.name))
        if self.pad_token_id is not None:
            _integer("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads="
                f"{self.num_attention_heads}, got {self.hidden_size}"
            )
        if self.head_size > MAX_HEAD_SIZE:
            raise ValueError(
                f"num_attention_heads: expected heads at most {MAX_HEAD_SIZE} wide, got "
                f"hidden_size {self.hidden_size} / {self.num_attention_heads} = {self.head_size}"
            )
        for name, (field_name, why) in SAME.items():
            value, expected = self.extra.get(name), getattr(self, field_name)
            if value is not None and value != expected:
                raise ValueError(
                    f"{name}: expected {expected} as {field_name}, got {shown(value)}: BERT has "
                    f"{why}"
                )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ValueError(
                f"config: its sizes make {self.num_parameters():,} parameters, more than the "
                f"{MAX_PARAMETERS:,} this package accepts: hidden_size={self.hidden_size}, "
                f"num_hidden_layers={self.num_hidden_layers}, "
                f"intermediate_size={self.intermediate_size}, vocab_size={self.vocab_size}, "
                f"max_position_embeddings={self.max_position_embeddings}, "
                f"type_vocab_size={self.type_vocab_size}, num_labels={self.num_labels}"
            )

    def _name_labels(self, num_labels: Any, id2label: Any, label2id: Any) -> None:
        """Settle the three from whichever of them were given."""
        if label2id is not None and not isinstance(label2id, dict):
            raise TypeError(f"label2id: expected an object, got {shown(label2id)}")
        names = None
        if id2label is not None:
            names = _label_names("id2label", id2label)
        elif label2id and num_labels in (None, len(label2id)):
            names = _label_names("label2id", label2id)
        # An explicit number has the last word over names that a file has from an older head.
        if names is None or num_labels not in (None, len(names)):
            count = 2 if num_labels is None else num_labels
            # Checked before names are made up, which takes memory in proportion to it.
            _check_field("num_labels", count)
            names = {i: f"LABEL_{i}" for i in range(count)}
        ids = {name: i for i, name in names.items()}
        self.__dict__.update(num_labels=len(names), id2label=names, label2id=ids)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """Make a config from a parsed ``config.json``; unknown keys go to :attr:`extra`.

        Raises:
            TypeError, ValueError: as the class says.
        """
        if not isinstance(values, dict):
            raise TypeError(f"config: expected an object of names and values, got {shown(values)}")
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type: expected 'bert', got {shown(model_type)}")
        if "use_return_dict" in values:  # what older files call it
            values.setdefault("return_dict", values.pop("use_return_dict"))
        names = {f.name for f in fields(cls)} - {"extra"}
        known = {name: values.pop(name) for name in list(values) if name in names}
        return cls(**known, extra=values)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; :meth:`from_dict` gives an equal config back."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        extra = known.pop("extra")
        # As in Hugging Face's files, the number of labels is the number of their names.
        known.pop("num_labels")
        for name, default in RETURNED.items():
            if known[name] is default:
                known.pop(name)
        known["id2label"] = {str(i): name for i, name in self.id2label.items()}
        known["label2id"] = dict(self.label2id)
        return {**extra, **known, "model_type": self.model_type}

    def replace(self, **changes: Any) -> "BertConfig":
        """A checked copy with some fields changed; a new ``num_labels`` renames the labels."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["extra"] = dict(self.extra)
        if not changes.keys().isdisjoint(LABELS):
            values.update(dict.fromkeys(LABELS))
        for name in changes:
            if name not in values:
                raise TypeError(f"{name}: expected the name of a config field")
        return type(self)(**{**values, **changes})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "BertConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: the file is missing, is not JSON, or does not describe a BERT that
                this package can build; the message names the file and what was wrong.
        """
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``config.json`` at ``path``: all of it or, if that fails, none."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file of a checkpoint; whatever is wrong with it is a ``CheckpointError``."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{name}: expected a JSON file, but: {reason}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{name}: expected at most {MAX_JSON_BYTES} bytes of JSON, got more")
    try:
        return json.loads(data.decode("utf-8"))
    # A deeply nested file ends in RecursionError, which is no ValueError.
    except (ValueError, RecursionError) as error:
        start = data[:40].decode("utf-8", "replace")
        raise CheckpointError(
            f"{name}: expected JSON, got {len(data)} bytes starting {start!r} ({error})"
        ) from error


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    wanted = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {wanted}, got {shown(value)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {wanted}, got {value if value < 10**20 else 'more'}")
    if value > MAX_PARAMETERS:
        raise ValueError(f"{name}: expected at most {MAX_PARAMETERS:,}, got more")


def _number(name: str, value: Any, low: float, high: float) -> None:
    wanted = f"a number from {low} to {high}" if high <= 1 else f"a finite number >= {low}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {wanted}, got {shown(value)}")
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name}: expected {wanted}, got {shown(value)}")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")


def _label_names(field: str, given: Any) -> dict[int, str]:
    """The names in the order of their ids, from ``id2label`` or from ``label2id``."""
    if not isinstance(given, dict) or not given:
        raise TypeError(f"{field}: expected an object of label names, got {shown(given)}")
    if len(given) > MAX_LABELS:
        raise ValueError(f"{field}: expected at most {MAX_LABELS} labels, got {len(given)}")
    where = "keys" if field == "id2label" else "values"
    names: dict[int, str] = {}
    for key, value in given.items():
        i, label = (key, value) if field == "id2label" else (value, key)
        try:
            # JSON turns integer keys into strings; this turns them back.
            names[int(i) if isinstance(i, str) else operator.index(i)] = str(label)
        except (TypeError, ValueError):
            raise ValueError(f"{field}: expected integers as {where}, got {shown(i)}") from None
    if sorted(names) != list(range(len(given))):
        found = list(given) if field == "id2label" else list(given.values())
        raise ValueError(f"{field}: expected the {where} 0 to {len(given) - 1}, got {shown(found)}")
    return dict(sorted(names.items()))


def _check_field(name: str, value: Any) -> None:
    """Check what can be said of one field alone."""
    if name in INTEGERS:
        _integer(name, value, *INTEGERS[name])
    elif name in NUMBERS and (value is not None or name != "classifier_dropout"):
        _number(name, value, *NUMBERS[name])
    elif name in ("tie_word_embeddings", *RETURNED):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected true or false, got {shown(value)}")
    elif name == "pad_token_id" and value is not None:
        _integer(name, value, 0)
    elif name == "hidden_act":
        _one_of(name, value, ACTIVATIONS)
    elif name == "problem_type" and value is not None:
        _one_of(name, value, PROBLEM_TYPES)
    elif name == "extra":
        _check_extra(value)
    elif name in UNSUPPORTED:
        _check_extra({name: value})


def _check_extra(extra: Any) -> None:
    if not isinstance(extra, dict):
        raise TypeError(f"extra: expected a dict, got {shown(extra)}")
    for name, off in UNSUPPORTED.items():
        value = extra.get(name)
        if name == "auto_map" and isinstance(value, dict):
            # A tokenizer's or a config's class does not compute.
            value = {key: code for key, code in value.items() if str(key).startswith("AutoModel")}
        if not any(value is v or value == v for v in off):
            expected = " or ".join(repr(value) for value in off)
            raise ValueError(
                f"{name}: expected {expected}, got {shown(value)}; "
                "bertfast does not have this feature"
            )
