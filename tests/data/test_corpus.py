"""Reading text: sentences, documents, bad files, the held-out split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertfast.data import (
    builtin_documents,
    parse_documents,
    read_documents,
    split_documents,
    split_sentences,
)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  \n ", []),
        ("no end", ["no end"]),
        ("One. Two! Three?  Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." She left.', ['He said "no."', "She left."]),
        ('It is so. "Yes" she said.', ["It is so.", '"Yes" she said.']),
        ("Use e.g. Python by Dr. J. Smith. Done.", ["Use e.g. Python by Dr. J. Smith.", "Done."]),
        ("version 3.11 is in use. it goes on", ["version 3.11 is in use. it goes on"]),
        ("Wait... What? Ärger. Über.", ["Wait...", "What?", "Ärger.", "Über."]),
        ("a\n  wrapped\tline.", ["a wrapped line."]),
    ],
)
def test_split_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.text(alphabet="aB .!?\"'()\n\t", max_size=200))
def test_splitting_loses_nothing_but_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert " ".join(sentences) == " ".join(text.split())
    assert all(sentences)


def test_blank_lines_separate_documents() -> None:
    text = "One.\nTwo. Two and a half.\n\n \t\n\nThree.\r\nFour.\r\n"
    assert parse_documents(text, "lines") == [["One.", "Two. Two and a half."], ["Three.", "Four."]]
    assert parse_documents(text, "text") == [
        ["One.", "Two.", "Two and a half."],
        ["Three.", "Four."],
    ]
    assert parse_documents("") == []


def test_auto_tells_lines_from_wrapped_text() -> None:
    lines = "This is one.\nThis is two.\nAnd three\n\nFour is here.\n"
    wrapped = (
        "This is a line that\ngoes on. And here is\nanother one that ends.\n\nThe second\none.\n"
    )
    assert parse_documents(lines) == parse_documents(lines, "lines")
    assert parse_documents(wrapped) == parse_documents(wrapped, "text")
    paragraphs = "Aa bb. Cc dd.\nEe ff. Gg.\n"
    assert parse_documents(paragraphs) == [["Aa bb.", "Cc dd.", "Ee ff.", "Gg."]]
    with pytest.raises(ValueError, match="layout: expected one of auto, lines, text, got 'xml'"):
        parse_documents("", "xml")


def test_files(tmp_path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes("\ufeffErste Zeile.\nZweite Zeile.\n\nÄ.".encode())
    two.write_text("Other file.")
    assert read_documents([one, two]) == [
        ["Erste Zeile.", "Zweite Zeile."],
        ["Ä."],
        ["Other file."],
    ]
    assert read_documents([]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected some text, got 0 bytes"),
        (b" \n\n\t", "expected some text, got 4 bytes"),
        (b"good \xff\xfe", "expected UTF-8 text, got byte 0xff at offset 5"),
        ("naïve".encode("utf-16"), "expected UTF-8 text"),
        (b"text\0text", "expected text, got a NUL byte at offset 4"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents([path])
    assert str(path) in str(error.value)


def test_a_missing_file_or_a_directory_is_an_os_error_with_its_path(tmp_path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read_documents([path])


def test_builtin_text_is_prose_without_repetition() -> None:
    documents = builtin_documents()
    assert documents == builtin_documents()
    assert len(documents) >= 30
    assert sum(len(s) for d in documents for s in d) > 150_000
    text = [sentence for document in documents for sentence in document]
    assert not [sentence for sentence in text if "::=" in sentence or ">>>" in sentence]
    long = [sentence for sentence in text if len(sentence) > 60]
    # Whole paragraphs are dropped when they repeat; single sentences inside others hardly do.
    assert len(set(long)) > 0.98 * len(long)


@given(
    st.lists(st.integers(1, 2000), min_size=4, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 100),
)
def test_split_holds_whole_documents_out(sizes: list[int], share: float, seed: int) -> None:
    documents = [[f"{i}:" + "x" * size] for i, size in enumerate(sizes)]
    training, held_out = split_documents(documents, share, seed)
    assert (training, held_out) == split_documents(documents, share, seed)
    assert len(training) >= 2
    assert len(held_out) >= 2
    assert sorted(training + held_out) == sorted(documents)
    # The share is only exceeded to reach two documents.
    if len(held_out) > 2:
        assert sum(len(d[0]) for d in held_out) <= share * sum(len(d[0]) for d in documents)


def test_split_refuses() -> None:
    with pytest.raises(ValueError, match=r"documents: expected at least 4 .*, got 3"):
        split_documents([["a"], ["b"], ["c"]])
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="held_out"):
            split_documents([["a"]] * 4, share)
