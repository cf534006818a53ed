"""Sentence pairs for pre-training, by the recipe of Google's BERT code, and their masks.

The recipe, for one document: sentences are gathered until they reach the target length
(``max_length`` − 3, or, with probability ``short_seq_prob`` per document, a shorter random one).
The gathered chunk is cut after a random sentence: the first part is A. With probability 1/2, or if
the chunk is a single sentence, B is text from a random *other* document and the unused part of the
chunk is put back; else B is the rest of the chunk. A pair that is too long loses tokens from the
longer side, from its front or its end by chance. Label 1 means that B is random, 0 that it follows
A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bertfast.data.masking import MaskVocabulary, mask_tokens


class Pair(NamedTuple):
    """Token ids of A and B, int32 ``(tokens,)`` each, and whether B is from another document."""

    a: np.ndarray
    b: np.ndarray
    random_next: bool


class Example(NamedTuple):
    """One training sequence of n ≤ max_length tokens: ``[CLS] A [SEP] B [SEP]``.

    input_ids, token_type_ids (0 for A, 1 for B), labels (−100 where nothing is predicted): int64
    ``(n,)``. next_sentence_label: 1 when B is random, 0 when it follows A.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    next_sentence_label: int


def truncate_pair(
    a: np.ndarray, b: np.ndarray, max_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Drop tokens, one by one, from the longer of ``a`` and ``b`` (``b`` when equal), from its
    front or its end with equal chance, until both together have at most ``max_tokens``."""
    a_start, a_end, b_start, b_end = 0, len(a), 0, len(b)
    excess = len(a) + len(b) - max_tokens
    for from_front in rng.random(max(excess, 0)) < 0.5:
        if a_end - a_start > b_end - b_start:
            a_start, a_end = (a_start + 1, a_end) if from_front else (a_start, a_end - 1)
        else:
            b_start, b_end = (b_start + 1, b_end) if from_front else (b_start, b_end - 1)
    return a[a_start:a_end], b[b_start:b_end]


def make_pairs(
    documents: Sequence[Sequence[np.ndarray]],
    rng: np.random.Generator,
    *,
    max_length: int = 128,
    short_seq_prob: float = 0.1,
) -> list[Pair]:
    """Sentence pairs of all documents, once through, in document order.

    ``documents``: lists of sentences, each an int array of at least one token id (see
    ``encode_documents``). ``max_length``: longest sequence in tokens, the three special ones
    included, at least 5.

    Raises ValueError for fewer than two documents (the random B would have nowhere to come from),
    an empty document, a ``max_length`` below 5 or a ``short_seq_prob`` outside [0, 1].
    """
    _check(documents, max_length, short_seq_prob)
    pairs = []
    for index in range(len(documents)):
        pairs += _pairs_of_document(documents, index, rng, max_length - 3, short_seq_prob)
    return pairs


def _check(
    documents: Sequence[Sequence[np.ndarray]], max_length: int, short_seq_prob: float
) -> None:
    if len(documents) < 2:
        raise ValueError(
            "documents: expected at least 2, so that a random next sentence exists, "
            f"got {len(documents)}"
        )
    if any(
        not len(document) or not all(len(sentence) for sentence in document)
        for document in documents
    ):
        raise ValueError(
            "documents: expected at least one token in every sentence "
            "and one sentence in every document"
        )
    if max_length < 5:
        raise ValueError(
            f"max_length: expected at least 5 (three special tokens, A and B), got {max_length}"
        )
    if not 0 <= short_seq_prob <= 1:
        raise ValueError(f"short_seq_prob: expected a probability, got {short_seq_prob!r}")


def _pairs_of_document(
    documents: Sequence[Sequence[np.ndarray]],
    index: int,
    rng: np.random.Generator,
    max_tokens: int,
    short_seq_prob: float,
) -> list[Pair]:
    document = documents[index]
    target = max_tokens
    if rng.random() < short_seq_prob:
        target = int(rng.integers(2, max_tokens + 1))
    pairs = []
    start = 0
    while start < len(document):
        end, length = start, 0
        while end < len(document) and length < target:
            length += len(document[end])
            end += 1
        cut = start + (int(rng.integers(1, end - start)) if end - start >= 2 else 1)
        a = np.concatenate(document[start:cut])
        random_next = end - start == 1 or bool(rng.random() < 0.5)
        if random_next:
            b = _text_from_elsewhere(documents, index, rng, target - len(a))
            start = cut
        else:
            b = np.concatenate(document[cut:end])
            start = end
        a, b = truncate_pair(a, b, max_tokens, rng)
        pairs.append(Pair(a, b, random_next))
    return pairs


def _text_from_elsewhere(
    documents: Sequence[Sequence[np.ndarray]], index: int, rng: np.random.Generator, wanted: int
) -> np.ndarray:
    # Drawing among the other documents only: with a retry, as Google's code does it, the draw can
    # still end on this one.
    other = int(rng.integers(len(documents) - 1))
    document = documents[other + (other >= index)]
    start = int(rng.integers(len(document)))
    end, length = start, 0
    while end < len(document) and (end == start or length < wanted):
        length += len(document[end])
        end += 1
    return np.concatenate(document[start:end])


class PretrainingData:
    """Endless epochs of pre-training examples from encoded documents, reproducible by number.

    ``epoch(e)`` depends only on the documents, the settings, ``seed`` and ``e``, so a run is
    resumed by knowing the epoch and the batch. With ``dynamic=True`` every epoch draws new pairs
    and new masks; with ``dynamic=False`` all epochs hold epoch 0's examples and only their order
    changes.

    documents: see ``encode_documents``. max_length: longest sequence in tokens. mask_probability,
    max_predictions (default: ``mask_probability`` × ``max_length``, rounded up), whole_word: see
    ``mask_tokens``. short_seq_prob: see ``make_pairs``. Raises ValueError as ``make_pairs`` does,
    and for a probability outside [0, 1].
    """

    def __init__(
        self,
        documents: Sequence[Sequence[np.ndarray]],
        vocab: MaskVocabulary,
        *,
        max_length: int = 128,
        short_seq_prob: float = 0.1,
        mask_probability: float = 0.15,
        max_predictions: int | None = None,
        whole_word: bool = False,
        dynamic: bool = True,
        seed: int = 0,
    ) -> None:
        _check(documents, max_length, short_seq_prob)
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"mask_probability: expected a probability, got {mask_probability!r}")
        if max_predictions is None:
            max_predictions = int(np.ceil(mask_probability * max_length))
        if max_predictions < 0:
            raise ValueError(f"max_predictions: expected at least 0, got {max_predictions}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.documents = documents
        self.vocab = vocab
        self.max_length = max_length
        self.short_seq_prob = short_seq_prob
        self.mask_probability = mask_probability
        self.max_predictions = max_predictions
        self.whole_word = whole_word
        self.dynamic = dynamic
        self.seed = seed

    def epoch(self, number: int) -> list[Example]:
        """All examples of epoch ``number`` ≥ 0, shuffled."""
        rng = np.random.default_rng([self.seed, number if self.dynamic else 0, 0])
        pairs = make_pairs(
            self.documents, rng, max_length=self.max_length, short_seq_prob=self.short_seq_prob
        )
        examples = [self._example(pair, rng) for pair in pairs]
        order = np.random.default_rng([self.seed, number, 1]).permutation(len(examples))
        return [examples[i] for i in order]

    def _example(self, pair: Pair, rng: np.random.Generator) -> Example:
        cls, sep = self.vocab.cls_id, self.vocab.sep_id
        ids = np.concatenate([[cls], pair.a, [sep], pair.b, [sep]])
        token_type_ids = (np.arange(len(ids)) >= len(pair.a) + 2).astype(np.int64)
        inputs, labels = mask_tokens(
            ids,
            self.vocab,
            rng,
            probability=self.mask_probability,
            max_predictions=self.max_predictions,
            whole_word=self.whole_word,
        )
        return Example(inputs, token_type_ids, labels, int(pair.random_next))

    def fingerprint(self) -> dict[str, int | float | bool | str]:
        """Settings and a hash of the token ids: two data sets with equal fingerprints give equal
        epochs."""
        digest = hashlib.sha256()
        for document in self.documents:
            for sentence in document:
                digest.update(
                    np.ascontiguousarray(sentence, dtype=np.int32).tobytes() + b"\xff\xff\xff\xff"
                )
            digest.update(b"\xfe\xff\xff\xff")
        return {
            "tokens": digest.hexdigest(),
            "vocab_size": len(self.vocab.special),
            "max_length": self.max_length,
            "short_seq_prob": self.short_seq_prob,
            "mask_probability": self.mask_probability,
            "max_predictions": self.max_predictions,
            "whole_word": self.whole_word,
            "dynamic": self.dynamic,
            "seed": self.seed,
        }
