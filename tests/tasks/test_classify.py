"""Labels and scores are those of transformers' pipeline; pairs, windows, other functions."""

import json
import shutil

import pytest
import torch

from bertfast.tasks import Classify, Label

from .conftest import TEXTS

HEADS = {
    "three classes": {"num_labels": 3},
    "several at once": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "a value": {"num_labels": 1, "problem_type": "regression"},
    "a score": {"num_labels": 1},
    "named": {"id2label": {0: "bad", 1: "good"}, "problem_type": "single_label_classification"},
}


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_those_of_the_pipeline(head, make_model, theirs) -> None:
    import transformers

    folder = make_model("BertForSequenceClassification", **HEADS[head])
    model, tokenizer = theirs(folder, "BertForSequenceClassification")
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    inputs = [*TEXTS, ("Names refer", "to objects."), (TEXTS[3], TEXTS[3])]
    asked = [x if isinstance(x, str) else {"text": x[0], "text_pair": x[1]} for x in inputs]
    expected = [pipeline(x, top_k=None, truncation=True) for x in asked]
    classify = Classify.from_pretrained(folder)
    found = classify.many(inputs)
    scores = classify.scores(inputs)
    assert scores.shape == (len(inputs), classify.model.config.num_labels)
    for ours, theirs_, row in zip(found, expected, scores, strict=True):
        assert [label.label for label in ours] == [entry["label"] for entry in theirs_]
        wanted = [entry["score"] for entry in theirs_]
        assert [label.score for label in ours] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert sorted(row.tolist(), reverse=True) == [label.score for label in ours]
    assert scores.std(0).min() > 1e-3  # else a constant would pass
    assert classify(*inputs[-2])[0].score == pytest.approx(found[-2][0].score, rel=1e-4)


def test_top_k(make_model) -> None:
    classify = Classify.from_pretrained(make_model("BertForSequenceClassification", num_labels=3))
    everything = classify("Names refer to objects.")
    assert everything == classify.many(["Names refer to objects."])[0]
    assert isinstance(everything[0], Label)
    assert classify("Names refer to objects.", top_k=2) == everything[:2]
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=r"top_k: expected 1 to 3 \(labels\), got"):
            classify("x", top_k=top_k)
    assert classify.scores([]).shape == (0, 3)


def test_windows_average_their_logits(make_model) -> None:
    folder = make_model("BertForSequenceClassification", num_labels=3)
    options = {"function": "none", "max_length": 22}
    window = Classify.from_pretrained(folder, long="window", stride=0, **options)
    short = Classify.from_pretrained(folder, **options)
    words = [f"{word} is" for word in ("it", "in", "of", "to", "as")] * 7  # one token a word
    cuts = [" ".join(words[i : i + 10]) for i in range(0, 35, 10)]
    expected = short.scores(cuts).mean(0, keepdim=True)
    torch.testing.assert_close(window.scores([" ".join(words)]), expected)
    # A pair: the first text takes half of the 19 tokens, the second is cut to the rest.
    first = "it is it is it is it is it is it is"
    cuts = [("it is it is it is it is it", " ".join(words[i : i + 5])) for i in range(0, 35, 5)]
    expected = short.scores(cuts).mean(0, keepdim=True)
    torch.testing.assert_close(window.scores([(first, " ".join(words))]), expected)
    # Where there is room for both, both are whole.
    pair = ("it is it is it is it is it is it", "in of")
    torch.testing.assert_close(window.scores([pair]), short.scores([pair]))


@pytest.mark.parametrize(
    ("key", "value", "function"),
    [
        ("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"}, "none"),
        ("sbert_ce_default_activation_function", "torch.nn.modules.activation.Sigmoid", "sigmoid"),
        ("sentence_transformers", {"version": "5"}, "sigmoid"),
        ("sentence_transformers", {"activation_fn": "my.module.Cubed"}, None),
    ],
)
def test_a_cross_encoder_says_its_activation(key, value, function, make_model, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("BertForSequenceClassification", num_labels=1), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    if function is None:
        with pytest.raises(ValueError, match=r"names my\.module\.Cubed; expected one of Identity"):
            Classify.from_pretrained(folder)
        assert Classify.from_pretrained(folder, function="none").function == "none"
        return
    classify = Classify.from_pretrained(folder)
    assert classify.function == function
    logit = Classify.from_pretrained(folder, function="none")("a", "b")[0].score
    expected = logit if function == "none" else torch.tensor(logit).sigmoid().item()
    assert classify("a", "b")[0].score == pytest.approx(expected, rel=1e-4)


def test_refuses_an_unknown_function(make_model) -> None:
    folder = make_model("BertForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match="function: expected one of softmax, sigmoid, none, got"):
        Classify.from_pretrained(folder, function="relu")
    with pytest.raises(TypeError, match="text_pair: expected a string, got int"):
        Classify.from_pretrained(folder)("a", 3)
