"""Label the words of a text, and join labels to spans: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from bertfast.model.heads import BertForTokenClassification
from bertfast.tasks.batches import TextRows, finite, token_ids, trimmed, words_of
from bertfast.tasks.task import Done, Task

STRATEGIES = ("first", "mean", "max")
OUTSIDE = "O"


class Word(NamedTuple):
    """A word with its label: ``text[start:end]`` of the text, and a probability in [0, 1]."""

    text: str
    start: int
    end: int
    label: str
    score: float


class Span(NamedTuple):
    """Words in a row that carry one label: the label without B- or I-, ``text[start:end]`` of the
    text, and the mean of the words' scores."""

    label: str
    text: str
    start: int
    end: int
    score: float


class Tagged(NamedTuple):
    """What :class:`Tag` finds in a text: every word, and the spans that are not outside ("O")."""

    words: list[Word]
    spans: list[Span]


class Tag(Task[str, Tagged]):
    """``Tag(model, tokenizer)("Ada Lovelace lived in London.")``.

    ``model``: a ``BertForTokenClassification``. Words are the tokenizer's own: for BERT they end at
    white space and punctuation. Labels are read as BIO (IOB2): ``B-X`` begins a span, ``I-X`` goes
    on with one of the same X or else begins one; a label without such a prefix counts as ``I-``.
    Other arguments as in :class:`~bertfast.tasks.task.Task`; a long text is read in windows, and
    each word is labelled where it sees most of the text around it. With ``long="truncate"`` the
    words behind the cut are left out.

    Args:
        strategy: how a word of several pieces is labelled: by its ``"first"`` piece, by the
            ``"mean"`` of the pieces' probabilities, or by the piece with the ``"max"``imal one.

    Raises:
        ValueError: an unknown strategy.
    """

    pairs = False
    models = (BertForTokenClassification,)
    architectures = ("ForTokenClassification",)
    default_long = "window"
    with_offsets = True

    def __init__(
        self,
        model: BertForTokenClassification,
        tokenizer: Tokenizer,
        *,
        strategy: str = "first",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.strategy = strategy

    def __call__(self, text: str) -> Tagged:
        """The words and spans of a text. Raises TypeError for anything but a string."""
        return self._one(text)

    def many(self, texts: Sequence[str], *, progress: bool = False) -> list[Tagged]:
        """The words and spans of each text, in their order."""
        return self._many(texts, progress)

    def _results(self, texts: Sequence[str], done: Done, /, **options: Any) -> list[Tagged]:
        encodings = self._encode(texts)
        rows = self._rows(token_ids(encodings))
        rows_of: list[list[int]] = [[] for _ in texts]
        for i, row in enumerate(rows):
            rows_of[row.owner].append(i)

        def read(inputs: dict[str, Any], places: Sequence[int]) -> list[np.ndarray]:
            logits = finite(self.model(**inputs, return_dict=True).logits.float().cpu())
            probabilities = logits.softmax(-1).numpy()
            starts = inputs["cu_seqlens"].tolist()
            return [
                probabilities[start + rows[i].start :][: rows[i].size]
                for i, start in zip(places, starts, strict=False)
            ]

        found = self._run(rows, read, done)
        results = []
        for text, encoding, places in zip(texts, encodings, rows_of, strict=True):
            text_rows = TextRows([rows[i] for i in places])
            words = list(self._words(text, encoding, text_rows, [found[i] for i in places]))
            results.append(Tagged(words, join_words(text, words)))
        return results

    def _words(
        self, text: str, encoding: Encoding, text_rows: TextRows, found: Sequence[np.ndarray]
    ) -> Iterator[Word]:
        """The words, from the ``(tokens, labels)`` probabilities found in each row of the text."""
        offsets = encoding.offsets
        for first, last in words_of(encoding.word_ids):
            best = text_rows.best(first, last)
            if best is None:  # behind the cut
                return
            # A word of more pieces than windows share may end behind this one's end.
            row = text_rows.rows[best]
            scores = self._scores(found[best][first - row.first : last + 1 - row.first])
            label = int(scores.argmax())
            start, end = trimmed(text, offsets[first][0], offsets[last][1])
            if start == end:  # a word of white space, as RoBERTa's tokenizer makes them
                continue
            name = self._module.config.id2label[label]
            yield Word(text[start:end], start, end, name, float(scores[label]))

    def _scores(self, pieces: np.ndarray) -> np.ndarray:
        if self.strategy == "mean":
            return pieces.mean(0)
        return pieces[0 if self.strategy == "first" else pieces.max(1).argmax()]


def join_words(text: str, words: Sequence[Word]) -> list[Span]:
    """The spans that words' labels say, by BIO (IOB2)."""
    spans: list[Span] = []
    members: list[Word] = []

    def close() -> None:
        if members and _kind(members[0].label) != OUTSIDE:
            start, end = members[0].start, members[-1].end
            score = sum(word.score for word in members) / len(members)
            spans.append(Span(_kind(members[0].label), text[start:end], start, end, score))
        members.clear()

    for word in words:
        begins = word.label.startswith("B-")
        if members and (begins or _kind(word.label) != _kind(members[0].label)):
            close()
        members.append(word)
    close()
    return spans


def _kind(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
