"""What the heads decide beyond transformers: labels that do not count, and none at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bertfast

from .conftest import DTYPE, assert_close

HEADS = {
    "BertForPreTraining": ("labels", "next_sentence_label"),
    "BertForMaskedLM": ("labels",),
    "BertForNextSentencePrediction": ("labels",),
    "BertForSequenceClassification": ("labels",),
    "BertForTokenClassification": ("labels",),
    "BertForQuestionAnswering": ("start_positions", "end_positions"),
    "BertForMultipleChoice": ("labels",),
}
PER_TOKEN = ("BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification")


def shaped(name, rows=4, columns=5):
    """Input ids and labels of the right shapes; the labels all ignored."""
    ids = torch.randint(37, (rows, columns))
    labels = {}
    for label in HEADS[name]:
        shape = (rows, columns) if name in PER_TOKEN and label == "labels" else (rows,)
        ignored = columns if "positions" in label else -100
        labels[label] = torch.full(shape, ignored)
    if name == "BertForMultipleChoice":
        ids, labels = ids.reshape(rows // 2, 2, columns), {"labels": torch.full((rows // 2,), -100)}
    return {"input_ids": ids, **labels}


@pytest.mark.parametrize("name", HEADS)
def test_no_label_at_all_is_loss_zero_and_gradient_zero(name, tiny_config):
    model = getattr(bertfast, name)(tiny_config())
    out = model(**shaped(name), seed=1)
    assert out.loss == 0
    out.loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), key


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", HEADS)
def test_empty_batches_have_finite_losses(name, shape, tiny_config):
    model = getattr(bertfast, name)(tiny_config())
    out = model(**shaped(name, *shape), seed=1)
    assert out.loss.isfinite()
    out.loss.backward()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_on_padding_do_not_count(name, tiny_config, make_inputs):
    config = tiny_config()
    model = getattr(bertfast, name)(config).eval()
    inputs = make_inputs(config, "left")
    labels = torch.randint(2, (3, 9))
    clean = model(**inputs.kwargs, labels=labels.masked_fill(~inputs.attended, -100)).loss
    assert clean > 0
    assert model(**inputs.kwargs, labels=labels).loss.equal(clean)


def test_logits_only_where_they_are_wanted(tiny_config, make_inputs):
    config = tiny_config()
    kwargs = make_inputs(config).kwargs
    labels = kwargs["input_ids"]
    masked = bertfast.BertForMaskedLM(config).eval()
    assert list(masked(**kwargs)) == ["logits"]
    assert list(masked(**kwargs, labels=labels)) == ["loss"]
    assert list(masked(**kwargs, labels=labels, output_logits=True)) == ["loss", "logits"]
    both = bertfast.BertForPreTraining(config).eval()
    assert list(both(**kwargs, labels=labels)) == ["loss", "seq_relationship_logits"]
    assert both(**kwargs, labels=labels, return_dict=False)[0].dim() == 0


def test_the_masked_head_sees_labelled_tokens_only(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForMaskedLM(config).eval()
    inputs = make_inputs(config)
    labels = torch.full((3, 9), -100)
    labels[2, [0, 3]] = 5
    rows = []
    model.cls.predictions.transform.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[0])
    )
    model(**inputs.kwargs, labels=labels)
    assert rows == [2]


def test_pre_training_losses_add_up(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForPreTraining(config).to(DTYPE).eval()
    kwargs = make_inputs(config).kwargs
    words = {"labels": kwargs["input_ids"]}
    order = {"next_sentence_label": torch.tensor([0, 1, 1])}
    both = model(**kwargs, **words, **order).loss
    parts = model(**kwargs, **words).loss + model(**kwargs, **order).loss
    assert_close(both, parts, rtol=1e-14, atol=0)
    assert_close(
        model(**kwargs, **order).loss,
        F.cross_entropy(model(**kwargs).seq_relationship_logits, order["next_sentence_label"]),
        rtol=1e-12,
        atol=0,
    )


def test_an_answer_is_never_on_padding(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForQuestionAnswering(config).eval()
    inputs = make_inputs(config, "left")
    out = model(**inputs.kwargs)
    for logits in (out.start_logits, out.end_logits):
        assert inputs.attended[torch.arange(3), logits.argmax(1)].all()
        assert logits.softmax(1)[~inputs.attended].eq(0).all()
    ends = inputs.attended.long().argmax(1)
    loss = model(**inputs.kwargs, start_positions=ends, end_positions=torch.full((3, 1), 8)).loss
    expected = F.cross_entropy(out.start_logits, ends)
    expected = (expected + F.cross_entropy(out.end_logits, torch.full((3,), 8))) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # An end on padding, or in a column that does not exist, does not count.
    outside = {"start_positions": torch.full((3,), 99), "end_positions": ends - 1}
    assert (ends > 0).all()
    assert model(**inputs.kwargs, **outside).loss == 0


def test_a_negative_position_is_the_first_column(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForQuestionAnswering(config).eval()
    kwargs, first = make_inputs(config, "right").kwargs, torch.zeros(3, dtype=torch.long)
    expected = model(**kwargs, start_positions=first, end_positions=first).loss
    assert expected > 0
    assert model(**kwargs, start_positions=first - 1, end_positions=first - 7).loss.equal(expected)


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_heads_give_the_encoders_layers_in_the_callers_layout(kind, tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForTokenClassification(config).to(DTYPE).eval()
    kwargs = make_inputs(config, kind).kwargs
    ask = {"output_attentions": True, "output_hidden_states": True}
    out, expected = model(**kwargs, **ask), model.bert(**kwargs, **ask)
    for got, wanted in zip(out.attentions, expected.attentions, strict=True):
        assert got.shape == (3, 3, 9, 9)
        assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    for got, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert got.equal(wanted)


def test_one_position_alone_gives_no_loss(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertForQuestionAnswering(config).eval()
    out = model(**make_inputs(config).kwargs, start_positions=torch.zeros(3, dtype=torch.long))
    assert list(out) == ["start_logits", "end_logits"]
