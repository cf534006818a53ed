"""torch's default dtype and default device are the caller's, and change no prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bertfast import tasks, testing

from .conftest import TEXTS

LONG = TEXTS[3]
MASKED = ["Names [MASK] to objects.", LONG + " [MASK] " + LONG]


def fill_mask(make: Callable[..., Path]) -> Any:
    task = tasks.FillMask.from_pretrained(make("BertForMaskedLM"))
    return task.many(MASKED), task.many([])


def next_sentence(make: Callable[..., Path]) -> Any:
    task = tasks.NextSentence.from_pretrained(make("BertForNextSentencePrediction"))
    return task.many([(TEXTS[0], TEXTS[1]), (LONG, TEXTS[0])]), task.many([])


def embed(pooling: str) -> Callable[..., Any]:
    def run(make: Callable[..., Path]) -> Any:
        task = tasks.Embed.from_pretrained(
            make("BertModel"), pooling=pooling, long="window", layers=[1, -1]
        )
        return task.many(TEXTS), task.many([]), task(LONG)

    return run


def classify(make: Callable[..., Path]) -> Any:
    task = tasks.Classify.from_pretrained(
        make("BertForSequenceClassification", num_labels=3), long="window"
    )
    return task.many(TEXTS), task.many([]), task.scores(TEXTS), task.scores([])


def tag(make: Callable[..., Path]) -> Any:
    task = tasks.Tag.from_pretrained(make("BertForTokenClassification", num_labels=3))
    return task.many(TEXTS), task.many([])


def answer(make: Callable[..., Path]) -> Any:
    task = tasks.Answer.from_pretrained(make("BertForQuestionAnswering", num_labels=2))
    return task.many([("What is computed?", LONG), ("Who?", TEXTS[0])]), task.many([])


RUNS = {
    "fill_mask": fill_mask,
    "next_sentence": next_sentence,
    **{f"embed-{pooling}": embed(pooling) for pooling in ("mean", "max", "cls")},
    "classify": classify,
    "tag": tag,
    "answer": answer,
}


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """What sets a default: a dtype, or the device where what is made without one is lost."""
    before = torch.get_default_dtype()

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        alike = (found.dtype, found.device) == (expected.dtype, expected.device)
        return alike and torch.equal(found, expected)
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_task_under_another_default(
    run: Callable[..., Any], defaults: Callable[[], None], make_model: Callable[..., Path]
) -> None:
    expected = run(make_model)  # which makes the directories, too
    defaults()
    assert same(run(make_model), expected)


@pytest.mark.parametrize(
    "case",
    [
        testing.layernorm_case(3, 8, name="sliced", dropout_p=0.1, layout="sliced"),
        testing.gelu_case(3, 8, name="misaligned", layout="misaligned", upstream="transposed"),
        testing.embedding_case(5, 8, name="plain"),
        testing.attention_case([3, 2], 1, 16, name="plain", dropout_p=0.1),
        testing.cross_entropy_case(5, 8, 11, name="plain"),
    ],
    ids=str,
)
def test_a_gate_under_another_default(case: testing.Case, defaults: Callable[[], None]) -> None:
    defaults()
    testing._expected.cache_clear()  # else what was computed before the change
    testing.run_gate(case, torch.float32, "cpu")
