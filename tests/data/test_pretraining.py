"""Sentence pairs and examples by Google's recipe."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bertfast.data import MaskVocabulary, PretrainingData, make_pairs

PAD, UNK, CLS, SEP, MASK = range(5)


def vocabulary(size: int = 2000) -> MaskVocabulary:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(size - 5))]
    model = models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
    return MaskVocabulary.from_tokenizer(Tokenizer(model))


VOCAB = vocabulary()


def numbered(lengths: list[list[int]]) -> list[list[np.ndarray]]:
    """Documents with sentences of these lengths, in which every token occurs once: tokens of
    document d are d·10000 + 5, + 6, …"""
    documents = []
    for d, sentences in enumerate(lengths):
        ends = np.cumsum([0, *sentences]) + 10_000 * d + 5
        documents.append([np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)])
    return documents


corpora = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=2, max_size=6
).map(numbered)


@given(corpora, st.integers(5, 64), st.floats(0, 1), st.integers(0, 1000))
def test_pairs(documents, max_length, short_seq_prob, seed) -> None:
    def pairs():
        rng = np.random.default_rng(seed)
        return make_pairs(documents, rng, max_length=max_length, short_seq_prob=short_seq_prob)

    found = pairs()
    for pair, again in zip(found, pairs(), strict=True):
        assert np.array_equal(pair.a, again.a)
        assert np.array_equal(pair.b, again.b)
        assert pair.random_next == again.random_next
    for a, b, random_next in found:
        assert len(a) >= 1
        assert len(b) >= 1
        assert len(a) + len(b) <= max_length - 3
        for side in (a, b):  # a piece of one document, in order, without a gap
            assert (np.diff(side) == 1).all()
        same_document = a[0] // 10_000 == b[0] // 10_000
        assert random_next == (not same_document)
        if not random_next:
            assert b[0] > a[-1]
    # Document by document, and each is read from its start on.
    order = [int(a[0]) // 10_000 for a, _, _ in found]
    assert order == sorted(order)
    assert set(order) == set(range(len(documents)))


@given(corpora, st.integers(0, 1000))
def test_nothing_is_lost_but_by_truncation(documents, seed) -> None:
    """The unused part of a chunk is put back: with sequences longer than any document, the A and
    the true B sides together hold every token of the corpus."""
    pairs = make_pairs(documents, np.random.default_rng(seed), max_length=2000, short_seq_prob=0)
    read = [
        token for a, b, random in pairs for side in ([a] if random else [a, b]) for token in side
    ]
    assert read == [token for document in documents for sentence in document for token in sentence]


def test_true_next_follows_directly() -> None:
    documents = numbered([[3] * 40, [3] * 40])
    rng = np.random.default_rng(0)
    pairs = make_pairs(documents, rng, max_length=1003, short_seq_prob=0)
    true = [pair for pair in pairs if not pair.random_next]
    assert true
    assert all(pair.b[0] == pair.a[-1] + 1 for pair in true)


def test_half_of_the_pairs_are_random_and_one_sentence_always_is() -> None:
    documents = numbered([[5] * 200] * 20)
    rng = np.random.default_rng(0)
    pairs = make_pairs(documents, rng, max_length=43, short_seq_prob=0.1)
    # The last chunk of a document may be one sentence, which is always random.
    rate = np.mean([pair.random_next for pair in pairs[: len(pairs)]])
    assert abs(rate - 0.5) < 4 * 0.5 / np.sqrt(len(pairs)) + 20 / len(pairs)
    single = make_pairs(numbered([[4], [4], [4]]), np.random.default_rng(0))
    assert [pair.random_next for pair in single] == [True] * 3


def test_random_next_comes_from_all_other_documents_alike() -> None:
    documents = numbered([[4]] * 5)
    counts = np.zeros((5, 5))
    rng = np.random.default_rng(0)
    for _ in range(800):
        for a, b, _random in make_pairs(documents, rng, max_length=16):
            counts[a[0] // 10_000, b[0] // 10_000] += 1
    assert not counts.diagonal().any()
    others = counts[~np.eye(5, dtype=bool)]
    assert (abs(others - 200) < 4.5 * np.sqrt(200 * 0.75)).all()


def test_short_targets() -> None:
    documents = numbered([[2] * 300] * 60)
    lengths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pairs = make_pairs(documents, rng, max_length=67, short_seq_prob=1.0)
        lengths += [len(a) + len(b) for a, b, _ in pairs]
    assert min(lengths) <= 6
    assert max(lengths) >= 58
    full = make_pairs(documents, np.random.default_rng(0), max_length=67, short_seq_prob=0.0)
    assert np.mean([len(a) + len(b) for a, b, _ in full]) > 60


def test_truncation_takes_from_both_ends() -> None:
    documents = numbered([[50], [50]])
    starts = []
    for seed in range(200):
        a, b, _ = make_pairs(documents, np.random.default_rng(seed), max_length=23)[0]
        assert (len(a), len(b)) == (10, 10)
        starts.append(a[0] - 5)
    assert abs(np.mean(starts) - 20) < 4 * np.sqrt(40 * 0.25 / 200)


@given(corpora, st.integers(5, 64), st.booleans(), st.integers(0, 100))
def test_examples(documents, max_length, whole_word, seed) -> None:
    small = [[sentence % 1000 + 5 for sentence in document] for document in documents]
    data = PretrainingData(
        small, VOCAB, max_length=max_length, whole_word=whole_word, seed=seed, max_predictions=7
    )
    for example in data.epoch(seed % 3):
        ids, types, labels, label = example
        original = np.where(labels == -100, ids, labels)
        assert 5 <= len(ids) <= max_length
        assert label in (0, 1)
        assert original[0] == CLS
        assert np.flatnonzero(original == SEP).tolist() == [types.argmax() - 1, len(ids) - 1]
        assert (original == CLS).sum() == 1
        assert np.array_equal(types, np.sort(types))
        assert set(types) == {0, 1}
        assert (labels[[0, types.argmax() - 1, -1]] == -100).all()
        assert 1 <= (labels != -100).sum() <= 7


def test_epochs_are_a_function_of_seed_and_number() -> None:
    documents = [[s % 1000 + 5 for s in d] for d in numbered([[7] * 30] * 8)]

    def flat(number: int, **options) -> list[list[int]]:
        data = PretrainingData(documents, VOCAB, max_length=32, **options)
        return [example.input_ids.tolist() for example in data.epoch(number)]

    assert flat(3) == flat(3)
    assert flat(0) != flat(1)
    assert flat(0) != flat(0, seed=1)
    static = [flat(number, dynamic=False) for number in (0, 1)]
    assert static[0] != static[1]
    assert sorted(static[0]) == sorted(static[1])


def test_fingerprint_tells_data_apart() -> None:
    documents = [[s % 1000 + 5 for s in d] for d in numbered([[3, 4], [5]])]
    regrouped = [[s % 1000 + 5 for s in d] for d in numbered([[4, 3], [5]])]
    one = PretrainingData(documents, VOCAB).fingerprint()
    assert one == PretrainingData(documents, VOCAB).fingerprint()
    assert one != PretrainingData(documents, VOCAB, seed=1).fingerprint()
    assert one != PretrainingData(regrouped, VOCAB).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": numbered([[3, 3]])}, "documents: expected at least 2"),
        ({"documents": [*numbered([[3]]), []]}, "documents: expected at least one token"),
        (
            {"documents": [[np.zeros(0, int)], [np.ones(1, int)]]},
            "documents: expected at least one",
        ),
        ({"max_length": 4}, "max_length: expected at least 5"),
        ({"short_seq_prob": 1.5}, "short_seq_prob: expected a probability"),
        ({"mask_probability": -0.1}, "mask_probability: expected a probability"),
        ({"max_predictions": -1}, "max_predictions: expected at least 0"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_refuses(change, message) -> None:
    arguments = {"documents": numbered([[3], [3]]), "vocab": VOCAB, **change}
    with pytest.raises(ValueError, match=message):
        PretrainingData(**arguments)
