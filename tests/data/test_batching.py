"""Packed and padded batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bertfast
from bertfast.data import Example, group, pack, pad


def example(length: int, seed: int = 0) -> Example:
    rng = np.random.default_rng([seed, length])
    ids = rng.integers(5, 50, length)
    labels = np.where(rng.random(length) < 0.3, ids, -100)
    return Example(ids, (np.arange(length) > length // 2).astype(np.int64), labels, seed % 2)


def examples(lengths: list[int]) -> list[Example]:
    return [example(length, i) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 30), max_size=12))
def test_packed_holds_what_padded_holds(lengths: list[int]) -> None:
    packed, padded = pack(examples(lengths)), pad(examples(lengths), pad_id=3)
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["cu_seqlens"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert packed["max_seqlen"] == max(lengths, default=0)
    mask = padded["attention_mask"].bool()
    assert mask.sum(1).tolist() == lengths
    for key in ("input_ids", "token_type_ids", "labels"):
        assert packed[key].dtype == torch.int64
        assert torch.equal(packed[key], padded[key][mask])
    assert (padded["input_ids"][~mask] == 3).all()
    assert (padded["labels"][~mask] == -100).all()
    assert torch.equal(packed["next_sentence_label"], padded["next_sentence_label"])


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 50))
def test_groups_keep_order_and_budget(lengths: list[int], size: int) -> None:
    all_of_them = examples(lengths)
    by_tokens = list(group(all_of_them, tokens=size))
    by_number = list(group(all_of_them, sequences=size))
    for groups in (by_tokens, by_number):
        assert [id(e) for g in groups for e in g] == [id(e) for e in all_of_them]
        assert all(groups)
    totals = [sum(len(e.input_ids) for e in one) for one in by_tokens]
    assert all(n <= size or len(g) == 1 for n, g in zip(totals, by_tokens, strict=True))
    for total, after in zip(totals, by_tokens[1:], strict=False):
        assert total + len(after[0].input_ids) > size  # the next example would not have fitted
    assert [len(g) for g in by_number[:-1]] == [size] * (len(by_number) - 1)


def test_group_refuses() -> None:
    for arguments in ({}, {"sequences": 1, "tokens": 1}):
        with pytest.raises(ValueError, match="expected exactly one of them"):
            list(group([], **arguments))
    for arguments in ({"sequences": 0}, {"tokens": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            list(group([], **arguments))


def test_the_model_gives_the_same_loss_on_packed_and_on_padded() -> None:
    torch.manual_seed(0)
    model = bertfast.BertForPreTraining(
        bertfast.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    ).double()
    model.eval()
    batch = examples([9, 1, 30, 17])
    packed, padded = model(**pack(batch)), model(**pad(batch))
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=0)
    # With dropout too: the masks belong to the tokens, wherever they lie.
    model.train()
    seed = torch.tensor([7])
    packed, padded = model(**pack(batch), seed=seed), model(**pad(batch), seed=seed)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=0)
