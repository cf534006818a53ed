"""Vectors against transformers' hidden states, pooled one text at a time; a real model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import bertfast
from bertfast.errors import CheckpointError
from bertfast.tasks import Embed
from bertfast.tasks.embed import pool

from .conftest import LENGTH, TEXTS

POOLINGS = {
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
}


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("BertModel")


def hidden_states(theirs, folder, text):
    model, tokenizer = theirs(folder, "BertModel")
    encoded = tokenizer(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        return [h[0] for h in model(**encoded, output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", [(-1,), (0,), (1, 2), (-2, -1)])
def test_vectors_are_those_of_transformers(pooling, layers, folder, theirs) -> None:
    embed = Embed.from_pretrained(folder, pooling=pooling, layers=layers)
    found = embed.many(TEXTS)
    assert found.shape == (len(TEXTS), 24)
    assert found.dtype == torch.float32
    for vector, text in zip(found, TEXTS, strict=True):
        states = hidden_states(theirs, folder, text)
        chosen = sum(states[layer] for layer in layers) / len(layers)
        torch.testing.assert_close(vector, POOLINGS[pooling](chosen), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embed(text), vector, rtol=1e-4, atol=1e-4)


def test_cut_first_and_then_of_length_one(folder) -> None:
    plain = Embed.from_pretrained(folder).many(TEXTS)
    short = Embed.from_pretrained(folder, dimensions=7, normalize=True).many(TEXTS)
    torch.testing.assert_close(short, F.normalize(plain[:, :7]))
    assert Embed.from_pretrained(folder, dimensions=7).many([]).shape == (0, 7)
    prompted = Embed.from_pretrained(folder, prompt="Names: ")(TEXTS[0])
    torch.testing.assert_close(prompted, Embed.from_pretrained(folder)("Names: " + TEXTS[0]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_windows(pooling, folder) -> None:
    words = ["it", "in", "of", "to", "as", "is"] * 4  # one token each
    options = {"pooling": pooling, "max_length": 12}
    texts = ["Names refer.", " ".join(words), "", " ".join(words[:11])]
    found = Embed.from_pretrained(folder, long="window", **options).many(texts)
    one = Embed.from_pretrained(folder, **options)
    for vector, text in zip(found, texts, strict=True):
        cuts = [" ".join(text.split()[i : i + 10]) for i in range(0, max(len(text.split()), 1), 10)]
        windows = one.many(cuts)
        if pooling == "max":
            expected = windows.amax(0)
        else:
            tokens = torch.tensor([2.0 + len(cut.split()) for cut in cuts])
            if "Names" in text:
                tokens = torch.ones(1)
            weights = tokens if pooling == "mean" else torch.ones(len(cuts))
            expected = (windows * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_pooling_of_empty_sequences() -> None:
    hidden = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, -6.0]])
    bounds = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    expected = {
        "cls": [[0, 0], [1, -2], [0, 0], [5, -6], [0, 0]],
        "mean": [[0, 0], [2, -3], [0, 0], [5, -6], [0, 0]],
        "max": [[0, 0], [3, -2], [0, 0], [5, -6], [0, 0]],
    }
    for pooling, rows in expected.items():
        assert pool(hidden, bounds, pooling).tolist() == rows
        assert pool(hidden[:0], bounds[:1].repeat(3), pooling).tolist() == [[0, 0], [0, 0]]


def test_a_head_of_bfloat16_gives_float32(folder) -> None:
    found = Embed.from_pretrained(folder, dtype=torch.bfloat16, normalize=True).many(TEXTS)
    assert found.dtype == torch.float32
    exact = Embed.from_pretrained(folder, normalize=True).many(TEXTS)
    assert (found * exact).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"pooling": "median"},
            ValueError,
            "pooling: expected one of cls, mean, max, got 'median'",
        ),
        ({"layers": ()}, ValueError, "layers: expected at least one, got none"),
        ({"layers": (4,)}, ValueError, "layers: expected -4 to 3, got 4"),
        ({"layers": (1.0,)}, TypeError, "layers: expected integers, got float"),
        ({"dimensions": 25}, ValueError, r"dimensions: expected 1 to 24 \(hidden_size\), got 25"),
        ({"normalize": "yes"}, TypeError, "normalize: expected a bool, got str"),
        ({"prompt": 1}, TypeError, "prompt: expected a string, got int"),
    ],
)
def test_refuses_options(options, error, message, folder) -> None:
    with pytest.raises(error, match=message):
        Embed.from_pretrained(folder, **options)


@pytest.fixture
def sentence_transformer(folder, tmp_path):
    """A directory in sentence-transformers' layout, and a way to write its files."""
    target = tmp_path / "model"
    shutil.copytree(folder, target / "0_Transformer")

    def write(modules=("Transformer", "Pooling"), **files):
        paths = {"Transformer": "0_Transformer"}
        listed = [
            {"idx": i, "path": paths.get(kind, f"{i}_{kind}"), "type": f"some.package.{kind}"}
            for i, kind in enumerate(modules)
        ]
        (target / "modules.json").write_text(json.dumps(listed))
        (target / "1_Pooling").mkdir(exist_ok=True)
        for name, content in {"pooling": {"pooling_mode_cls_token": True}, **files}.items():
            path = {
                "pooling": "1_Pooling/config.json",
                "length": "0_Transformer/sentence_bert_config.json",
                "prompts": "config_sentence_transformers.json",
            }[name]
            (target / path).write_text(json.dumps(content))
        return target

    return write


def test_the_layout_of_sentence_transformers(sentence_transformer) -> None:
    target = sentence_transformer(
        ("Transformer", "Pooling", "Normalize"),
        length={"max_seq_length": 20},
        pooling={"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True},
        prompts={"default_prompt_name": "q", "prompts": {"q": "Q: "}, "truncate_dim": 9},
    )
    embed = Embed.from_pretrained(target)
    assert (embed.pooling, embed.normalize, embed.max_length) == ("max", True, 20)
    assert (embed.prompt, embed.dimensions) == ("Q: ", 9)
    assert embed(TEXTS[3]).norm().item() == pytest.approx(1)
    # Arguments come first.
    other = Embed.from_pretrained(target, pooling="mean", normalize=False, max_length=30)
    assert (other.pooling, other.normalize, other.max_length) == ("mean", False, 30)
    # Its own length may be more than the model reads.
    target = sentence_transformer(length={"max_seq_length": 512}, pooling={"pooling_mode": "mean"})
    embed = Embed.from_pretrained(target)
    assert (embed.pooling, embed.normalize, embed.max_length) == ("mean", False, LENGTH)


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        (("Transformer", "Pooling", "Dense"), {}, "Transformer, Pooling and Normalize, got Dense"),
        ((), {"pooling": {"pooling_mode_lasttoken": True}}, "mean, max, got lasttoken"),
        ((), {"pooling": {"pooling_mode": ["cls", "mean"]}}, r"got cls \+ mean"),
        ((), {"pooling": {}}, "mean, max, got none"),
        ((), {"pooling": []}, "expected a JSON object, got list"),
        ((), {"pooling": {"pooling_mode": "cls", "include_prompt": False}}, "prompt's tokens"),
        ((), {"length": {"max_seq_length": "long"}}, "integer as max_seq_length, got 'long'"),
        ((), {"prompts": {"default_prompt_name": "q"}}, "expected a prompt named 'q'"),
        ((), {"prompts": {"default_prompt_name": ["q"], "prompts": {}}}, r"prompt named \['q'\]"),
        ((), {"prompts": {"truncate_dim": "abc"}}, "integer as truncate_dim, got 'abc'"),
        ((), {"prompts": {"truncate_dim": True}}, "integer as truncate_dim, got True"),
        ((), {"prompts": {"truncate_dim": 0}}, "integer as truncate_dim, got 0"),
    ],
)
def test_refuses_what_it_has_not(modules, files, message, sentence_transformer) -> None:
    target = sentence_transformer(modules or ("Transformer", "Pooling"), **files)
    with pytest.raises(CheckpointError, match=message):
        Embed.from_pretrained(target)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", 3])
def test_refuses_modules_outside_of_the_directory(path, sentence_transformer) -> None:
    target = sentence_transformer()
    (target / "modules.json").write_text(json.dumps([{"path": path, "type": "a.Transformer"}]))
    with pytest.raises(CheckpointError, match="expected folders inside its own"):
        Embed.from_pretrained(target)


def test_a_real_model_gives_the_similarities_of_its_card(minilm) -> None:
    """Pooled and normalized as its directory says, without being told."""
    embed = Embed.from_pretrained(minilm)
    assert (embed.pooling, embed.normalize, embed.max_length) == ("mean", True, 256)
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    vectors = embed.many(sentences)
    similar = vectors @ vectors.T
    got = [round(similar[i, j].item(), 4) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert got == [0.6660, 0.1046, 0.1411]
    # And the same numbers as the encoder gives without packed weights, padding or batches.
    model = bertfast.BertModel.from_pretrained(minilm)
    for sentence, vector in zip(sentences, vectors, strict=True):
        ids = torch.tensor([embed.tokenizer.encode(sentence).ids])
        with torch.no_grad():
            expected = F.normalize(model(ids).last_hidden_state[0].mean(0), dim=0)
        assert (vector - expected).abs().max() < 1e-5
