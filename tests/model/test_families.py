"""RoBERTa, XLM-R, DistilBERT, ELECTRA in a bertfast BERT: transformers' outputs, or a refusal."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.errors import CheckpointError

SIZES = {
    "vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 20, "initializer_range": 0.5,
}  # fmt: skip
DISTIL = {
    "vocab_size": 41, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40,
    "max_position_embeddings": 20, "initializer_range": 0.5,
}  # fmt: skip
CONFIGS = {
    "Roberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "XLMRoberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "DistilBert": {**DISTIL, "dropout": 0.2, "attention_dropout": 0.3},
    "Electra": {**SIZES, "embedding_size": 24},
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def theirs(family, head, directory, **changes):
    """A tiny random model of transformers, saved; every number of it is drawn."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **changes})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    # transformers sets the row of padding to zero or not, but no token that counts reads it.
    return model


def batch(first=5):
    torch.manual_seed(1)
    ids = torch.randint(first, 41, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 1)):
        ids[row, length:], mask[row, length:] = 1, 0  # RoBERTa's padding, which it looks at
    return {"input_ids": ids, "attention_mask": mask}


def compare(model, other, fields):
    inputs = batch()
    with torch.no_grad():
        got, expected = model(**inputs), other(**inputs)
    attended = inputs["attention_mask"].bool()
    for field in fields:
        a, b = got[field], expected[field]
        if a.shape[:2] == attended.shape:
            a, b = a[attended], b[attended]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


HEADS = [
    ("Model", "BertModel", ["last_hidden_state"]),
    ("ForMaskedLM", "BertForMaskedLM", ["logits"]),
    ("ForTokenClassification", "BertForTokenClassification", ["logits"]),
    ("ForQuestionAnswering", "BertForQuestionAnswering", ["start_logits", "end_logits"]),
]
CASES = [(family, *head) for family in CONFIGS for head in HEADS]
for family in ("Roberta", "XLMRoberta"):
    head = "ForSequenceClassification"
    CASES.append((family, head, f"Bert{head}", ["logits"]))


@pytest.mark.parametrize(("family", "head", "name", "fields"), CASES)
def test_outputs_are_those_of_transformers(family, head, name, fields, tmp_path):
    other = theirs(family, head, tmp_path)
    pooled = name == "BertModel" and family in ("Roberta", "XLMRoberta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(bertfast, name).from_pretrained(tmp_path)
    compare(model, other, [*fields, "pooler_output"] if pooled else fields)
    if name == "BertModel":
        assert (model.pooler is None) == (not pooled)
    # What it is now is a BERT like any other: written and read back, and read by transformers.
    model.save_pretrained(tmp_path / "bert")
    compare(getattr(bertfast, name).from_pretrained(
        tmp_path / "bert", **({} if name != "BertModel" or pooled else {"add_pooling_layer": False})
    ), other, fields)  # fmt: skip
    import transformers

    assert json.loads((tmp_path / "bert" / "config.json").read_text())["model_type"] == "bert"
    compare(getattr(transformers, name).from_pretrained(tmp_path / "bert"), other, fields)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_encoder_alone_of_a_model_with_a_head(family, tmp_path):
    """Of any head, those too that are not loaded; and a fresh head on it."""
    head = "ForPreTraining" if family == "Electra" else "ForSequenceClassification"
    other = theirs(family, head, tmp_path)
    encoder = getattr(other, other.base_model_prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bertfast.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    compare(model, encoder, ["last_hidden_state"])
    with pytest.warns(UserWarning, match="has no qa_outputs, which BertForQuestionAnswering draws"):
        bertfast.BertForQuestionAnswering.from_pretrained(tmp_path)


def test_roberta_positions(tmp_path):
    """The rows before pad_token_id + 1 are dropped, and counted off the config."""
    other = theirs("Roberta", "Model", tmp_path, pad_token_id=3)
    model = bertfast.BertModel.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == 16
    table = other.embeddings.position_embeddings.weight
    assert model.embeddings.position_embeddings.weight.equal(table[4:])
    load = bertfast.BertModel.from_pretrained
    short = load(tmp_path, max_position_embeddings=5)
    assert short.embeddings.position_embeddings.weight.equal(table[4:9])
    with pytest.raises(
        CheckpointError, match=r"max_position_embeddings of at most 16, .* got 17: "
    ):
        load(tmp_path, max_position_embeddings=17)


def test_a_classifier_s_layer_comes_before_an_unused_pooler(tmp_path):
    """Old checkpoints of RoBERTa carry a pooler that their classifier does not use."""
    other = theirs("Roberta", "ForSequenceClassification", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for part, shape in (("weight", (24, 24)), ("bias", (24,))):
        tensors[f"roberta.pooler.dense.{part}"] = torch.ones(shape)
    save_file(tensors, file)
    compare(bertfast.BertForSequenceClassification.from_pretrained(tmp_path), other, ["logits"])
    assert (bertfast.BertModel.from_pretrained(tmp_path).pooler.dense.weight == 1).all()


def test_distilbert_has_a_type_table_of_zeros(tmp_path):
    theirs("DistilBert", "Model", tmp_path)
    model = bertfast.BertModel.from_pretrained(tmp_path)
    config = model.config
    assert not model.embeddings.token_type_embeddings.weight.any()
    assert (config.type_vocab_size, config.hidden_dropout_prob) == (1, 0.2)
    assert config.attention_probs_dropout_prob == 0.3


@pytest.mark.parametrize(
    ("family", "head", "changes", "name", "message"),
    [
        ("DistilBert", "ForSequenceClassification", {}, "BertForSequenceClassification",
         r"got pre_classifier\.\w+: DistilBERT's classifier of sequences has a ReLU where BERT's"),
        ("DistilBert", "ForSequenceClassification", {}, "BertForTokenClassification",
         r"got pre_classifier\.\w+: DistilBERT's classifier of sequences has a ReLU"),
        ("DistilBert", "ForMultipleChoice", {}, "BertForMultipleChoice", "has a ReLU"),
        ("Electra", "ForSequenceClassification", {}, "BertForSequenceClassification",
         r"got classifier\.dense\.\w+: ELECTRA's classifier of sequences has a GELU where BERT's"),
        ("Electra", "ForMultipleChoice", {}, "BertForMultipleChoice",
         r"got sequence_summary\.summary\.\w+: ELECTRA's multiple choice has a GELU"),
        ("Electra", "Model", {"embedding_size": 16}, "BertModel",
         r"config\.json: embedding_size: expected 24 as hidden_size, got int 16: BERT has no p"),
        ("Electra", "ForMaskedLM", {"hidden_act": "relu"}, "BertForMaskedLM",
         r"expected hidden_act 'gelu', got 'relu': the masked-LM head of this architecture has th"),
        ("Roberta", "ForMaskedLM", {"hidden_act": "gelu_new"}, "BertForMaskedLM",
         r"expected hidden_act 'gelu', got 'gelu_new': the masked-LM head"),
        ("Roberta", "Model", {"is_decoder": True}, "BertModel", r"is_decoder: expected False"),
        ("Roberta", "Model", {"hidden_act": "silu"}, "BertModel", r"hidden_act: expected one of"),
    ],
)  # fmt: skip
def test_what_differs_beyond_names_is_refused(family, head, changes, name, message, tmp_path):
    theirs(family, head, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        getattr(bertfast, name).from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "albert"}, r"got 'albert': its layers share their weights"),
        ({"model_type": "deberta-v2"}, r"got 'deberta-v2': its attention reads relative positions"),
        ({"model_type": "mpnet"}, r"got 'mpnet': its attention adds a bias"),
        ({"model_type": "gpt2"}, r"got 'gpt2': it reads from left to right"),
        ({"model_type": "new"}, r"got 'new': it is not known to compute what BERT computes"),
        ({"model_type": None}, r"model_type: expected one of bert, roberta, .*, got None"),
        ({"model_type": ["bert"]}, r"model_type: expected one of bert, roberta"),
        ({"model_type": "electra"}, r"embedding_size: expected 256 as hidden_size, got int 128"),
        ({"model_type": "electra", "embedding_size": [1]}, r"embedding_size: expected 256"),
        ({"model_type": "roberta", "pad_token_id": None}, r"pad_token_id: expected an integer, wh"),
        (
            {"model_type": "roberta", "max_position_embeddings": 2},
            r"max_position_embeddings: expec",
        ),
        ({"model_type": "distilbert", "dim": "wide"}, r"hidden_size: expected an integer"),
    ],
)
def test_bad_configs_are_named(values, message, tmp_path):
    theirs("Roberta", "Model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        bertfast.BertModel.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_that_do_not_fit_are_named(family, tmp_path):
    theirs(family, "Model", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["embeddings.LayerNorm.bias"]
    save_file({**tensors, "extra.weight": torch.ones(2)}, file)
    with pytest.raises(
        CheckpointError,
        match=re.escape("missing: bert.embeddings.LayerNorm.bias; unexpected: extra.weight"),
    ):
        bertfast.BertModel.from_pretrained(tmp_path)
