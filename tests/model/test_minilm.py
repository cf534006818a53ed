"""A real model: all-MiniLM-L6-v2 gives the similarities of its model card."""

from __future__ import annotations

import pytest
import torch

import bertfast

from .conftest import DTYPE, assert_close

SENTENCES = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
]


@pytest.fixture(scope="module")
def encoded(minilm):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    ids = torch.tensor([e.ids for e in encodings])
    return ids, torch.tensor([e.attention_mask for e in encodings])


def test_similarities_of_the_model_card(minilm, encoded):
    ids, mask = encoded
    assert not mask.all()  # the sentences differ in length, so padding takes part
    model = bertfast.BertModel.from_pretrained(minilm)
    assert model.dtype == torch.float32
    with torch.no_grad():
        hidden = model(ids, mask).last_hidden_state
    # Padding is zeros, so the sum over columns is the sum over tokens.
    vectors = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True))
    similar = vectors @ vectors.T
    got = [round(similar[i, j].item(), 4) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert got == [0.6660, 0.1046, 0.1411]


def test_every_number_is_that_of_transformers(minilm, encoded):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    ids, mask = encoded
    ours = bertfast.BertModel.from_pretrained(minilm, dtype=DTYPE)
    theirs = transformers.BertModel.from_pretrained(minilm, dtype=DTYPE)
    with torch.no_grad():
        got, expected = ours(ids, mask), theirs(ids, mask)
    attended = mask.bool()
    assert_close(got.last_hidden_state[attended], expected.last_hidden_state[attended])
    assert_close(got.pooler_output, expected.pooler_output)
