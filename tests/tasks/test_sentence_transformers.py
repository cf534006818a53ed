"""Directories that sentence-transformers wrote, and older ones: its vectors, read by ``Embed``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from bertfast.data import builtin_documents, save_tokenizer, train_vocab
from bertfast.errors import CheckpointError
from bertfast.tasks import Classify, Embed

from .conftest import LENGTH, TEXTS

OLD = "sentence_transformers.models"


@pytest.fixture(scope="module")
def st():
    import sentence_transformers

    return sentence_transformers


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("BertModel")


@pytest.fixture(scope="module")
def cased(make_model, tmp_path_factory):
    """The encoder with a tokenizer that keeps case, and can write only some capitals."""
    target = tmp_path_factory.mktemp("cased")
    shutil.copytree(make_model("BertModel"), target, dirs_exist_ok=True)
    tokenizer = train_vocab(builtin_documents()[:12], 400, lowercase=False)
    save_tokenizer(tokenizer, target, max_length=LENGTH)
    return target


@pytest.fixture
def saved(st, folder, tmp_path):
    """A directory that it writes, of the modules on top of the encoder."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    def save(*modules, encoder=folder, **options):
        torch.manual_seed(0)
        made = [Transformer(str(encoder)), *(make() for make in modules)]
        for parameter in nn.Sequential(*made[1:]).parameters():
            nn.init.normal_(parameter, std=0.5)
        st.SentenceTransformer(modules=made, device="cpu", **options).save(str(tmp_path / "m"))
        return tmp_path / "m"

    return save


@pytest.fixture
def check(st):
    def compare(directory, ours=None, theirs=None, texts=TEXTS):
        model = st.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
        expected = model.encode(texts, convert_to_tensor=True, **(theirs or {}))
        embed = Embed.from_pretrained(directory)
        found = embed.many(texts, **(ours or {}))
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
        return embed

    return compare


def pooling(mode="mean", width=24, **options):
    from sentence_transformers.sentence_transformer.modules import Pooling

    return lambda: Pooling(width, mode, **options)


def dense(width, out, activation=None, **options):
    from sentence_transformers.sentence_transformer.modules import Dense

    if activation is not None:
        options["activation_function"] = activation
    return lambda: Dense(width, out, **options)


def module(name, *arguments):
    from sentence_transformers.sentence_transformer import modules

    return lambda: getattr(modules, name)(*arguments)


@pytest.mark.parametrize(
    "mode",
    ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("max", "cls"),
     ("weightedmean", "mean", "lasttoken")],
)  # fmt: skip
def test_poolings(mode, saved, check) -> None:
    embed = check(saved(pooling(mode)))
    assert embed.pooling == mode


@pytest.mark.parametrize(
    "mode", ["cls", "max", "lasttoken", ("weightedmean", "mean"), "mean_sqrt_len_tokens"]
)
def test_a_prompt_that_is_not_pooled(mode, saved, check) -> None:
    directory = saved(pooling(mode, include_prompt=False), prompts={"query": "Names of: "})
    for prompt in ("Names of: ", "x", " ", ""):
        check(directory, {"prompt": prompt}, {"prompt": prompt})
    check(directory, {"prompt_name": "query"}, {"prompt_name": "query"})


def test_prompts(saved, check) -> None:
    prompts = {"query": "Names: ", "types": "Types are "}
    directory = saved(pooling(), prompts=prompts, default_prompt_name="types")
    assert check(directory).prompt == "Types are "
    for name in ("query", "document", "types"):
        check(directory, {"prompt_name": name}, {"prompt_name": name})
        made = Embed.from_pretrained(directory, prompt_name=name)
        found = Embed.from_pretrained(directory).many(TEXTS, prompt_name=name)
        torch.testing.assert_close(made.many(TEXTS), found)
    check(directory, {"prompt": "Of "}, {"prompt": "Of "})
    assert Embed.from_pretrained(directory, prompt="Of ").prompt == "Of "
    with pytest.raises(ValueError, match="prompt_name: expected one of query, document, types, "):
        Embed.from_pretrained(directory, prompt_name="passage")
    with pytest.raises(ValueError, match="prompt, prompt_name: expected one of them, got both"):
        Embed.from_pretrained(directory)("x", prompt="a", prompt_name="query")


@pytest.mark.parametrize(
    "modules",
    [
        lambda: [dense(24, 10)],
        lambda: [dense(24, 10, nn.Identity(), bias=False), module("Normalize")],
        lambda: [dense(24, 24, nn.GELU(), use_residual=True)],
        lambda: [dense(24, 7, nn.ReLU(), use_residual=True), module("LayerNorm", 7)],
        lambda: [module("Normalize"), dense(24, 10, nn.SiLU()), module("Dropout", 0.5)],
        lambda: [module("LayerNorm", 24), module("Normalize")],
    ],
)
def test_what_is_on_top(modules, saved, check) -> None:
    check(saved(pooling(), *modules()))


def test_what_is_on_top_comes_after_the_windows_and_before_the_cut(saved) -> None:
    directory = saved(pooling(("mean", "max")), dense(48, 10), module("Normalize"))
    vector = Embed.from_pretrained(directory, long="window", dimensions=4, max_length=20)(TEXTS[3])
    plain = Embed.from_pretrained(
        directory, long="window", max_length=20, head=nn.Identity(), normalize=False
    )
    head = Embed.from_pretrained(directory).head
    expected = nn.functional.normalize(head(plain(TEXTS[3])[None])[:, :4])[0]
    torch.testing.assert_close(vector, expected)
    with pytest.raises(ValueError, match=r"dimensions: expected 1 to 10 "):
        Embed.from_pretrained(directory, dimensions=11)


@pytest.mark.parametrize("limit", [8, 16.0, 1e30])
def test_the_tokenizers_limit(limit, saved, check) -> None:
    """The only place where the newer ones write it down."""
    directory = saved(pooling())
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": limit}))
    if limit == 16.0:
        assert Embed.from_pretrained(directory).max_length == 16
    else:
        embed = check(directory)
        assert embed.max_length == (limit if limit == 8 else LENGTH)
    # Who asks for more gets more, as far as there are positions.
    assert Embed.from_pretrained(directory, max_length=30).max_length == 30
    expected = int(limit) if limit in (8, 16.0) else LENGTH
    assert Embed.from_pretrained(directory, max_length=None).max_length == expected
    # Theirs before the tokenizer's, whichever is less.
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert check(directory).max_length == 20


@pytest.mark.parametrize("lower", [True, False])
def test_the_encoders_lower_case(lower, cased, saved, check) -> None:
    directory = saved(pooling(), encoder=cased)
    settings = {"max_seq_length": 30, "do_lower_case": lower}
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    embed = check(directory, texts=[*TEXTS, "NAMES İ Überraschung"])
    assert (
        embed.tokenizer.encode("Names").ids
        == embed.tokenizer.encode("names" if lower else "Names").ids
    )


def test_a_tokenizer_config_against_tokenizer_json(saved, check) -> None:
    directory = saved(pooling())
    file = directory / "tokenizer_config.json"
    for changes in ({"do_lower_case": False}, {"strip_accents": False}):
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        check(directory)


@pytest.mark.parametrize(
    ("encoder_file", "flags"),
    [
        ("sentence_bert_config.json", {"pooling_mode_max_tokens": True}),
        ("sentence_distilbert_config.json",
         {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True,
          "pooling_mode_mean_sqrt_len_tokens": False}),
        ("sentence_roberta_config.json",
         {"pooling_mode_lasttoken": True, "pooling_mode_weightedmean_tokens": True,
          "include_prompt": True}),
        ("sentence_bert_config.json", {"pooling_mode_cls_token": False}),
        ("sentence_bert_config.json", {"pooling_mode_cls_token": True, "pooling_mode": "max"}),
        ("sentence_bert_config.json", {}),
        ("sentence_camembert_config.json", {}),
        ("sentence_albert_config.json", {}),
        ("sentence_xlnet_config.json", {}),
    ],
)  # fmt: skip
def test_directories_of_older_releases(encoder_file, flags, folder, tmp_path, check) -> None:
    shutil.copytree(folder, tmp_path / "0_Transformer")
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{OLD}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    width = 24 * max(1, sum(on is True and key != "include_prompt" for key, on in flags.items()))
    width = 24 if "pooling_mode" in flags else width
    head = nn.Linear(width, 9)
    torch.nn.init.normal_(head.weight)
    contents = {
        "modules.json": modules,
        f"0_Transformer/{encoder_file}": {"max_seq_length": 20, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 24, **flags},
        "2_Dense/config.json": {
            "in_features": width, "out_features": 9, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    }  # fmt: skip
    for name in ("1_Pooling", "2_Dense", "3_Normalize"):
        (tmp_path / name).mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    weights = {f"linear.{name}": p.detach() for name, p in head.named_parameters()}
    torch.save(weights, tmp_path / "2_Dense" / "pytorch_model.bin")
    assert check(tmp_path).max_length == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 23}, "in_features: expected 24, the length of .* got 23"),
        (
            {"out_features": 10**30},
            r"linear\.weight \(10{30}, 24\) \(out_features in .*config\.json",
        ),
        ({"activation_function": None}, "activation_function: expected a string, .* got None"),
        ({"module_input_name": None}, "module_input_name: expected a string, .* got None"),
        ({"out_features": 11}, r"expected linear\.bias \(11,\), .* got linear\.bias \(10,\)"),
        ({"activation_function": "mine.Swish"}, "activation_function: .* Tanh, got 'mine.Swish'"),
        ({"activation_function": "torch.nn.Softmax"}, "Tanh, got 'torch.nn.Softmax'"),
        ({"bias": False}, r"expected linear\.weight .* got linear\.bias"),
        ({"module_input_name": "token_embeddings"}, "expected 'sentence_embedding', got 'token"),
        ({"scale": 2}, "scale: expected no such setting, which may change the result, got 2"),
    ],
)
def test_refuses_what_a_dense_layer_is_not(changes, message, saved) -> None:
    directory = saved(pooling(), dense(24, 10))
    file = directory / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Embed.from_pretrained(directory)
    assert str(directory / "2_Dense") in str(caught.value)


def test_another_pooling_has_to_fit_the_dense_layer(saved) -> None:
    directory = saved(pooling(), dense(24, 10))
    assert Embed.from_pretrained(directory, pooling="cls")("x").shape == (10,)
    message = "pooling: expected vectors of 24 numbers for the directory's Dense, got 48"
    with pytest.raises(ValueError, match=message):
        Embed.from_pretrained(directory, pooling=("mean", "max"))


def test_texts_of_one_token(saved, check) -> None:
    directory = saved(pooling())
    file = directory / "sentence_bert_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_seq_length": 3}))
    assert check(directory).max_length == 3


def test_refuses_classes_of_others(saved) -> None:
    directory = saved(pooling())
    file = directory / "modules.json"
    file.write_text(file.read_text().replace('"sentence_transformers.', '"mine.'))
    with pytest.raises(CheckpointError, match=r"type: expected a class of sentence_transformers"):
        Embed.from_pretrained(directory)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), None])
def test_cross_encoders(activation, make_model, tmp_path) -> None:
    from sentence_transformers import CrossEncoder

    source = make_model("BertForSequenceClassification", num_labels=1)
    theirs = CrossEncoder(str(source), device="cpu", activation_fn=activation)
    theirs.save(str(tmp_path))
    pairs = [(TEXTS[0], TEXTS[4]), (TEXTS[3], "x")]
    file = tmp_path / "sentence_bert_config.json"
    for changes in ({}, {"max_seq_length": 20, "do_lower_case": True}):
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        theirs = CrossEncoder(str(tmp_path), device="cpu", local_files_only=True)
        expected = torch.from_numpy(theirs.predict(pairs))
        ours = Classify.from_pretrained(tmp_path)
        torch.testing.assert_close(ours.scores(pairs)[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert ours.max_length == 20
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_seq_length": 512}))
    assert Classify.from_pretrained(tmp_path).max_length == LENGTH
    assert Classify.from_pretrained(tmp_path, max_length=30, function="none").max_length == 30
    config = tmp_path / "config_sentence_transformers.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"activation_fn": "mine.Sigmoid"}, "sentence_transformers.json names mine.Sigmoid"),
        ({"default_prompt_name": "q"}, "default_prompt_name: expected nothing, got 'q'"),
        ({"shift": 1}, "shift: expected no such setting"),
    ):
        config.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            Classify.from_pretrained(tmp_path)
    config.write_text(json.dumps({**values, "activation_fn": "mine.Sigmoid"}))
    assert Classify.from_pretrained(tmp_path, function="sigmoid").function == "sigmoid"
