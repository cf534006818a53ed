"""The masking rule: how many, which ones, what stands in their place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bertfast.data import MaskVocabulary, mask_tokens

PAD, UNK, CLS, SEP, MASK = range(5)
# Ids 5 to 44 are words, 45 to 59 pieces that continue one. The special tokens are not all in front.
WORDS = [f"w{i}" for i in range(40)] + [f"##c{i}" for i in range(15)]


def vocabulary() -> MaskVocabulary:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
    return MaskVocabulary.from_tokenizer(Tokenizer(model))


VOCAB = vocabulary()
IGNORED = -100


@given(
    ids=st.lists(st.integers(0, 59), min_size=0, max_size=80),
    probability=st.floats(0, 1),
    max_predictions=st.none() | st.integers(0, 30),
    whole_word=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_properties(ids, probability, max_predictions, whole_word, seed) -> None:
    ids = np.array(ids, dtype=np.int32)
    before = ids.copy()
    options = {
        "probability": probability,
        "max_predictions": max_predictions,
        "whole_word": whole_word,
    }
    inputs, labels = mask_tokens(ids, VOCAB, np.random.default_rng(seed), **options)
    again = mask_tokens(ids, VOCAB, np.random.default_rng(seed), **options)
    assert np.array_equal(ids, before)
    assert np.array_equal(inputs, again[0])
    assert np.array_equal(labels, again[1])
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == ids.shape

    predicted = labels != IGNORED
    assert np.array_equal(labels[predicted], ids[predicted])
    assert np.array_equal(inputs[~predicted], ids[~predicted])
    assert not VOCAB.special[ids[predicted]].any()
    # What stands there now is [MASK] or an ordinary token.
    assert ((inputs[predicted] == MASK) | ~VOCAB.special[inputs[predicted]]).all()

    wanted = max(1, round(probability * len(ids)))
    if max_predictions is not None:
        wanted = min(wanted, max_predictions)
    candidates = int((~VOCAB.special[ids]).sum())
    if whole_word:
        assert predicted.sum() <= min(wanted, candidates)
    else:
        assert predicted.sum() == min(wanted, candidates)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=60), st.integers(0, 1000))
def test_whole_words_stay_together(ids, seed) -> None:
    ids = np.array(ids)
    _, labels = mask_tokens(
        ids, VOCAB, np.random.default_rng(seed), probability=0.4, whole_word=True
    )
    predicted = labels != IGNORED
    for i in range(1, len(ids)):
        if VOCAB.continuation[ids[i]] and not VOCAB.special[ids[i - 1]]:
            assert predicted[i] == predicted[i - 1]


def test_rates_are_80_10_10() -> None:
    rng = np.random.default_rng(0)
    ids = np.tile(np.arange(5, 60), 20)
    masked = kept = total = 0
    replacements = np.zeros(60)
    for _ in range(300):
        inputs, labels = mask_tokens(ids, VOCAB, rng)
        predicted = labels != IGNORED
        assert predicted.sum() == round(0.15 * len(ids))
        total += predicted.sum()
        masked += (inputs[predicted] == MASK).sum()
        kept += (inputs[predicted] == ids[predicted]).sum()
        changed = inputs[predicted & (inputs != MASK) & (inputs != ids)]
        replacements += np.bincount(changed, minlength=60)
    # A random replacement is the original one time in 55.
    for count, rate in ((masked, 0.8), (kept, 0.1 + 0.1 / 55)):
        assert abs(count / total - rate) < 4 * np.sqrt(rate * (1 - rate) / total)
    assert not replacements[:5].any()
    expected = replacements[5:].mean()
    assert (abs(replacements[5:] - expected) < 5 * np.sqrt(expected)).all()


def test_every_position_is_chosen_equally_often() -> None:
    rng = np.random.default_rng(1)
    ids = np.array([CLS, *range(5, 25), SEP])
    counts = np.zeros(len(ids))
    rounds = 4000
    for _ in range(rounds):
        counts += mask_tokens(ids, VOCAB, rng)[1] != IGNORED
    assert counts[0] == counts[-1] == 0
    rate = round(0.15 * len(ids)) / 20
    limit = 4.5 * np.sqrt(rounds * rate * (1 - rate))
    assert (abs(counts[1:-1] - rounds * rate) < limit).all()


def test_vocabulary_refuses() -> None:
    with pytest.raises(ValueError, match="expected the special tokens"):
        MaskVocabulary.from_tokenizer(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")))
    special = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    with pytest.raises(ValueError, match="expected tokens besides the special ones"):
        MaskVocabulary.from_tokenizer(Tokenizer(models.WordPiece(special, unk_token="[UNK]")))
