"""Every bad input is refused by a message that names the argument, what was expected, what came."""

from __future__ import annotations

import re

import pytest
import torch

import bertfast

IDS = torch.ones(2, 5, dtype=torch.long)
PACKED = torch.ones(9, dtype=torch.long)
BOUNDS = torch.tensor([0, 4, 9], dtype=torch.int32)
EMBEDS = torch.zeros(2, 5, 24)


def packed(**changes):
    return {"input_ids": PACKED, "cu_seqlens": BOUNDS, "max_seqlen": 5, **changes}


def padded(**changes):
    return {"input_ids": IDS, **changes}


BAD = [
    ({}, ValueError, "input_ids, inputs_embeds: expected exactly one of them, got neither"),
    (padded(inputs_embeds=EMBEDS), ValueError,
     "input_ids, inputs_embeds: expected exactly one of them, got both"),
    (padded(input_ids=IDS * 37), ValueError,
     "input_ids: expected values from 0 to 36, got 37 at position 0"),
    (padded(input_ids=-IDS), ValueError, "input_ids: expected values from 0 to 36, got -1"),
    (padded(input_ids=IDS.float()), TypeError,
     "input_ids: expected an int64 or int32 tensor, got torch.float32"),
    (padded(input_ids=[[1, 2]]), TypeError, "input_ids: expected a tensor, got list"),
    (padded(input_ids=IDS[0]), ValueError,
     "input_ids: expected shape (B, S) for padded input, got (5,)"),
    (padded(input_ids=IDS.unsqueeze(0)), ValueError,
     "input_ids: expected shape (B, S) for padded input, got (1, 2, 5)"),
    (padded(input_ids=torch.ones(1, 17, dtype=torch.long)), ValueError,
     "input_ids: expected sequences no longer than the position table "
     "(max_position_embeddings=16), got 17 tokens"),
    (padded(token_type_ids=IDS * 2), ValueError,
     "token_type_ids: expected values from 0 to 1, got 2 at position 0"),
    (padded(token_type_ids=IDS[:, :3]), ValueError,
     "token_type_ids: expected shape (2, 5), got (2, 3)"),
    (padded(token_type_ids=IDS.float()), TypeError, "token_type_ids: expected an int64 or int32"),
    (padded(position_ids=IDS * 16), ValueError, "position_ids: expected values from 0 to 15, got"),
    (padded(position_ids=IDS[0]), ValueError, "position_ids: expected shape (2, 5), got (5,)"),
    (padded(attention_mask=IDS.float()), TypeError,
     "attention_mask: expected integers or bools, 1 for a token and 0 for padding, got "
     "torch.float32; additive float masks are not supported"),
    (padded(attention_mask=torch.ones(2, 5, 5).long()), ValueError,
     "attention_mask: expected shape (B, S), one row per sequence, got (2, 5, 5); "
     "masks per query are not supported"),
    (padded(attention_mask=IDS[:, :4]), ValueError,
     "attention_mask: expected shape (2, 5), got (2, 4)"),
    (padded(attention_mask=IDS * 2), ValueError, "attention_mask: expected only 0 and 1, got 2"),
    (padded(attention_mask=-IDS), ValueError, "attention_mask: expected only 0 and 1, got -1"),
    (padded(attention_mask=[[1]]), TypeError, "attention_mask: expected a tensor, got list"),
    (padded(attention_mask=IDS.to("meta")), ValueError,
     "attention_mask: expected device cpu as input_ids, got meta"),
    (padded(token_type_ids=IDS.to("meta")), ValueError,
     "token_type_ids: expected device cpu as input_ids, got meta"),
    (padded(input_ids=IDS.to("meta")), ValueError,
     "input_ids: expected device cpu as word, got meta"),
    ({"inputs_embeds": IDS.unsqueeze(2)}, TypeError,
     "inputs_embeds: expected a floating-point tensor, got torch.int64"),
    ({"inputs_embeds": EMBEDS[..., :7]}, ValueError,
     "inputs_embeds: expected vectors of hidden_size 24, got 7"),
    ({"inputs_embeds": EMBEDS[0]}, ValueError,
     "inputs_embeds: expected shape (B, S, H) for padded input, got (5, 24)"),
    ({"inputs_embeds": EMBEDS.double()}, TypeError,
     "inputs_embeds: expected torch.float32 as the model, got torch.float64"),
    (padded(max_seqlen=5), ValueError,
     "cu_seqlens: expected it with max_seqlen (packed input), got None"),
    (packed(max_seqlen=None), TypeError,
     "max_seqlen: expected an integer with cu_seqlens (packed input), got NoneType"),
    (packed(max_seqlen=True), TypeError, "max_seqlen: expected an integer"),
    (packed(max_seqlen=torch.tensor(5)), TypeError, "max_seqlen: expected an integer"),
    (packed(max_seqlen=4), ValueError, "max_seqlen: expected at least the longest sequence, 5"),
    (packed(max_seqlen=-1), ValueError, "max_seqlen: expected at least the longest sequence, 5"),
    (packed(attention_mask=PACKED), ValueError, "attention_mask: expected None with cu_seqlens"),
    (packed(input_ids=IDS), ValueError,
     "input_ids: expected shape (T) for packed input, got (2, 5)"),
    (packed(cu_seqlens=BOUNDS.long()), TypeError,
     "cu_seqlens: expected an int32 tensor, got torch.int64"),
    (packed(cu_seqlens=[0, 4, 9]), TypeError, "cu_seqlens: expected a tensor, got list"),
    (packed(cu_seqlens=BOUNDS[:0]), ValueError, "cu_seqlens: expected shape (batch + 1,), got (0,"),
    (packed(cu_seqlens=BOUNDS.unsqueeze(0)), ValueError, "cu_seqlens: expected shape (batch + 1,)"),
    (packed(cu_seqlens=BOUNDS + 1), ValueError, "cu_seqlens: expected to start at 0, got 1"),
    (packed(cu_seqlens=torch.tensor([0, 6, 4]).int()), ValueError,
     "cu_seqlens: expected values that never fall, got 6 before 4 at position 2"),
    (packed(cu_seqlens=torch.tensor([0, 10]).int(), max_seqlen=10), ValueError,
     "cu_seqlens: expected to end at or before 9 tokens, got 10"),
    (packed(cu_seqlens=BOUNDS.to("meta")), ValueError,
     "cu_seqlens: expected device cpu as input_ids, got meta"),
    (packed(input_ids=torch.ones(17).long(), cu_seqlens=torch.tensor([0, 17]).int(),
            max_seqlen=17), ValueError,
     "cu_seqlens: expected sequences no longer than the position table "
     "(max_position_embeddings=16), got 17 tokens"),
    (packed(position_ids=PACKED[:8]), ValueError, "position_ids: expected shape (9,), got (8,)"),
    (packed(token_type_ids=IDS), ValueError, "token_type_ids: expected shape (9,), got (2, 5)"),
    (padded(seed="1"), TypeError, "seed: expected an integer or a tensor, got str"),
    (padded(seed=True), TypeError, "seed: expected an integer or a tensor, got bool"),
    (padded(seed=2**63), ValueError, f"seed: expected a signed 64-bit integer, got {2**63}"),
    (padded(seed=torch.tensor([1.0])), TypeError,
     "seed: expected an int64 tensor of one element, got torch.float32 of shape (1,)"),
    (padded(seed=torch.tensor([1, 2])), TypeError, "seed: expected an int64 tensor of one element"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_config):
    config = tiny_config()
    names = ("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification",
             "BertForTokenClassification", "BertForQuestionAnswering", "BertForMultipleChoice",
             "BertForNextSentencePrediction")  # fmt: skip
    return {name: getattr(bertfast, name)(config) for name in names}


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD)
def test_inputs(kwargs, error, message, models):
    for name in ("BertModel", "BertForTokenClassification"):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            models[name](**kwargs)


BAD_LABELS = [
    ("BertForMaskedLM", {"labels": IDS * 37}, ValueError,
     "labels: expected values from 0 to 36 (or -100), got 37 at position 0"),
    ("BertForMaskedLM", {"labels": -IDS}, ValueError, "labels: expected values from 0 to 36 (or"),
    ("BertForMaskedLM", {"labels": IDS[0]}, ValueError, "labels: expected shape (2, 5), got (5,)"),
    ("BertForMaskedLM", {"labels": IDS.float()}, TypeError, "labels: expected an int64 or int32"),
    ("BertForMaskedLM", {"labels": [1]}, TypeError, "labels: expected a tensor, got list"),
    ("BertForPreTraining", {"next_sentence_label": torch.tensor([0, 2])}, ValueError,
     "next_sentence_label: expected values from 0 to 1 (or -100), got 2 at position 1"),
    ("BertForPreTraining", {"next_sentence_label": torch.tensor([0])}, ValueError,
     "next_sentence_label: expected shape (2,), got (1,)"),
    ("BertForNextSentencePrediction", {"labels": torch.tensor([0, -1])}, ValueError,
     "labels: expected values from 0 to 1 (or -100), got -1"),
    ("BertForSequenceClassification", {"labels": torch.tensor([0, 5])}, ValueError,
     "labels: expected values from 0 to 1 (or -100), got 5"),
    ("BertForSequenceClassification", {"labels": torch.tensor([0.0, 1.0])}, ValueError,
     "labels: expected shape (2, 2), got (2,)"),
    ("BertForTokenClassification", {"labels": IDS * 2}, ValueError,
     "labels: expected values from 0 to 1 (or -100), got 2"),
    ("BertForTokenClassification", {"labels": IDS.to("meta")}, ValueError,
     "labels: expected device cpu as input, got meta"),
    ("BertForQuestionAnswering", {"start_positions": IDS, "end_positions": IDS}, ValueError,
     "start_positions: expected shape (2,), got (2, 5)"),
    ("BertForQuestionAnswering",
     {"start_positions": IDS[:, 0], "end_positions": IDS[:, 0].float()}, TypeError,
     "end_positions: expected an int64 or int32 tensor, got torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "labels", "error", "message"), BAD_LABELS)
def test_labels(name, labels, error, message, models):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        models[name](IDS, **labels)


BAD_CHOICES = [
    ({"input_ids": IDS}, ValueError, "input_ids: expected shape (B, choices, S), got (2, 5)"),
    ({"inputs_embeds": EMBEDS}, ValueError,
     "inputs_embeds: expected shape (B, choices, S, H), got (2, 5, 24)"),
    ({"input_ids": IDS.unsqueeze(1), "attention_mask": IDS}, ValueError,
     "attention_mask: expected shape (B, choices, S), got (2, 5)"),
    ({"input_ids": IDS.unsqueeze(1), "num_choices": 1}, ValueError, "num_choices: expected None"),
    (packed(), ValueError, "num_choices: expected an integer >= 1 for packed input, got None"),
    (packed(num_choices=0), ValueError, "num_choices: expected an integer >= 1 for packed input"),
    (packed(num_choices=3), ValueError,
     "num_choices: expected a divisor of the 2 packed sequences, got 3"),
    (packed(num_choices=2, labels=torch.tensor([2])), ValueError,
     "labels: expected values from 0 to 1 (or -100), got 2 at position 0"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_CHOICES)
def test_choices(kwargs, error, message, models):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        models["BertForMultipleChoice"](**kwargs)


OFF = {
    "head_mask": None, "past_key_values": None, "use_cache": False, "cache_position": None,
    "encoder_hidden_states": None, "encoder_attention_mask": None, "position_bias": None,
    "num_items_in_batch": None, "output_hidden_states": None, "output_attentions": None,
    "return_dict": None,
}  # fmt: skip


def test_transformers_keywords_are_taken_where_they_ask_for_nothing(models):
    for name, model in models.items():
        ids = IDS.unsqueeze(1) if name == "BertForMultipleChoice" else IDS
        assert list(model(ids, **OFF)) == list(model(ids))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"head_mask": torch.ones(2, 3)}, ValueError, "head_mask: expected None, got Tensor"),
        ({"past_key_values": ()}, ValueError, "past_key_values: expected None, got tuple ()"),
        ({"use_cache": True}, ValueError, "use_cache: expected None or False, got bool True"),
        ({"encoder_hidden_states": EMBEDS}, ValueError, "encoder_hidden_states: expected None"),
        ({"encoder_attention_mask": IDS}, ValueError, "encoder_attention_mask: expected None"),
        ({"atention_mask": IDS}, TypeError, "atention_mask: expected a keyword of Bert"),
        ({"output_hidden_states": [0]}, TypeError,
         "output_hidden_states: expected True, False or None, got list [0]"),
        ({"output_attentions": 1}, TypeError, "output_attentions: expected True, False or None"),
        ({"return_dict": "yes"}, TypeError, "return_dict: expected True, False or None, got str"),
    ],
)  # fmt: skip
def test_keywords_that_ask_for_something_else(kwargs, error, message, models):
    for name, model in models.items():
        ids = IDS.unsqueeze(1) if name == "BertForMultipleChoice" else IDS
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            model(ids, **kwargs)


def test_a_number_of_items_is_for_one_loss_only(models):
    for name in ("BertModel", "BertForPreTraining", "BertForQuestionAnswering"):
        with pytest.raises(ValueError, match=r"^num_items_in_batch: expected None, got int 3"):
            models[name](IDS, num_items_in_batch=3)
    for value in (-1, True, 2.5, torch.ones(2), torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^num_items_in_batch: expected an integer >= 0"):
            models["BertForMaskedLM"](IDS, labels=IDS, num_items_in_batch=value)


def test_models_want_a_config(tiny_config):
    for config in ({"hidden_size": 8}, None, "bert"):
        with pytest.raises(TypeError, match=r"^config: expected a BertConfig, got "):
            bertfast.BertModel(config)
    broken = tiny_config()
    broken.hidden_size = 25
    with pytest.raises(ValueError, match=r"^hidden_size: expected a multiple"):
        bertfast.BertForMaskedLM(broken)
    with pytest.raises(ValueError, match=r"^num_labels: expected 2 for question answering.*got 3$"):
        bertfast.BertForQuestionAnswering(tiny_config(num_labels=3))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("BertForSequenceClassification", "labels"),
        ("BertForMultipleChoice", "labels"),
        ("BertForMultipleChoice", "attention_mask"),
        ("BertForTokenClassification", "labels"),
        ("BertForNextSentencePrediction", "labels"),
        ("BertForMaskedLM", "labels"),
        ("BertForPreTraining", "next_sentence_label"),
        ("BertForQuestionAnswering", "end_positions"),
    ],
)
def test_lists_are_no_tensors(name, argument, tiny_config):
    model = getattr(bertfast, name)(tiny_config(num_labels=2))
    ids = IDS.unsqueeze(1) if "Choice" in name else IDS
    more = {"start_positions": torch.zeros(2).long()} if "Question" in name else {}
    with pytest.raises(TypeError, match=rf"^{argument}: expected a tensor, got list"):
        model(ids, **more, **{argument: [0, 1]})
