"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from bertfast.model.heads import BertForQuestionAnswering
from bertfast.tasks.batches import Row, finite, token_ids, trimmed, words_of
from bertfast.tasks.task import Done, Task, check_count, check_pair


class Found(NamedTuple):
    """An answer: ``context[start:end]``, and its probability among the candidates (and no answer,
    where that is one)."""

    text: str
    start: int
    end: int
    score: float


class Answered(NamedTuple):
    """What :class:`Answer` finds for a question.

    best: the answer, or None for no answer. candidates: the best spans, best first, whether or not
    there is an answer. no_answer: the probability that there is none, beside the candidates'.
    null_difference: the score of no answer minus the best span's, as SQuAD 2 thresholds it.
    """

    best: Found | None
    candidates: list[Found]
    no_answer: float
    null_difference: float


class _Candidate(NamedTuple):
    start: int
    end: int
    logit: float


class Answer(Task[tuple[str, str], Answered]):
    """``Answer(model, tokenizer)("Who lived in London?", "Ada Lovelace lived in London.")``.

    ``model``: a ``BertForQuestionAnswering``. The context is read in windows beside the whole
    question, and the spans of all windows are ranked together by their start's and their end's
    logit, as in SQuAD (Rajpurkar et al., 2016 and 2018; Devlin et al., "BERT", 2019, 4.2 and 4.3).
    No answer scores as the span of [CLS] alone does, in the window where it scores least. Answers
    are grown to whole words. Other arguments as in :class:`~bertfast.tasks.task.Task`;
    ``long="truncate"`` reads the first window only.

    Args:
        max_answer_length: tokens of an answer at most.
        max_question_length: tokens of a question that are kept; None is half of what there is room
            for, and at most 64.
        n_best: candidates of a window, and of all together.
        may_be_unanswerable: "no answer" is a candidate, for models trained on SQuAD 2.
        null_threshold: there is no answer if ``null_difference`` is above it.

    Raises:
        ValueError: an option out of range.
    """

    models = (BertForQuestionAnswering,)
    architectures = ("ForQuestionAnswering",)
    default_long = "window"
    with_offsets = True

    def __init__(
        self,
        model: BertForQuestionAnswering,
        tokenizer: Tokenizer,
        *,
        max_answer_length: int = 30,
        max_question_length: int | None = None,
        n_best: int = 20,
        may_be_unanswerable: bool = False,
        null_threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        room = self.max_length - self.template.pair
        self.max_answer_length = check_count(
            "max_answer_length", max_answer_length, 10**6, "tokens"
        )
        if max_question_length is None:
            max_question_length = min(64, max(room // 2, 1))
        self.max_question_length = check_count(
            "max_question_length", max_question_length, room - 1, "room beside a context"
        )
        self.n_best = check_count("n_best", n_best, 10**4, "candidates")
        self.may_be_unanswerable = bool(may_be_unanswerable)
        if not math.isfinite(null_threshold):
            raise ValueError(f"null_threshold: expected a finite number, got {null_threshold}")
        self.null_threshold = null_threshold

    def __call__(self, question: str, context: str, top_k: int = 1) -> Answered:
        """The answer, and the ``top_k`` best candidates (fewer if there are not so many).

        Raises TypeError for anything but strings; ValueError for an empty question or a ``top_k``
        outside 1..n_best.
        """
        return self._one((question, context), top_k=self._checked_top_k(top_k))

    def many(
        self, pairs: Sequence[tuple[str, str]], top_k: int = 1, *, progress: bool = False
    ) -> list[Answered]:
        """What a call gives for each (question, context), in their order."""
        return self._many(pairs, progress, top_k=self._checked_top_k(top_k))

    def _checked_top_k(self, top_k: int) -> int:
        return check_count("top_k", top_k, self.n_best, "n_best")

    def _checked(self, index: int, value: Any) -> tuple[str, str]:
        return check_pair(index, ("question", "context"), value)

    def _results(
        self, pairs: Sequence[tuple[str, str]], done: Done, /, **options: Any
    ) -> list[Answered]:
        questions = token_ids(self._encode([question for question, _ in pairs]))
        contexts = self._encode([context for _, context in pairs])
        words = [
            _word_bounds(text, context) for (_, text), context in zip(pairs, contexts, strict=True)
        ]
        rows: list[Row] = []
        for owner, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            rows += self._cut(owner, question, np.array(context.ids, dtype=np.int64))

        def read(inputs: dict[str, Any], places: Sequence[int]) -> list[Any]:
            out = self.model(**inputs, return_dict=True)
            logits = (out.start_logits, out.end_logits)
            start, end = (finite(x.float().cpu()).numpy() for x in logits)
            found = []
            for i, first in zip(places, inputs["cu_seqlens"].tolist(), strict=False):
                row, bounds = rows[i], words[rows[i].owner]
                tokens = slice(first + row.start, first + row.start + row.size)
                spans = best_spans(start[tokens], end[tokens], self.max_answer_length, self.n_best)
                candidates = [
                    _Candidate(bounds[row.first + a][0], bounds[row.first + b][1], logit)
                    for a, b, logit in spans
                    # RoBERTa's tokenizer makes words of white space.
                    if bounds[row.first + a][0] < bounds[row.first + b][1]
                ]
                # [CLS] is each row's first token.
                found.append((float(start[first] + end[first]), candidates))
            return found

        nulls = [math.inf] * len(pairs)
        candidates: list[list[_Candidate]] = [[] for _ in pairs]
        for row, (null, spans) in zip(rows, self._run(rows, read, done), strict=True):
            nulls[row.owner] = min(nulls[row.owner], null)
            candidates[row.owner] += spans
        return [
            self._answered(context, null, spans, options["top_k"])
            for (_, context), null, spans in zip(pairs, nulls, candidates, strict=True)
        ]

    def _cut(self, owner: int, question: np.ndarray, context: np.ndarray) -> list[Row]:
        question = question[: self.max_question_length]
        room = self.max_length - self.template.pair - len(question)
        return [
            self.template.row(owner, [question, context[first:end]], first)
            for first, end in self._windows(len(context), room)
        ]

    def _answered(
        self, context: str, null: float, spans: Sequence[_Candidate], top_k: int
    ) -> Answered:
        best: dict[tuple[int, int], float] = {}
        for start, end, logit in spans:  # windows overlap, so a span may come twice
            best[start, end] = max(logit, best.get((start, end), -math.inf))
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: self.n_best]
        logits = [logit for _, logit in ranked]
        counted = [null, *logits] if self.may_be_unanswerable or not ranked else logits
        highest = max(counted)
        total = sum(math.exp(logit - highest) for logit in counted)
        found = [
            Found(context[start:end], start, end, math.exp(logit - highest) / total)
            for (start, end), logit in ranked
        ]
        difference = null - logits[0] if ranked else math.inf
        none = not ranked or (self.may_be_unanswerable and difference > self.null_threshold)
        no_answer = 1.0 - sum(candidate.score for candidate in found)
        if len(counted) == len(logits):
            no_answer = 0.0
        return Answered(None if none else found[0], found[:top_k], max(no_answer, 0.0), difference)


def best_spans(
    start: np.ndarray, end: np.ndarray, longest: int, count: int
) -> list[tuple[int, int, float]]:
    """The ``count`` best spans of at most ``longest`` tokens by ``start[i] + end[j]``, i <= j:
    (i, j, that sum), best first."""
    tokens = len(start)
    width = min(longest, tokens)
    if not width:
        return []
    # Row i holds the ends i, i + 1, …: a band of the table of all pairs.
    padded = np.concatenate([end, np.full(width - 1, -np.inf, dtype=end.dtype)])
    scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    flat = scores.reshape(-1)
    count = min(count, flat.size)
    order = np.argpartition(-flat, count - 1)[:count]
    order = order[np.lexsort((order, -flat[order]))]
    found = []
    for place in order:
        i, length = divmod(int(place), width)
        if flat[place] > -np.inf:
            found.append((i, i + length, float(flat[place])))
    return found


def _word_bounds(text: str, context: Encoding) -> list[tuple[int, int]]:
    """For each token, where in the text the word that it is of starts and ends."""
    # Asked for once: each attribute of an encoding is a new list of all tokens.
    offsets, words = context.offsets, context.word_ids
    bounds: list[tuple[int, int]] = []
    for first, last in words_of(words):
        bounds += [trimmed(text, offsets[first][0], offsets[last][1])] * (last + 1 - first)
    return bounds
