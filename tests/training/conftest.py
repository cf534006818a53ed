"""A toy language that a tiny model learns in seconds, and a tiny model."""

import numpy as np
import pytest
import torch

import bertfast
from bertfast.data import MaskVocabulary, PretrainingData, encode_documents, train_vocab

SUBJECTS = ["cats", "dogs", "birds", "fish"]
VERBS = {"cats": "chase", "dogs": "follow", "birds": "watch", "fish": "flee"}
OBJECTS = {"chase": "mice", "follow": "people", "watch": "worms", "flee": "sharks"}


def _documents(number: int) -> list[list[str]]:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(number):
        subject = SUBJECTS[rng.integers(4)]
        verb = VERBS[subject]
        sentence = f"{subject} {verb} {OBJECTS[verb]} ."
        documents.append([sentence] * int(rng.integers(4, 10)))
    return documents


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For every test in this folder."""


@pytest.fixture(scope="session")
def tokenizer():
    return train_vocab(_documents(40), 200)


@pytest.fixture(scope="session")
def toy_data(tokenizer):
    documents = encode_documents(_documents(40), tokenizer)
    vocab = MaskVocabulary.from_tokenizer(tokenizer)
    return PretrainingData(documents, vocab, max_length=20, seed=1)


@pytest.fixture
def new_model(tokenizer):
    def make(seed: int = 0, dropout: float = 0.1, layers: int = 2) -> torch.nn.Module:
        torch.manual_seed(seed)
        return bertfast.BertForPreTraining(
            bertfast.BertConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=32,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=32,
                # About 1/sqrt(hidden size); BERT's 0.02 makes a model this narrow learn slowly.
                initializer_range=0.1,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )

    return make
