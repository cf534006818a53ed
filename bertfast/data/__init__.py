"""From raw text to batches: corpus → vocabulary → masked sentence pairs → packed tokens."""

from bertfast.data.batching import group, pack, pad, to_device
from bertfast.data.corpus import (
    builtin_documents,
    parse_documents,
    read_documents,
    split_documents,
    split_sentences,
)
from bertfast.data.masking import MaskVocabulary, mask_tokens
from bertfast.data.pretraining import Example, Pair, PretrainingData, make_pairs
from bertfast.data.vocab import (
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_vocab,
)

__all__ = [
    "Example",
    "MaskVocabulary",
    "Pair",
    "PretrainingData",
    "builtin_documents",
    "encode_documents",
    "group",
    "load_tokenizer",
    "make_pairs",
    "mask_tokens",
    "pack",
    "pad",
    "parse_documents",
    "read_documents",
    "save_tokenizer",
    "special_ids",
    "split_documents",
    "split_sentences",
    "to_device",
    "train_vocab",
]
