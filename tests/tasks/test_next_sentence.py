"""Next-sentence probabilities are transformers', of whole and of truncated pairs."""

import pytest
import torch

from bertfast.tasks import NextSentence

from .conftest import TEXTS

PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


@pytest.mark.parametrize("stored", ["BertForPreTraining", "BertForNextSentencePrediction"])
def test_probabilities_are_those_of_transformers(stored, make_model, theirs) -> None:
    folder = make_model(stored)
    found = NextSentence.from_pretrained(folder).many(PAIRS)
    model, tokenizer = theirs(folder, "BertForNextSentencePrediction")
    encoded = tokenizer(
        [a for a, _ in PAIRS], [b for _, b in PAIRS],
        truncation=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = model(**encoded).logits.softmax(-1)[:, 0]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)
    assert max(found) - min(found) > 0.1  # else a constant would pass


def test_one_pair(make_model) -> None:
    task = NextSentence.from_pretrained(make_model("BertForPreTraining"))
    forth, back = task("It is late.", "Names"), task("Names", "It is late.")
    assert task.many([("It is late.", "Names"), ("Names", "It is late.")]) == pytest.approx(
        [forth, back], rel=1e-4
    )
    assert forth != pytest.approx(back, rel=1e-3)


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c"), None])
def test_refuses_what_is_no_pair(pair, make_model) -> None:
    task = NextSentence.from_pretrained(make_model("BertForPreTraining"))
    with pytest.raises(TypeError, match="first, second: expected a pair of strings"):
        task.many([pair])
    with pytest.raises(TypeError, match="second: expected a string, got int"):
        task("a", 3)
