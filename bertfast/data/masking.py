"""Masked language modelling: which tokens are hidden, and what stands in their place.

The rule is Google's (create_pretraining_data.py): of a sequence of n tokens, min(max_predictions,
max(1, round(0.15 n))) are to be predicted; of these 80 % become [MASK], 10 % stay, 10 % become a
random token. Two things differ on purpose: [UNK] is never predicted, and the random token is never
a special one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from bertfast.data.vocab import special_ids

IGNORE = -100


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking knows of a vocabulary of V tokens.

    ``mask_id``, ``cls_id``, ``sep_id``, ``pad_id``: ids. ``special`` (V,) bool: the five special
    tokens. ``continuation`` (V,) bool: pieces that continue a word ("##ing"). ``ordinary`` (V −
    specials,) int64: the ids that a random replacement is drawn from.
    """

    mask_id: int
    cls_id: int
    sep_id: int
    pad_id: int
    special: np.ndarray
    continuation: np.ndarray
    ordinary: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> MaskVocabulary:
        """Read a WordPiece tokenizer. Raises ValueError when a special token is missing or no other
        token exists."""
        ids = special_ids(tokenizer)
        vocab = tokenizer.get_vocab()
        size = max(vocab.values()) + 1
        special = np.zeros(size, dtype=bool)
        special[list(ids.values())] = True
        continuation = np.zeros(size, dtype=bool)
        continuation[[id for token, id in vocab.items() if token.startswith("##")]] = True
        known = np.zeros(size, dtype=bool)
        known[list(vocab.values())] = True
        ordinary = np.flatnonzero(known & ~special)
        if not len(ordinary):
            raise ValueError("tokenizer: expected tokens besides the special ones, got none")
        return cls(
            ids["[MASK]"], ids["[CLS]"], ids["[SEP]"], ids["[PAD]"], special, continuation, ordinary
        )


def mask_tokens(
    ids: np.ndarray,
    vocab: MaskVocabulary,
    rng: np.random.Generator,
    *,
    probability: float = 0.15,
    max_predictions: int | None = None,
    whole_word: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask one sequence of token ids ``(n,)``; the input is not changed.

    ``probability`` is the share of the n tokens (special ones count) to predict,
    ``max_predictions`` its upper bound. ``whole_word``: a word and its continuation pieces are
    chosen together; a word that would exceed the number is passed over (so a number below the
    length of every word predicts nothing).

    Returns (inputs, labels), int64 ``(n,)`` each: labels hold the original id where a token is to
    be predicted and −100 elsewhere.
    """
    inputs = np.array(ids, dtype=np.int64)
    labels = np.full(len(inputs), IGNORE, dtype=np.int64)
    candidates = np.flatnonzero(~vocab.special[inputs])
    wanted = max(1, round(probability * len(inputs)))
    if max_predictions is not None:
        wanted = min(wanted, max_predictions)
    if whole_word:
        chosen = _choose_words(inputs, candidates, vocab, rng, wanted)
    else:
        chosen = rng.permutation(candidates)[:wanted]
    labels[chosen] = inputs[chosen]
    fate = rng.random(len(chosen))
    inputs[chosen[fate < 0.8]] = vocab.mask_id
    replaced = chosen[fate >= 0.9]
    inputs[replaced] = rng.choice(vocab.ordinary, size=len(replaced))
    return inputs, labels


def _choose_words(
    ids: np.ndarray,
    candidates: np.ndarray,
    vocab: MaskVocabulary,
    rng: np.random.Generator,
    wanted: int,
) -> np.ndarray:
    if not len(candidates):
        return candidates
    # A continuation piece belongs to the candidate before it only if the two are neighbours.
    starts = ~vocab.continuation[ids[candidates]]
    starts[0] = True
    starts[1:] |= np.diff(candidates) != 1
    words = np.split(candidates, np.flatnonzero(starts)[1:])
    chosen: list[int] = []
    for index in rng.permutation(len(words)):
        if len(chosen) + len(words[index]) <= wanted:
            chosen.extend(words[index])
    return np.array(chosen, dtype=np.int64)
