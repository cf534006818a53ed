"""WordPiece vocabularies: training, saving, loading, encoding."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bertfast.data import (
    builtin_documents,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_vocab,
)
from bertfast.data.vocab import is_lowercase

TEXT = [
    ["The quick brown fox jumps over the lazy dog.", "The dogs jumped quickly."],
    ["Naïve CAFÉ owners (two of them) served 12 quick dogs!"],
]


def test_vocab_is_what_bert_expects() -> None:
    tokenizer = train_vocab(TEXT * 3, 200)
    assert special_ids(tokenizer) == {
        "[PAD]": 0,
        "[UNK]": 1,
        "[CLS]": 2,
        "[SEP]": 3,
        "[MASK]": 4,
    }
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    encoded = tokenizer.encode("The CAFÉ!", "dogs")
    assert encoded.tokens == ["[CLS]", "the", "cafe", "!", "[SEP]", "dogs", "[SEP]"]
    assert encoded.type_ids == [0, 0, 0, 0, 0, 1, 1]
    assert tokenizer.encode("[MASK]").ids == [2, 4, 3]
    assert tokenizer.encode("日").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    cased = train_vocab(TEXT * 3, 200, lowercase=False)
    assert cased.encode("The CAFÉ").tokens[1:-1] == ["The", "CAFÉ"]


def test_vocab_is_the_same_in_every_process() -> None:
    code = (
        "from bertfast.data import builtin_documents, train_vocab\n"
        "vocab = train_vocab(builtin_documents()[:20], 700).get_vocab()\n"
        "print(sorted(vocab, key=vocab.get))"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    vocab = train_vocab(builtin_documents()[:20], 700).get_vocab()
    assert run.stdout.strip() == str(sorted(vocab, key=lambda token: vocab[token]))


def test_sizes() -> None:
    documents = builtin_documents()[:10]
    assert train_vocab(documents, 400).get_vocab_size() == 400
    with pytest.raises(ValueError, match=r"vocab_size: expected at least \d+ .*, got 20"):
        train_vocab(documents, 20)
    for nothing in ([], [[]], [["  "]]):
        with pytest.raises(ValueError, match="expected some words"):
            train_vocab(nothing, 100)
    small = train_vocab([["aaaa bbb cc d"]], 100, min_frequency=1, limit_alphabet=2)
    assert small.encode("aaaa d").tokens[1:-1] == ["aaaa", "[UNK]"]


def test_save_and_load(tmp_path) -> None:
    tokenizer = train_vocab(TEXT * 3, 150)
    save_tokenizer(tokenizer, tmp_path / "new", max_length=64)
    assert json.loads((tmp_path / "new/tokenizer_config.json").read_text())["do_lower_case"] is True
    text = "A naïve fox [MASK] jumps, 12 日 unknown-words ##ing"
    expected = tokenizer.encode(text)
    assert load_tokenizer(tmp_path / "new").encode(text).ids == expected.ids
    (tmp_path / "new/tokenizer.json").unlink()
    from_vocab = load_tokenizer(tmp_path / "new")
    assert from_vocab.encode(text).tokens == expected.tokens
    assert from_vocab.get_vocab() == tokenizer.get_vocab()


def test_cased_vocab_txt_keeps_its_case(tmp_path) -> None:
    tokenizer = train_vocab(TEXT * 3, 150, lowercase=False)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).encode("The Fox").ids == tokenizer.encode("The Fox").ids


def test_vocab_txt_shows_its_case(tmp_path) -> None:
    """A flag before tokenizer_config.json before capitals among the words."""
    for cased in (False, True):
        directory = tmp_path / str(cased)
        save_tokenizer(train_vocab(TEXT * 3, 150, lowercase=not cased), directory)
        (directory / "tokenizer.json").unlink()
        config = directory / "tokenizer_config.json"
        for lowercase in (True, False):
            assert is_lowercase(load_tokenizer(directory, lowercase=lowercase)) == lowercase
            config.write_text(json.dumps({"do_lower_case": lowercase}))
            assert is_lowercase(load_tokenizer(directory)) == lowercase
        config.write_text("{}")
        assert is_lowercase(load_tokenizer(directory)) != cased
        config.unlink()
        assert is_lowercase(load_tokenizer(directory)) != cased
    # One capital in a hundred words, "[unused0]" and "[X]" aside, is no case.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X]", "A"]
    for count, lowercase in ((98, False), (99, True)):
        lines = words + [f"w{i}" for i in range(count)]
        (directory / "vocab.txt").write_text("\n".join(lines))
        assert is_lowercase(load_tokenizer(directory)) == lowercase


def test_a_flag_against_tokenizer_json_is_refused(tmp_path) -> None:
    save_tokenizer(train_vocab(TEXT * 3, 150), tmp_path)
    load_tokenizer(tmp_path, lowercase=True)
    with pytest.raises(ValueError, match=r"^lowercase: expected True, as .*json lower-cases"):
        load_tokenizer(tmp_path, lowercase=False)


def test_transformers_reads_the_same_ids(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_vocab(TEXT * 3, 150)
    save_tokenizer(tokenizer, tmp_path, max_length=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "A naïve [MASK] jumps, 12 unknown-words"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.model_max_length == 64


def test_load_refuses(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected tokenizer.json or vocab.txt, found neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\nb\n")
    with pytest.raises(ValueError, match=r"got none for \['\[CLS\]', '\[SEP\]', '\[MASK\]'\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\na\n")
    with pytest.raises(ValueError, match=r"vocab.txt: expected one different token a line"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match=r"tokenizer.json: expected a tokenizers file"):
        load_tokenizer(tmp_path)


def test_encode_documents() -> None:
    tokenizer = train_vocab(TEXT * 3, 150)
    encoded = encode_documents([["The fox.", "\u200b"], [""], ["[MASK] dogs [SEP]"]], tokenizer)
    assert [len(document) for document in encoded] == [1, 1]
    assert encoded[0][0].dtype == np.int32
    assert encoded[0][0].tolist() == tokenizer.encode("The fox.", add_special_tokens=False).ids
    # Text that looks like a special token stays text.
    assert not set(encoded[1][0].tolist()) & {2, 3, 4}
    assert tokenizer.encode("[MASK]").ids == [2, 4, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"[PAD]\n\xff\n", r"vocab\.txt: expected UTF-8 text, got: "),
        ("vocab.txt", b"[PAD]\n[UNK]\na\n", r"vocab\.txt: tokenizer: expected the special tokens"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: expected JSON, got 1 byte"),
        ("tokenizer_config.json", b"\xff", r"tokenizer_config\.json: expected JSON, got .*utf-8"),
        (
            "tokenizer_config.json",
            b"[1]",
            r"config\.json: expected a JSON object, got \[1\]",
        ),
        ("tokenizer_config.json", b'{"do_lower_case": "no"}', r"true or false, got .*'no'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message) -> None:
    save_tokenizer(train_vocab(TEXT * 3, 150), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_special_tokens_is_named(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    save_tokenizer(train_vocab(TEXT * 3, 150), tmp_path)
    path.write_text(path.read_text().replace("[MASK]", "[GAP]"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: tokenizer: .* none for \['\[MASK\]'\]"):
        load_tokenizer(tmp_path)
