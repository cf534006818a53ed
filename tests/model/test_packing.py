"""Unpad once, pad once; and packed input is the same computation as padded."""

from __future__ import annotations

import pytest
import torch

import bertfast
from bertfast.model.packing import make_batch

from .conftest import DTYPE, assert_close


def batch_of(ids, mask=None, **kwargs):
    arguments = {"token_type_ids": None, "position_ids": None, "inputs_embeds": None}
    arguments |= {"cu_seqlens": None, "max_seqlen": None, "max_positions": 100, **kwargs}
    return make_batch(ids, mask, **arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_any_mask_packs_its_tokens_in_order(dtype):
    torch.manual_seed(0)
    ids = torch.randint(1, 99, (5, 7))
    mask = torch.rand(5, 7) < 0.5
    mask[3] = False
    batch = batch_of(ids, mask.to(dtype))
    lengths = mask.sum(1).tolist()
    assert batch.input_ids.tolist() == ids[mask].tolist()
    assert batch.position_ids.tolist() == torch.arange(7).expand(5, 7)[mask].tolist()
    assert batch.token_type_ids.tolist() == [0] * sum(lengths)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(6)]
    assert batch.max_seqlen == max(lengths)
    assert type(batch.max_seqlen) is int
    assert batch.attended().equal(mask)


def test_pad_is_the_inverse_and_differentiable():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    batch = batch_of(torch.ones(3, 3, dtype=torch.long), mask)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    padded = batch.pad(x)
    assert padded[mask == 1].equal(x)
    assert not padded[mask == 0].any()
    assert batch.pack(padded).equal(x)
    assert torch.autograd.gradcheck(batch.pad, x)
    assert torch.autograd.gradcheck(batch.pack, padded.detach().requires_grad_())


def test_without_padding_packing_is_a_view():
    ids = torch.arange(6).reshape(2, 3)
    for mask in (None, torch.ones_like(ids)):
        batch = batch_of(ids, mask)
        assert batch.indices is None
        assert batch.input_ids.data_ptr() == ids.data_ptr()
        assert batch.cu_seqlens.tolist() == [0, 3, 6]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(shape, mask, tiny_config):
    model = bertfast.BertModel(tiny_config())
    ids = torch.zeros(shape, dtype=torch.long)
    out = model(ids, ids if mask else None, output_hidden_states=True, output_attentions=True)
    assert out.last_hidden_state.shape == (*shape, 24)
    assert out.pooler_output.shape == (shape[0], 24)
    assert not out.pooler_output.any()
    assert [a.shape for a in out.attentions] == [(shape[0], 3, shape[1], shape[1])] * 2
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()


def test_empty_packed_batch(tiny_config):
    model = bertfast.BertModel(tiny_config()).eval()
    ids = torch.zeros(0, dtype=torch.long)
    for bounds in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        out = model(ids, cu_seqlens=cu_seqlens, max_seqlen=0)
        assert out.last_hidden_state.shape == (0, 24)
        assert out.pooler_output.equal(torch.zeros(len(bounds) - 1, 24))


@pytest.mark.parametrize(
    "name", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction",
             "BertForSequenceClassification", "BertForTokenClassification",
             "BertForQuestionAnswering", "BertForMultipleChoice"],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_packed_is_padded(name, training, tiny_config, make_inputs):
    """With the same seed even the dropout masks agree, as rows are counted on packed tokens."""
    config = tiny_config()
    torch.manual_seed(0)
    model = getattr(bertfast, name)(config).to(DTYPE).train(training)
    inputs = make_inputs(config, "right", rows=4)
    mask = inputs.attended
    labels = torch.randint(2, (4, 9)).masked_fill(~mask, -100)
    first = torch.zeros(4, dtype=torch.long)
    padded_labels = {"labels": labels}
    if name == "BertModel":
        padded_labels = {}
    elif "Sequence" in name or "Next" in name:
        padded_labels = {"labels": labels[:, 0]}
    elif name == "BertForQuestionAnswering":
        padded_labels = {"start_positions": first, "end_positions": mask.sum(1) - 1}
    elif name == "BertForMultipleChoice":
        padded_labels = {"labels": labels[:2, 0]}
    packed_labels = {
        k: v[mask] if v.shape == mask.shape else v for k, v in padded_labels.items()
    }  # fmt: skip
    more = {"output_logits": True} if name in ("BertForMaskedLM", "BertForPreTraining") else {}
    more |= {"seed": 7, "output_hidden_states": True}
    kwargs, choices = inputs.kwargs, {}
    if name == "BertForMultipleChoice":
        kwargs = {k: v.reshape(2, 2, 9) for k, v in kwargs.items()}
        choices = {"num_choices": 2}
    padded = model(**kwargs, **padded_labels, **more)
    packed = model(
        input_ids=inputs.kwargs["input_ids"][mask],
        token_type_ids=inputs.kwargs["token_type_ids"][mask],
        cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
        max_seqlen=9,
        **packed_labels,
        **more,
        **choices,
    )
    assert packed.keys() == padded.keys()
    if name != "BertModel":
        assert packed.loss.equal(padded.loss)
    for field, value in padded.items():
        if field == "hidden_states":
            for a, b in zip(packed.hidden_states, value, strict=True):
                assert a.equal(b[mask])
        else:
            assert packed[field].equal(value[mask] if value.shape[:2] == mask.shape else value)


def test_packed_attentions_are_places_in_the_sequence(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertModel(config).to(DTYPE).eval()
    inputs = make_inputs(config, "left")
    mask = inputs.attended
    padded = model(**inputs.kwargs, output_attentions=True).attentions
    columns = torch.arange(9).expand(3, 9)[mask]
    packed = model(
        inputs.kwargs["input_ids"][mask],
        token_type_ids=inputs.kwargs["token_type_ids"][mask],
        position_ids=columns,
        cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
        max_seqlen=9,
        output_attentions=True,
    ).attentions
    for a, b in zip(packed, padded, strict=True):
        for row, length in enumerate(mask.sum(1).tolist()):
            tokens = slice(9 - length, 9)
            assert_close(
                a[row, :, :length, :length], b[row, :, tokens, tokens], rtol=1e-12, atol=1e-15
            )
            assert not a[row, :, length:].any()
            assert not a[row, :, :, length:].any()
            assert_close(b[row].sum(-1), mask[row].to(DTYPE).expand(3, 9), rtol=1e-12, atol=0)


def test_an_all_masked_row_is_zeros_and_touches_nothing(tiny_config, make_inputs):
    config = tiny_config()
    model = bertfast.BertModel(config).to(DTYPE).eval()
    inputs = make_inputs(config, "right")
    mask = inputs.kwargs["attention_mask"].clone()
    for row in range(3):
        mask[row] = 0
        out = model(**{**inputs.kwargs, "attention_mask": mask}, output_attentions=True)
        assert not out.last_hidden_state[row].any()
        assert not out.pooler_output[row].any()
        assert not out.attentions[0][row].any()
        (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
    assert mask.sum() == 0  # the last round was a batch without a single token
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_padding_ids_are_never_looked_at(tiny_config, make_inputs):
    """What lies under padding, here ids outside the vocabulary, changes nothing."""
    config = tiny_config()
    model = bertfast.BertModel(config).eval()
    inputs = make_inputs(config, "holes")
    junk = inputs.kwargs["input_ids"].masked_fill(~inputs.attended, 10**9)
    a = model(**inputs.kwargs)
    b = model(**{**inputs.kwargs, "input_ids": junk})
    assert a.last_hidden_state.equal(b.last_hidden_state)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_storage_rows_reach_neither_tokens_nor_loss(name, tiny_config):
    model = getattr(bertfast, name)(tiny_config()).to(DTYPE).eval()
    ids, labels = torch.randint(37, (12,)), torch.randint(2, (12,))
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packing = {"cu_seqlens": cu_seqlens, "max_seqlen": 5}
    exact = model(ids[:9], labels=labels[:9], **packing)
    stored = model(ids, labels=labels, **packing)
    assert_close(stored.loss, exact.loss, rtol=1e-12, atol=0)
    ids[9:], labels[9:] = 3, 0
    assert model(ids, labels=labels, **packing).loss.equal(stored.loss)


def test_pooler_skips_empty_sequences(tiny_config):
    model = bertfast.BertModel(tiny_config()).to(DTYPE).eval()
    ids = torch.randint(37, (9,))
    cu_seqlens = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    out = model(ids, cu_seqlens=cu_seqlens, max_seqlen=5)
    first = out.last_hidden_state[[0, 4]]
    expected = torch.zeros(5, 24, dtype=DTYPE)
    expected[[1, 3]] = torch.tanh(model.pooler.dense(first))
    assert_close(out.pooler_output, expected, rtol=1e-12, atol=0)
