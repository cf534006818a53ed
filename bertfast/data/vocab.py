"""WordPiece vocabularies: train one from text, save it, load it, turn documents into token ids."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from bertfast.data.tokenizer_config import FLAGS, apply, is_lowercase, read_tokenizer_config

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The same ones in the tokenizers of RoBERTa and XLM-R.
ROBERTA_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


def _bert_tokenizer(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    # strip_accents=None means "as lowercase says", which is what BERT does.
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _with_special_tokens(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = _bert_tokenizer(vocab, lowercase)
    ids = special_ids(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the five special tokens, by name. Raises ValueError that lists the missing ones."""
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = {token: id for token, id in found.items() if id is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ValueError(
            f"tokenizer: expected the special tokens {' '.join(SPECIAL_TOKENS)}, "
            f"got none for {missing}"
        )
    return ids


def mask_token(tokenizer: Tokenizer) -> str:
    """``[MASK]``, or ``<mask>`` for a tokenizer like RoBERTa's.

    Raises ValueError for a tokenizer with neither model's special tokens.
    """
    for tokens in (SPECIAL_TOKENS, ROBERTA_TOKENS):
        if all(tokenizer.token_to_id(token) is not None for token in tokens):
            return tokens[-1]
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    raise ValueError(
        f"tokenizer: expected the special tokens {' '.join(SPECIAL_TOKENS)}, or RoBERTa's "
        f"{' '.join(ROBERTA_TOKENS)}, got none for {missing}"
    )


def train_vocab(
    documents: Iterable[list[str]],
    vocab_size: int = 8192,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
) -> Tokenizer:
    """Train a WordPiece tokenizer with BERT's normaliser, pre-tokenizer and special tokens (ids 0
    to 4).

    ``documents`` are lists of sentences. ``vocab_size`` counts the special tokens and is an upper
    bound: a short text has fewer word pieces that occur ``min_frequency`` times. At most
    ``limit_alphabet`` different characters are kept. The same text and settings give the same
    vocabulary in every process.

    Raises ValueError when the text holds no word, or when the special tokens and the text's
    alphabet alone exceed ``vocab_size``.
    """
    if min_frequency < 1:
        raise ValueError(f"min_frequency: expected at least 1, got {min_frequency}")
    if limit_alphabet < 1:
        raise ValueError(f"limit_alphabet: expected at least 1, got {limit_alphabet}")
    sentences = [sentence for document in documents for sentence in document]
    tokenizer = _bert_tokenizer({"[UNK]": 0}, lowercase)
    letters, continuations = _alphabet(sentences, tokenizer, limit_alphabet)
    if not letters:
        raise ValueError("documents: expected some words to train a vocabulary on, got none")
    smallest = len(SPECIAL_TOKENS) + len(letters) + len(continuations)
    if smallest > vocab_size:
        raise ValueError(
            f"vocab_size: expected at least {smallest} (the alphabet of this text), "
            f"got {vocab_size}"
        )
    # The trainer numbers "##x" in the order of a randomly seeded hash table and breaks ties by
    # these numbers, so that two runs differ. Handed over as if they were special tokens, they are
    # numbered here; the tokenizer is then built anew from the vocabulary alone.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*SPECIAL_TOKENS, *continuations],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer=trainer)
    vocab = tokenizer.get_vocab()
    first = [*SPECIAL_TOKENS, *letters, *continuations]
    rest = sorted(set(vocab) - set(first), key=vocab.__getitem__)
    return _with_special_tokens({token: id for id, token in enumerate(first + rest)}, lowercase)


def _alphabet(
    sentences: list[str], tokenizer: Tokenizer, limit: int
) -> tuple[list[str], list[str]]:
    """The ``limit`` most frequent characters of the words, sorted, and "##x" for those that occur
    inside a word."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for sentence in sentences:
        normalized = tokenizer.normalizer.normalize_str(sentence)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized):
            counts.update(word)
            inside.update(word[1:])
    kept = sorted(sorted(counts), key=counts.__getitem__, reverse=True)[:limit]
    return sorted(kept), [f"##{letter}" for letter in sorted(inside.intersection(kept))]


def save_tokenizer(
    tokenizer: Tokenizer, directory: str | os.PathLike[str], *, max_length: int = 512
) -> None:
    """Write ``vocab.txt``, ``tokenizer.json`` and ``tokenizer_config.json``, as Hugging Face's BERT
    directories have them.

    ``max_length`` is the longest input in tokens, written as ``model_max_length``. The directory is
    created.
    """
    if not isinstance(tokenizer.model, models.WordPiece):
        raise ValueError(
            f"tokenizer: expected BERT's WordPiece, got {type(tokenizer.model).__name__}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = tokenizer.get_vocab(with_added_tokens=False)
    vocab = sorted(words.items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text(
        "".join(f"{token}\n" for token, _ in vocab), encoding="utf-8", newline="\n"
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": is_lowercase(tokenizer),
        "model_max_length": max_length,
        **_settings_of(tokenizer),
    }
    for token in SPECIAL_TOKENS:
        config[f"{token[1:-1].lower()}_token"] = token
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")


def _settings_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What else the words do not say, where it is not what BERT does."""
    found: dict[str, Any] = {}
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        if normalizer.strip_accents is not None:
            found["strip_accents"] = normalizer.strip_accents
        if not normalizer.handle_chinese_chars:
            found["tokenize_chinese_chars"] = False
    added = tokenizer.get_added_tokens_decoder()
    usual = {repr(AddedToken(token, special=True)) for token in SPECIAL_TOKENS}
    if {repr(token) for token in added.values()} - usual:
        found["added_tokens_decoder"] = {
            str(id): {"content": token.content, **{f: getattr(token, f) for f in sorted(FLAGS)}}
            for id, token in sorted(added.items())
        }
    return found


def load_tokenizer(
    directory: str | os.PathLike[str],
    *,
    lowercase: bool | None = None,
    any_tokens: bool = False,
) -> Tokenizer:
    """Load a tokenizer from ``tokenizer.json``, or from ``vocab.txt``, and do as the settings
    beside it say: ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``.

    ``tokenizer.json`` has the special tokens of BERT or of RoBERTa, or with ``any_tokens`` any;
    ``vocab.txt`` BERT's.

    ``vocab.txt`` does not say whether text is lower-cased. ``lowercase`` does, or where it is None
    ``tokenizer_config.json``'s ``do_lower_case``, or where that is missing the words themselves: a
    vocabulary with capitals in it is of cased text.

    Raises ValueError, naming the path, when neither file is there, one is damaged, or a special
    token is missing; for a setting that can be neither obeyed nor ignored; or when ``lowercase`` is
    given and ``tokenizer.json`` does otherwise.
    """
    directory = Path(directory)
    config = read_tokenizer_config(directory)
    file = directory / "tokenizer.json"
    if file.is_file():
        tokenizer = _from_json(file)
        if not any_tokens:
            with _named(file):
                mask_token(tokenizer)
        specials: Sequence[str] = ()
        for names in (SPECIAL_TOKENS, ROBERTA_TOKENS):
            if all(tokenizer.token_to_id(token) is not None for token in names):
                specials = names
        apply(config, tokenizer, specials)
        if lowercase not in (None, is_lowercase(tokenizer)):
            does = "lower-cases" if is_lowercase(tokenizer) else "keeps case"
            raise ValueError(f"lowercase: expected {not lowercase}, as {file} {does}")
        return tokenizer
    if (directory / "vocab.txt").is_file():
        if lowercase is not None:
            config.normalizer["lowercase"] = lowercase
        tokenizer = _from_vocab_txt(directory / "vocab.txt", config.normalizer.get("lowercase"))
        apply(config, tokenizer, SPECIAL_TOKENS)
        return tokenizer
    raise ValueError(f"{directory}: expected tokenizer.json or vocab.txt, found neither")


def _from_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except OSError:
        raise
    # The tokenizers library raises plain Exception for a damaged file.
    except Exception as error:
        raise ValueError(f"{file}: expected a tokenizers file, got: {error}") from None
    # Not how long: the length is the caller's, as in transformers.
    direction = (tokenizer.truncation or {}).get("direction", "right")
    if direction.lower() != "right":
        raise ValueError(f"{file}: truncation: expected the direction Right, got {direction!r}")
    return tokenizer


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Put the file's path before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _from_vocab_txt(file: Path, lowercase: bool | None) -> Tokenizer:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got: {error}") from None
    if lines and not lines[-1]:
        lines.pop()
    vocab: dict[str, int] = {}
    for id, line in enumerate(lines):
        token = line.rstrip("\r")
        if vocab.setdefault(token, id) != id:
            raise ValueError(
                f"{file}: expected one different token a line, got {token!r} in the lines "
                f"{vocab[token] + 1} and {id + 1}"
            )
    with _named(file):
        return _with_special_tokens(
            vocab, not _has_capitals(vocab) if lowercase is None else lowercase
        )


def _has_capitals(vocab: Iterable[str]) -> bool:
    """Whether words of a vocabulary are cased; "[CLS]" and "[unused1]" are no words.

    One word in a hundred, so that one letter of a foreign script does not decide. Google's
    uncased vocabulary has no capital at all, and a third of the cased one's words have.
    """
    words = [token for token in vocab if not (token.startswith("[") and token.endswith("]"))]
    return 100 * sum(word != word.lower() for word in words) > len(words)


def encode_documents(
    documents: Sequence[list[str]], tokenizer: Tokenizer
) -> list[list[np.ndarray]]:
    """Token ids of every sentence, without special tokens: int32 arrays ``(tokens,)``, a list of
    them per document.

    Sentences without a token and documents without a sentence are dropped. The literal text
    "[MASK]" in a document is encoded as text, not as the special token.
    """
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encoded = []
        for document in documents:
            sentences = tokenizer.encode_batch(document, add_special_tokens=False)
            arrays = [
                np.array(sentence.ids, dtype=np.int32) for sentence in sentences if sentence.ids
            ]
            if arrays:
                encoded.append(arrays)
        return encoded
    finally:
        tokenizer.encode_special_tokens = before
