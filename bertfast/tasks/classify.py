"""Classify texts, and score pairs of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertfast.model.config import BertConfig
from bertfast.model.heads import BertForSequenceClassification
from bertfast.tasks.batches import Row, finite, token_ids
from bertfast.tasks.modules import MODEL_FILE, read_cross_encoder
from bertfast.tasks.task import Done, Task, check_count, check_pair, check_text

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
# What a cross-encoder of sentence-transformers puts on its logits, by the class's name.
ACTIVATIONS = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}

Texts = str | tuple[str, str]


class Label(NamedTuple):
    """A class and its score: a probability, or for regression the value itself."""

    label: str
    score: float


class Classify(Task[Texts, Tensor]):
    """``Classify(model, tokenizer)("A fine film.")``, or of a pair ``(question, answer)``.

    ``model``: a ``BertForSequenceClassification``. With one output it scores: pairs, for a
    cross-encoder. Other arguments as in :class:`~bertfast.tasks.task.Task`. ``long="window"``
    averages the logits of a long text's windows; of a pair that is too long, the second text is cut
    to windows beside the first one, of which at most half a row is kept.

    Args:
        function: from logits to scores: ``"softmax"`` for one class of several, ``"sigmoid"`` for
            classes that do not exclude each other and for one output, ``"none"`` for regression.
            None goes by ``config.problem_type`` and the number of labels, as in transformers, or by
            the activation that a cross-encoder's ``config.json`` names.

    Raises:
        ValueError: an unknown function.
    """

    models = (BertForSequenceClassification,)
    architectures = ("ForSequenceClassification",)

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Tokenizer,
        *,
        function: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.function = _function_of(self._module.config) if function is None else function
        if self.function not in FUNCTIONS:
            raise ValueError(f"function: expected one of {', '.join(FUNCTIONS)}, got {function!r}")

    def __call__(
        self, text: str, text_pair: str | None = None, top_k: int | None = None
    ) -> list[Label]:
        """The labels of a text, or of a pair, best first: all of them, or the ``top_k`` best.

        Raises TypeError for anything but strings; ValueError for a ``top_k`` outside 1..labels.
        """
        value = text if text_pair is None else (text, text_pair)
        return self._labels(self._one(value), top_k)

    def many(
        self, inputs: Sequence[Texts], top_k: int | None = None, *, progress: bool = False
    ) -> list[list[Label]]:
        """The labels of each input, in their order. An input is a text, or a tuple of two."""
        return [self._labels(scores, top_k) for scores in self._many(inputs, progress)]

    def scores(self, inputs: Sequence[Texts], *, progress: bool = False) -> Tensor:
        """The scores of each input, float32 ``(len(inputs), num_labels)``, in the labels' order."""
        found = self._many(inputs, progress)
        if found:
            return torch.stack(found)
        return torch.zeros(0, self._module.config.num_labels, dtype=torch.float32, device="cpu")

    def _labels(self, scores: Tensor, top_k: int | None) -> list[Label]:
        names = self._module.config.id2label
        count = len(scores) if top_k is None else check_count("top_k", top_k, len(scores), "labels")
        order = scores.sort(descending=True, stable=True).indices[:count].tolist()
        return [Label(names[i], scores[i].item()) for i in order]

    def _checked(self, index: int, value: Any) -> Texts:
        if isinstance(value, (tuple, list)):
            return check_pair(index, ("text", "text_pair"), value)
        return check_text(index, "text", value)

    def _results(self, inputs: Sequence[Texts], done: Done, /, **options: Any) -> list[Tensor]:
        pairs = [value if isinstance(value, tuple) else (value, None) for value in inputs]
        second = [text for _, text in pairs if text is not None]
        firsts = token_ids(self._encode([text for text, _ in pairs]))
        seconds = iter(token_ids(self._encode(second)))
        rows: list[Row] = []
        for owner, ((_, text_pair), ids) in enumerate(zip(pairs, firsts, strict=True)):
            texts = [ids] if text_pair is None else [ids, next(seconds)]
            rows += self._cut(owner, texts)
        logits = torch.stack(self._run(rows, self._read, done))
        if len(rows) > len(inputs):
            owners = logits.new_tensor([row.owner for row in rows], dtype=torch.int64)
            sums = logits.new_zeros(len(inputs), logits.shape[1]).index_add(0, owners, logits)
            logits = sums / owners.bincount(minlength=len(inputs)).unsqueeze(1)
        return list(FUNCTIONS[self.function](logits))

    def _cut(self, owner: int, texts: list[np.ndarray]) -> list[Row]:
        if len(texts) == 2 and self.long == "truncate":
            return [self._pair_row(owner, *texts)]
        room = self.max_length - (self.template.single, self.template.pair)[len(texts) - 1]
        kept = [ids[: max(room // 2, room - len(texts[-1]))] for ids in texts[:-1]]
        room -= sum(map(len, kept))
        return [
            self.template.row(owner, [*kept, texts[-1][first:end]], first)
            for first, end in self._windows(len(texts[-1]), room)
        ]

    @classmethod
    def _asked_for(cls, directory: Path, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        asked, lowercase = read_cross_encoder(directory)
        activation = asked.pop("activation", None)
        if activation is not None and given.get("function") is None:
            asked["function"] = _function_named(activation, MODEL_FILE)
        return asked, lowercase

    def _read(self, inputs: dict[str, Any], places: Sequence[int]) -> Sequence[Tensor]:
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        return finite(logits.float().cpu()).unbind()


def _function_of(config: BertConfig) -> str:
    about = config.extra.get("sentence_transformers")
    named = about.get("activation_fn") if isinstance(about, dict) else None
    named = named or config.extra.get("sbert_ce_default_activation_function")
    if isinstance(named, str):
        return _function_named(named, "config.json")
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def _function_named(activation: str, file: str) -> str:
    package, _, kind = activation.rpartition(".")
    if kind not in ACTIVATIONS or package.split(".")[0] != "torch":
        raise ValueError(
            f"function: {file} names {activation}; expected one of {', '.join(ACTIVATIONS)}, "
            f"or the argument"
        )
    return ACTIVATIONS[kind]
