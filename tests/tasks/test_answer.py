"""Answers against every span of every window, scored one by one from transformers' logits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertfast.tasks import Answer
from bertfast.tasks.answer import best_spans

from .conftest import LENGTH, TEXTS

QUESTION = "what do names refer to?"
CONTEXTS = [TEXTS[3], TEXTS[1], TEXTS[4], TEXTS[0]]


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("BertForQuestionAnswering")


def every_span(model, tokenizer, question, context, *, length, stride, longest):
    """{(start, end) in characters: the best logit}, and the least score of no answer."""
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=length, stride=stride,
        return_overflowing_tokens=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    windows = len(encoded.pop("overflow_to_sample_mapping"))
    with torch.no_grad():
        out = model(**encoded)
    whole = tokenizer(context, add_special_tokens=False)
    spans, null = {}, math.inf
    for w in range(windows):
        start, end = out.start_logits[w], out.end_logits[w]
        null = min(null, (start[0] + end[0]).item())
        mine = [i for i, s in enumerate(encoded.sequence_ids(w)) if s == 1]
        words = encoded.word_ids(w)
        for i in mine:
            for j in mine:
                if i <= j < i + longest:
                    # Grown to the words that the ends lie in.
                    key = (whole.word_to_chars(words[i]).start, whole.word_to_chars(words[j]).end)
                    score = (start[i] + end[j]).item()
                    spans[key] = max(score, spans.get(key, -math.inf))
    return spans, null, windows


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("longest", [1, 5, 30])
def test_answers_are_the_best_spans_of_all_windows(context, longest, folder, theirs) -> None:
    model, tokenizer = theirs(folder, "BertForQuestionAnswering")
    options = {"length": LENGTH, "stride": 10, "longest": longest}
    spans, null, windows = every_span(model, tokenizer, QUESTION, context, **options)
    assert windows > 1 or context is not TEXTS[3]
    answer = Answer.from_pretrained(folder, stride=10, max_answer_length=longest, n_best=200)
    found = answer(QUESTION, context, top_k=5)
    ranked = sorted(spans.items(), key=lambda item: -item[1])
    expected = [bounds for bounds, _ in ranked[:5]]
    assert [(candidate.start, candidate.end) for candidate in found.candidates] == expected
    assert found.null_difference == pytest.approx(null - ranked[0][1], rel=1e-3, abs=1e-4)
    assert found.best == found.candidates[0]
    for candidate in found.candidates:
        assert candidate.text == context[candidate.start : candidate.end]
    scores = [candidate.score for candidate in found.candidates]
    assert scores == sorted(scores, reverse=True)
    for a, b in itertools.pairwise(found.candidates):
        difference = spans[a.start, a.end] - spans[b.start, b.end]
        assert math.log(a.score / b.score) == pytest.approx(difference, abs=1e-3)


def test_no_answer(folder, theirs) -> None:
    model, tokenizer = theirs(folder, "BertForQuestionAnswering")
    spans, null, _ = every_span(
        model, tokenizer, QUESTION, TEXTS[1], length=LENGTH, stride=10, longest=30
    )
    difference = null - max(spans.values())
    options = {"may_be_unanswerable": True, "n_best": 200}
    below = Answer.from_pretrained(folder, null_threshold=difference - 0.01, **options)
    above = Answer.from_pretrained(folder, null_threshold=difference + 0.01, **options)
    assert below(QUESTION, TEXTS[1]).best is None
    found = above(QUESTION, TEXTS[1], top_k=200)
    assert found.best == found.candidates[0] == below(QUESTION, TEXTS[1]).candidates[0]
    assert found.null_difference == pytest.approx(difference, abs=1e-4)
    assert found.no_answer + sum(c.score for c in found.candidates) == pytest.approx(1)
    assert math.log(found.no_answer / found.best.score) == pytest.approx(difference, abs=1e-3)
    certain = Answer.from_pretrained(folder, n_best=200)(QUESTION, TEXTS[1], top_k=200)
    assert certain.no_answer == 0
    assert sum(c.score for c in certain.candidates) == pytest.approx(1)


def test_an_empty_context_has_no_answer(folder) -> None:
    for options in ({}, {"may_be_unanswerable": True}):
        found = Answer.from_pretrained(folder, **options)(QUESTION, "")
        assert found == (None, [], 1.0, math.inf)


def test_truncation_reads_the_first_window_only(folder) -> None:
    words = " ".join(["it", "is"] * 40)
    short = Answer.from_pretrained(folder, long="truncate", n_best=10**4)
    room = LENGTH - 3 - len(short.tokenizer.encode(QUESTION, add_special_tokens=False).ids)
    found = short(QUESTION, words, top_k=10**4)
    assert max(c.end for c in found.candidates) == len(" ".join(["it", "is"] * 40)[: 3 * room - 1])
    assert Answer.from_pretrained(folder, n_best=10**4)(QUESTION, words, 10**4).candidates[0]


def test_a_long_question_is_cut(folder) -> None:
    question = "it is " * 50
    whole = Answer.from_pretrained(folder, max_question_length=12)
    assert whole(question, TEXTS[1]) == whole("it is " * 6, TEXTS[1])
    # Half of a row, if nothing is said.
    default = Answer.from_pretrained(folder)
    assert default.max_question_length == (LENGTH - 3) // 2
    assert default(question, TEXTS[1]).best is not None


@given(st.integers(0, 12), st.integers(1, 14), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_best_spans_are_the_best_of_all(tokens, longest, count, seed) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers, so that there are ties.
    start, end = rng.integers(0, 4, (2, tokens)).astype(np.float32)
    every = [
        (i, j, float(start[i] + end[j]))
        for i in range(tokens)
        for j in range(i, min(i + longest, tokens))
    ]
    found = best_spans(start, end, longest, count)
    assert set(found) <= set(every)
    assert len(set(found)) == len(found) == min(count, len(every))
    expected = sorted((score for _, _, score in every), reverse=True)[:count]
    assert [score for _, _, score in found] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_answer_length": 0}, "max_answer_length: expected 1 to"),
        ({"max_question_length": LENGTH - 3}, "max_question_length: expected 1 to 44"),
        ({"n_best": 0}, "n_best: expected 1 to"),
        ({"null_threshold": math.nan}, "null_threshold: expected a finite number, got nan"),
    ],
)
def test_refuses_options(options, message, folder) -> None:
    with pytest.raises(ValueError, match=message):
        Answer.from_pretrained(folder, **options)


def test_refuses_more_candidates_than_it_keeps(folder) -> None:
    with pytest.raises(ValueError, match=r"top_k: expected 1 to 20 \(n_best\), got 21"):
        Answer.from_pretrained(folder)("a", "b", top_k=21)
