"""Does the second text follow the first? What BERT learned from next-sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bertfast.model.heads import BertForNextSentencePrediction, BertForPreTraining
from bertfast.tasks.batches import finite, token_ids
from bertfast.tasks.task import Done, Task, check_pair


class NextSentence(Task[tuple[str, str], float]):
    """``NextSentence(model, tokenizer)("It was late.", "We went to bed.")``.

    ``model``: a ``BertForNextSentencePrediction`` or ``BertForPreTraining``. Other arguments as in
    :class:`~bertfast.tasks.task.Task`. Pairs that are too long are truncated, the longer text
    first; there are no windows.
    """

    models = (BertForNextSentencePrediction, BertForPreTraining)

    def __call__(self, first: str, second: str) -> float:
        """The probability, in [0, 1], that ``second`` follows ``first``.

        Raises TypeError for anything but strings.
        """
        return self._one((first, second))

    def many(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> list[float]:
        """The probability of each pair, in their order."""
        return self._many(pairs, progress)

    def _checked(self, index: int, value: Any) -> tuple[str, str]:
        return check_pair(index, ("first", "second"), value)

    def _results(
        self, pairs: Sequence[tuple[str, str]], done: Done, /, **options: Any
    ) -> list[float]:
        first, second = (token_ids(self._encode(texts)) for texts in zip(*pairs, strict=True))
        rows = [self._pair_row(i, *pair) for i, pair in enumerate(zip(first, second, strict=True))]
        return self._run(rows, self._read, done)

    def _read(self, inputs: dict[str, Any], places: Sequence[int]) -> list[float]:
        # Not through the whole model: a pre-training model would predict every word, too.
        pooled = self._module.bert(**inputs, return_dict=True).pooler_output
        logits = self._module.cls.seq_relationship(pooled)
        # Label 0 is the text that follows.
        probabilities: list[float] = finite(logits.float().cpu()).softmax(-1)[:, 0].tolist()
        return probabilities
