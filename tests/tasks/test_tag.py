"""Words and spans are those of transformers' pipeline; offsets, windows, BIO."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertfast.tasks import Span, Tag, Word
from bertfast.tasks.tag import join_words

from .conftest import TEXTS

NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "MISC"}
SHORT = [text for text in TEXTS if text and len(text) < 100]


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("BertForTokenClassification", id2label=NAMES)


@pytest.mark.parametrize(
    ("strategy", "name"), [("first", "first"), ("mean", "average"), ("max", "max")]
)
def test_spans_are_those_of_the_pipeline(strategy, name, folder, theirs) -> None:
    import transformers

    model, tokenizer = theirs(folder, "BertForTokenClassification")
    pipeline = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=name
    )
    tag = Tag.from_pretrained(folder, strategy=strategy)
    found = tag.many(SHORT)
    seen = 0
    for text, tagged in zip(SHORT, found, strict=True):
        expected = pipeline(text)
        assert [(span.label, span.start, span.end) for span in tagged.spans] == [
            (entity["entity_group"], entity["start"], entity["end"]) for entity in expected
        ]
        assert [span.score for span in tagged.spans] == pytest.approx(
            [float(entity["score"]) for entity in expected], rel=1e-3
        )
        for span in tagged.spans:
            assert span.text == text[span.start : span.end]
        seen += len(expected)
    assert seen > 10


@pytest.mark.parametrize("strategy", ["first", "mean", "max"])
def test_words_are_labelled_by_their_pieces(strategy, folder, theirs) -> None:
    model, tokenizer = theirs(folder, "BertForTokenClassification")
    text = SHORT[2]
    encoded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        pieces = model(**encoded).logits[0].softmax(-1).numpy()
    words = [i for i in encoded.word_ids() if i is not None]
    tagged = Tag.from_pretrained(folder, strategy=strategy)(text)
    assert len(tagged.words) == max(words) + 1
    assert "".join(word.text for word in tagged.words) == text.replace(" ", "")
    for i, word in enumerate(tagged.words):
        mine = pieces[1:-1][np.array(words) == i]
        scores = {
            "first": mine[0],
            "mean": mine.mean(0),
            "max": mine[np.unravel_index(mine.argmax(), mine.shape)[0]],
        }[strategy]
        assert word.label == NAMES[int(scores.argmax())]
        assert word.score == pytest.approx(float(scores.max()), rel=1e-4)
        assert text[word.start : word.end] == word.text
    assert any(np.sum(np.array(words) == i) > 1 for i in set(words))  # words of several pieces


def test_a_long_text_is_read_in_windows(folder) -> None:
    """Each word where it sees most of what is around it."""
    words = ["it", "in", "of", "to", "as", "is"] * 6  # one token each
    tag = Tag.from_pretrained(folder, max_length=12, stride=4)  # 0-9, 6-15, 12-21, 18-27, …
    tagged = tag(" ".join(words))
    assert [word.text for word in tagged.words] == words
    for first, inside in ((0, range(8)), (6, range(8, 14)), (12, range(14, 20))):
        window = tag(" ".join(words[first : first + 10]))
        for i in inside:
            assert tagged.words[i].label == window.words[i - first].label
            expected = window.words[i - first].score
            assert tagged.words[i].score == pytest.approx(expected, rel=1e-4)
    short = Tag.from_pretrained(folder, max_length=12, long="truncate")
    assert [word.text for word in short(" ".join(words)).words] == words[:10]


def test_a_word_longer_than_what_windows_share_is_still_one_word(folder) -> None:
    tag = Tag.from_pretrained(folder, max_length=8, stride=0)
    text = "it is incomprehensibilities of it"
    assert [word.text for word in tag(text).words] == text.split()


def test_no_words(folder) -> None:
    assert Tag.from_pretrained(folder).many(["", "  "]) == [([], []), ([], [])]


def test_refuses_an_unknown_strategy(folder) -> None:
    with pytest.raises(ValueError, match="strategy: expected one of first, mean, max, got 'last'"):
        Tag.from_pretrained(folder, strategy="last")


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("O O", ""),
        ("B-X I-X O", "X:0-2"),
        ("B-X B-X", "X:0-1 X:1-2"),
        ("I-X I-X", "X:0-2"),
        ("B-X I-Y", "X:0-1 Y:1-2"),
        ("B-X O I-X", "X:0-1 X:2-3"),
        ("N N V", "N:0-2 V:2-3"),
        ("N B-N I-N", "N:0-1 N:1-3"),
    ],
)
def test_bio(labels, spans) -> None:
    words = [
        Word(f"w{i}", 3 * i, 3 * i + 2, label, (i + 1) / 10)
        for i, label in enumerate(labels.split())
    ]
    text = " ".join(word.text for word in words)
    expected = []
    for span in spans.split():
        kind, _, bounds = span.partition(":")
        first, end = map(int, bounds.split("-"))
        inside = words[first:end]
        score = pytest.approx(np.mean([word.score for word in inside]))
        start, stop = inside[0].start, inside[-1].end
        expected.append(Span(kind, text[start:stop], start, stop, score))
    assert join_words(text, words) == expected


@given(st.lists(st.sampled_from(sorted(NAMES.values())), max_size=12))
def test_every_word_that_is_not_outside_is_in_one_span(labels) -> None:
    words = [Word("w", 2 * i, 2 * i + 1, label, 0.5) for i, label in enumerate(labels)]
    spans = join_words("w " * len(words), words)
    for word in words:
        holding = [span for span in spans if span.start <= word.start < span.end]
        assert len(holding) == (word.label != "O")
        if holding:
            assert holding[0].label == word.label.removeprefix("B-").removeprefix("I-")
