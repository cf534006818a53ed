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

PACKAGE = "sentence_transformers.models"
POOLINGS = {
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean": lambda hidden: weighted(hidden, torch.arange(1.0, len(hidden) + 1)),
    "lasttoken": lambda hidden: hidden[-1],
}


def weighted(vectors, weights):
    return (vectors * weights[:, None]).sum(0) / weights.sum()


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
            weights = {
                "mean": tokens,
                "weightedmean": tokens * (tokens + 1) / 2,
                "mean_sqrt_len_tokens": tokens.sqrt(),
            }.get(pooling, torch.ones(len(cuts)))
            expected = weighted(windows, weights)
            if pooling == "mean_sqrt_len_tokens":
                expected = expected * weights.sum() / tokens.sum().sqrt()
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_windows_without_their_prompt(folder) -> None:
    """The prompt is in the first two windows, which are pooled without it, as is what is before
    it in the first."""
    words = ["it", "in", "of", "to", "as", "is"] * 4
    prompt = " ".join(words[:14]) + " "
    options = {"max_length": 12, "pooling": ["mean", "max", "weightedmean"]}
    embed = Embed.from_pretrained(folder, long="window", include_prompt=False, **options)
    found = embed(" ".join(words), prompt=prompt)
    ids = [embed.tokenizer.token_to_id(word) for word in [*words[:14], *words]]
    ends = [embed.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")]
    model = bertfast.BertModel.from_pretrained(folder)
    kept, weights = [], []
    for start, skip in ((0, 11), (10, 5), (20, 0), (30, 0)):
        window = [ends[0], *ids[start : start + 10], ends[1]]
        with torch.no_grad():
            hidden = model(torch.tensor([window])).last_hidden_state[0]
        kept.append(hidden[skip:])
        weights.append(torch.arange(1.0, len(window) + 1)[skip:])
    hidden = torch.cat(kept)
    expected = [hidden.mean(0), hidden.amax(0), weighted(hidden, torch.cat(weights))]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_pooling_of_empty_sequences() -> None:
    hidden = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, -6.0]])
    bounds = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    third, root = torch.tensor([7.0, -10.0]) / 3, torch.tensor([4.0, -6.0]) / 2**0.5
    expected = {
        "cls": [[0, 0], [1, -2], [0, 0], [5, -6], [0, 0]],
        "mean": [[0, 0], [2, -3], [0, 0], [5, -6], [0, 0]],
        "max": [[0, 0], [3, -2], [0, 0], [5, -6], [0, 0]],
        "lasttoken": [[0, 0], [3, -4], [0, 0], [5, -6], [0, 0]],
        "weightedmean": [[0, 0], third.tolist(), [0, 0], [5, -6], [0, 0]],
        "mean_sqrt_len_tokens": [[0, 0], root.tolist(), [0, 0], [5, -6], [0, 0]],
    }
    # Of the second sequence the second token is left, of the fourth nothing.
    skip = torch.tensor([3, 1, 0, 1, 2])
    for pooling, rows in expected.items():
        torch.testing.assert_close(
            pool(hidden, bounds, pooling), torch.tensor(rows, dtype=torch.float32)
        )
        assert pool(hidden[:0], bounds[:1].repeat(3), pooling).tolist() == [[0, 0], [0, 0]]
        left = [[0, 0], [3, -4], [0, 0], [0, 0], [0, 0]]
        torch.testing.assert_close(
            pool(hidden, bounds, pooling, skip=skip), torch.tensor(left, dtype=torch.float32)
        )
    both = pool(hidden, bounds, ["max", "cls"])
    assert both.equal(torch.cat([pool(hidden, bounds, name) for name in ("max", "cls")], dim=1))


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
            "pooling: expected one of cls, max, mean, .*, lasttoken, got 'median'",
        ),
        ({"layers": ()}, ValueError, "layers: expected at least one, got none"),
        ({"layers": (4,)}, ValueError, "layers: expected -4 to 3, got 4"),
        ({"layers": (1.0,)}, TypeError, "layers: expected integers, got float"),
        (
            {"dimensions": 25},
            ValueError,
            r"dimensions: expected 1 to 24 \(numbers of a vector\), got",
        ),
        ({"pooling": ()}, ValueError, r"pooling: expected one of .*, got \(\)"),
        ({"pooling": ("cls", 3)}, ValueError, "pooling: expected one of .*, got 3"),
        ({"pooling": None}, ValueError, "pooling: expected one of .*, got None"),
        ({"include_prompt": 1}, TypeError, "include_prompt: expected a bool, got int"),
        ({"prompts": {"q": 1}}, TypeError, "prompt: expected a string, got int"),
        ({"prompt_name": "q"}, ValueError, "prompt_name: expected none, as .*, got 'q'"),
        ({"head": torch.nn.Flatten(0)}, ValueError, r"head: expected \(N, out\) vectors of"),
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
            {
                "idx": i,
                "path": paths.get(kind, f"{i}_{kind}"),
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(modules)
        ]
        (target / "modules.json").write_text(json.dumps(listed))
        (target / "1_Pooling").mkdir(exist_ok=True)
        for name, content in {"pooling": {"pooling_mode_cls_token": True}, **files}.items():
            if name == "pooling" and isinstance(content, dict):
                content = {"word_embedding_dimension": 24, **content}
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
        (("Transformer", "Pooling", "CNN"), {}, "Dropout, got Transformer, Pooling, CNN$"),
        (("Transformer", "Normalize"), {}, "Transformer, Pooling, and .* got Transformer, Norm"),
        (("Pooling",), {}, "Transformer, Pooling, and then any of Dense, .* got Pooling$"),
        ((), {"pooling": {"pooling_mode": "median"}}, "pooling_mode: .* lasttoken, got 'median'"),
        ((), {"pooling": {"pooling_mode": []}}, r"pooling_mode: expected some of .*, got \[\]"),
        ((), {"pooling": {"pooling_mode_all": True}}, "pooling_mode_all: expected no such setting"),
        ((), {"pooling": []}, r"expected a JSON object, got \[\]"),
        ((), {"pooling": {"word_embedding_dimension": 23}}, "model's 24 numbers .* got 23"),
        ((), {"pooling": {"word_embedding_dimension": None}}, "embedding_dimension: .* got None"),
        ((), {"pooling": {"include_prompt": 0}}, "include_prompt: expected true or false, got 0"),
        ((), {"length": {"max_seq_length": "long"}}, "max_seq_length: .* integer, got 'long'"),
        ((), {"length": {"do_lower_case": "yes"}}, "do_lower_case: .* false, got 'yes'"),
        ((), {"length": {"query_length": 32}}, "query_length: expected no such setting"),
        ((), {"length": {"module_output_name": "x"}}, "expected 'token_embeddings', got 'x'"),
        ((), {"length": {"model_args": {"dtype": "float16"}}}, "dtype: expected no such setting"),
        ((), {"prompts": {"default_prompt_name": "q"}}, "expected one of query, document, got 'q'"),
        ((), {"prompts": {"default_prompt_name": ["q"]}}, r"a string, got \['q'\]"),
        ((), {"prompts": {"prompts": {"q": 1}}}, "prompts: expected prompts by their names"),
        ((), {"prompts": {"truncate_dim": "abc"}}, "truncate_dim: .* integer, got 'abc'"),
        ((), {"prompts": {"truncate_dim": True}}, "truncate_dim: .* integer, got True"),
        ((), {"prompts": {"truncate_dim": 0}}, "truncate_dim: .* integer, got 0"),
        ((), {"prompts": {"model_type": "CrossEncoder"}}, "expected 'SentenceTransformer', got"),
        ((), {"prompts": {"shift": 1}}, "shift: expected no such setting, .* got 1"),
    ],
)
def test_refuses_what_it_has_not(modules, files, message, sentence_transformer) -> None:
    target = sentence_transformer(modules or ("Transformer", "Pooling"), **files)
    with pytest.raises(CheckpointError, match=message):
        Embed.from_pretrained(target)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", 3])
def test_refuses_modules_outside_of_the_directory(path, sentence_transformer) -> None:
    target = sentence_transformer()
    (target / "modules.json").write_text(
        json.dumps([{"path": path, "type": "sentence_transformers.models.Transformer"}])
    )
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
