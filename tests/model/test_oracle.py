"""Every model class against transformers, in float64: outputs, losses, gradients, checkpoints."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bertfast
from bertfast.errors import CheckpointError

from .conftest import DTYPE, assert_close

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MODELS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)
CHOICES = 3

# Widths that are no multiple of 8, one head, head size 1, one token type, each activation.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "odd": {"hidden_size": 15, "num_attention_heads": 5, "intermediate_size": 7, "vocab_size": 11},
    "one_head": {"num_attention_heads": 1, "hidden_act": "relu", "type_vocab_size": 1},
    "thin": {"hidden_size": 6, "num_attention_heads": 6, "hidden_act": "gelu_new"},
    "no_layers": {"num_hidden_layers": 0, "pad_token_id": None},
    "tanh": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3, "pad_token_id": 4},
    "untied": {"tie_word_embeddings": False, "num_hidden_layers": 1},
}


def oracle_config(config: bertfast.BertConfig) -> Any:
    return transformers.BertConfig(**config.to_dict(), attn_implementation="eager")


def pair(name: str, config: bertfast.BertConfig, seed: int = 0) -> tuple[Any, Any]:
    """Our model and transformers' with the same weights, in float64, in evaluation mode."""
    torch.manual_seed(seed)
    ours = getattr(bertfast, name)(config).to(DTYPE).eval()
    theirs = getattr(transformers, name)(oracle_config(config)).to(DTYPE).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases are zero otherwise
        weights = dict(ours.named_parameters(remove_duplicate=False))
        for key, parameter in theirs.named_parameters(remove_duplicate=False):
            parameter.copy_(weights[key])
    return ours, theirs


def labels_for(name: str, config: bertfast.BertConfig, attended: torch.Tensor) -> dict[str, Any]:
    """Labels by argument name; tokens that are padding carry none."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = attended.shape

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    if name in ("BertForMaskedLM", "BertForPreTraining"):
        labels = draw(config.vocab_size, rows, columns)
        labels[~attended | (draw(2, rows, columns) == 0)] = -100
        labels[0, attended[0].nonzero()[0]] = 1  # at least one label
        return {"labels": labels} | (
            {"next_sentence_label": draw(2, rows)} if name == "BertForPreTraining" else {}
        )
    if name == "BertForTokenClassification":
        return {"labels": draw(config.num_labels, rows, columns).masked_fill(~attended, -100)}
    if name == "BertForQuestionAnswering":
        return {"start_positions": draw(columns, rows), "end_positions": draw(columns, rows)}
    if name == "BertForMultipleChoice":
        return {"labels": draw(CHOICES, rows // CHOICES)}
    classes = 2 if name == "BertForNextSentencePrediction" else config.num_labels
    return {"labels": draw(classes, rows)}


def for_model(name: str, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if name != "BertForMultipleChoice":
        return kwargs
    return {k: v.reshape(-1, CHOICES, v.shape[1]) for k, v in kwargs.items()}


def compare(name: str, ours: Any, theirs: Any, attended: torch.Tensor) -> None:
    """All fields equal where a token is, and ours as documented where none is."""
    theirs = {field: value for field, value in theirs.items() if field != "cross_attentions"}
    assert list(ours) == list(theirs)
    for field, expected in theirs.items():
        got = ours[field]
        if field == "hidden_states":
            assert len(got) == len(expected)
            for a, b in zip(got, expected, strict=True):
                assert_close(a[attended], b[attended])
                assert not a[~attended].any()
        elif field == "attentions":
            assert len(got) == len(expected)
            pairs = attended[:, None, :, None] & attended[:, None, None, :]
            for a, b in zip(got, expected, strict=True):
                assert_close(a, b * pairs)
        elif got.shape[:2] == attended.shape and name != "BertForMultipleChoice":
            assert_close(got[attended], expected[attended])
            lowest = torch.finfo(DTYPE).min if name == "BertForQuestionAnswering" else 0.0
            assert (got[~attended] == lowest).all()
        else:
            assert_close(got, expected)


def check_gradients(ours: Any, out: Any, theirs: Any, expected: Any) -> None:
    """The losses have the same gradient with respect to every parameter."""
    out.loss.backward()
    expected.loss.backward()
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    assert any(g.abs().max() > 1e-3 for g in gradients.values())
    for key, parameter in theirs.named_parameters():
        if key == "cls.predictions.bias" and not ours.config.tie_word_embeddings:
            continue  # theirs has two biases when untied, and computes with the decoder's
        key = "cls.predictions.bias" if key == "cls.predictions.decoder.bias" else key
        assert (gradients[key] is None) == (parameter.grad is None), key
        if parameter.grad is not None:
            assert_close(gradients[key], parameter.grad)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("config_name", CONFIGS)
def test_encoder_outputs(config_name, kind, tiny_config, make_inputs):
    config = tiny_config(**CONFIGS[config_name])
    ours, theirs = pair("BertModel", config)
    inputs = make_inputs(config, kind)
    ask = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        out, expected = ours(**inputs.kwargs, **ask), theirs(**inputs.kwargs, **ask)
        if kind == "left":
            # Theirs pools column 0, which is padding here; ours the first token there is.
            first = inputs.attended.long().argmax(1)
            first = expected.last_hidden_state[torch.arange(len(first)), first]
            expected.pooler_output = torch.tanh(theirs.pooler.dense(first))
        if config.num_hidden_layers == 0:  # theirs forgets the embedding's output then
            expected["hidden_states"] = (expected.last_hidden_state,)
    compare("BertModel", out, expected, inputs.attended)


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes(seed, tiny_config):
    """Sizes, mask and batch drawn at random; outputs, loss and every gradient."""
    draw = random.Random(seed)
    heads = draw.randint(1, 5)
    config = tiny_config(
        num_attention_heads=heads,
        hidden_size=heads * draw.randint(1, 9),
        intermediate_size=draw.randint(1, 50),
        num_hidden_layers=draw.randint(1, 3),
        vocab_size=draw.randint(4, 80),
        type_vocab_size=draw.randint(1, 3),
        hidden_act=draw.choice(["gelu", "gelu_new", "relu"]),
        tie_word_embeddings=draw.random() < 0.7,
    )
    ours, theirs = pair("BertForMaskedLM", config, seed)
    shape = (draw.randint(1, 5), draw.randint(1, 16))
    mask = torch.rand(shape) < 0.6
    mask[:, draw.randrange(shape[1])] = True
    ids = torch.randint(config.vocab_size, shape)
    labels = ids.masked_fill(~mask | (torch.rand(shape) < 0.3), -100)
    labels[0, mask[0].nonzero()[0]] = 1
    kwargs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    out, expected = ours(**kwargs, output_logits=True), theirs(**kwargs)
    compare("BertForMaskedLM", out, expected, mask)
    check_gradients(ours, out, theirs, expected)


# Every head with every mask; and each odd config with some mask.
CASES = [("tiny", kind) for kind in ("none", "right", "holes")]
CASES += [("odd", "right"), ("thin", "holes"), ("untied", "right")]


@pytest.mark.parametrize(("config_name", "kind"), CASES)
@pytest.mark.parametrize("name", MODELS[1:])
def test_heads_losses_and_gradients(name, kind, config_name, tiny_config, make_inputs):
    labels = 2 if name == "BertForQuestionAnswering" else 4
    config = tiny_config(**CONFIGS[config_name], num_labels=labels)
    ours, theirs = pair(name, config)
    inputs = make_inputs(config, kind, rows=6)
    kwargs = for_model(name, inputs.kwargs)
    labels = labels_for(name, config, inputs.attended)
    logits = {"output_logits": True} if "Pre" in name or "Masked" in name else {}
    if name == "BertForNextSentencePrediction":
        logits = {}
    out, expected = ours(**kwargs, **labels, **logits), theirs(**kwargs, **labels)
    if name == "BertForQuestionAnswering" and kind != "none":
        # Their softmax runs over padding, too. An answer cannot be there: ours leaves it out.
        ends = []
        for end in ("start", "end"):
            scores = expected[f"{end}_logits"].masked_fill(~inputs.attended, float("-inf"))
            positions = labels[f"{end}_positions"]
            on_padding = ~inputs.attended[torch.arange(6), positions]
            positions = positions.masked_fill(on_padding, -100)
            ends.append(F.cross_entropy(scores, positions))
        expected["loss"] = sum(ends) / 2
    compare(name, out, expected, inputs.attended)

    check_gradients(ours, out, theirs, expected)


@pytest.mark.parametrize(
    ("problem", "outputs", "labels"),
    [
        (None, 1, torch.tensor([0.5, -1.0, 2.0])),
        (None, 3, torch.tensor([2, 0, 1])),
        (None, 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
        ("regression", 3, torch.tensor([[1.5, 0, 1], [0, -2, 0], [1, 1, 1]])),
        ("regression", 1, torch.tensor([[0.5], [-1.0], [2.0]])),
        ("single_label_classification", 3, torch.tensor([2, -100, 1])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
    ],
)
def test_problem_types(problem, outputs, labels, tiny_config, make_inputs):
    config = tiny_config(num_labels=outputs, problem_type=problem)
    ours, theirs = pair("BertForSequenceClassification", config)
    labels = labels.to(DTYPE) if labels.is_floating_point() else labels
    inputs = make_inputs(config)
    got, expected = ours(**inputs.kwargs, labels=labels), theirs(**inputs.kwargs, labels=labels)
    assert_close(got.loss, expected.loss)
    assert config.problem_type == problem  # a forward does not write into the config


def test_inputs_embeds_and_position_ids(tiny_config, make_inputs):
    config = tiny_config()
    ours, theirs = pair("BertModel", config)
    inputs = make_inputs(config, "holes")
    kwargs = dict(inputs.kwargs)
    kwargs["inputs_embeds"] = ours.get_input_embeddings()(kwargs.pop("input_ids")).detach()
    kwargs["position_ids"] = torch.arange(9).flip(0).unsqueeze(0)
    leaves = [kwargs["inputs_embeds"].clone().requires_grad_() for _ in range(2)]
    dout = torch.randn(3, 9, config.hidden_size, dtype=DTYPE)
    dout[~inputs.attended] = 0
    for model, leaf in zip((ours, theirs), leaves, strict=True):
        out = model(**{**kwargs, "inputs_embeds": leaf}).last_hidden_state
        (out * dout).sum().backward()
    assert_close(leaves[0].grad, leaves[1].grad)
    embeddings = [m.embeddings.position_embeddings.weight.grad for m in (ours, theirs)]
    assert_close(*embeddings)
    with torch.no_grad():
        out, expected = ours(**kwargs), theirs(**kwargs)
    compare("BertModel", out, expected, inputs.attended)


def test_return_tuple(tiny_config, make_inputs):
    config = tiny_config()
    ours, theirs = pair("BertForSequenceClassification", config)
    kwargs = make_inputs(config).kwargs | {"labels": torch.tensor([0, 1, 0])}
    kwargs |= {"return_dict": False, "output_hidden_states": True}
    out, expected = ours(**kwargs), theirs(**kwargs)
    assert isinstance(out, tuple)
    assert len(out) == len(expected) == 3
    assert_close(out[:2], expected[:2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_our_checkpoint_loads_strictly_in_transformers(name, tied, tiny_config, tmp_path):
    torch.manual_seed(1)
    ours = getattr(bertfast, name)(tiny_config(tie_word_embeddings=tied))
    ours.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    assert not any(info[problem] for problem in problems), info
    weights = dict(ours.named_parameters(remove_duplicate=False))
    for key, parameter in theirs.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, weights[key]), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_their_checkpoint_loads_strictly_here(name, tied, tiny_config, tmp_path, recwarn):
    torch.manual_seed(2)
    config = oracle_config(tiny_config(tie_word_embeddings=tied))
    theirs = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    ours = getattr(bertfast, name).from_pretrained(tmp_path)
    assert not [w for w in recwarn if "anew" in str(w.message)]
    assert not ours.training
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    for key, parameter in ours.named_parameters():
        key = "cls.predictions.decoder.bias" if key == "cls.predictions.bias" else key
        assert torch.equal(parameter, weights[key]), key
    assert ours.config.num_labels == config.num_labels


def test_configs_are_the_same(tiny_config, tmp_path):
    ours = tiny_config(num_labels=3, classifier_dropout=0.25, problem_type="regression")
    ours.save(tmp_path / "config.json")
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    for name, value in ours.to_dict().items():
        if name not in ("id2label", "label2id"):
            assert getattr(theirs, name) == value, name
    assert theirs.id2label == ours.id2label
    theirs.save_pretrained(tmp_path)
    back = bertfast.BertConfig.from_json_file(tmp_path / "config.json")
    assert back.replace(extra={}) == ours


def test_transformers_defaults_are_ours():
    theirs = transformers.BertConfig()
    for name, value in bertfast.BertConfig().to_dict().items():
        if name not in ("id2label", "label2id"):
            assert getattr(theirs, name) == value, name


def test_a_foreign_transformers_checkpoint_is_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model_type: expected one of bert, .*'gpt2': it"):
        bertfast.BertModel.from_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "gpt2"
    with pytest.raises(CheckpointError, match=r"missing: bert.*unexpected: h\.0\.attn"):
        bertfast.BertModel.from_pretrained(tmp_path, config=bertfast.BertConfig())
