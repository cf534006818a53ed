"""Text in: documents made of sentences.

A document is a list of sentences (``list[str]``), a corpus a list of documents. Everything here is
deterministic: the same text gives the same documents in the same order. All of it is held in
memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

# A sentence ends at . ! or ? (and closing quotes or brackets) before white space and an upper-case
# letter.
_SENTENCE_END = re.compile(
    r"""[.!?]+["'\u201d\u2019)\]*]*\s+(?=["'\u201c\u2018(\[*]*[^\W\d_a-z])"""
)
# ... but not after these, nor after a single letter, as in "J. Smith".
_ABBREVIATIONS = {
    "e.g",
    "i.e",
    "etc",
    "vs",
    "cf",
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "fig",
    "vol",
    "jr",
    "sr",
}
_TERMINAL = re.compile(r"""[.!?\u2026\u3002]["'\u201d\u2019)\]*]*$""")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")

LAYOUTS = ("auto", "lines", "text")


def split_sentences(text: str) -> list[str]:
    """Sentences of running text, each with its white space collapsed to single blanks.

    The rule: a sentence ends at ``.``, ``!`` or ``?``, with any closing quotes or brackets, when
    white space and an upper-case letter follow (an opening quote or bracket may come first); not
    after a single letter or a common abbreviation ("e.g.", "Dr."). Text without such a place is one
    sentence, empty text none.
    """
    text = " ".join(text.split())
    sentences = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        last_word = text[start : end.start()].rsplit(" ", 1)[-1].lower().lstrip("\"'([*")
        if text[end.start()] == "." and (len(last_word) == 1 or last_word in _ABBREVIATIONS):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def parse_documents(text: str, layout: str = "auto") -> list[list[str]]:
    """Documents of one text: blank lines separate them.

    ``layout="lines"``: every line is one sentence (the input format of Google's BERT code).
    ``layout="text"``: running text; the lines of a document are joined and cut by
    :func:`split_sentences`. ``"auto"`` takes ``"lines"`` when at least half of the non-blank lines
    are each a whole sentence (they end like one and hold no sentence end inside), else ``"text"``.

    Raises ValueError for another layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = [block for block in _BLANK_LINES.split(text) if block.strip()]
    if layout == "auto":
        lines = [line.strip() for block in blocks for line in block.split("\n") if line.strip()]
        whole = sum(
            1 for line in lines if _TERMINAL.search(line) and len(split_sentences(line)) == 1
        )
        layout = "lines" if 2 * whole >= len(lines) else "text"
    if layout == "lines":
        return [
            [" ".join(line.split()) for line in block.split("\n") if line.strip()]
            for block in blocks
        ]
    return [split_sentences(block) for block in blocks]


def read_documents(
    paths: Iterable[str | os.PathLike[str]], layout: str = "auto"
) -> list[list[str]]:
    """Documents of UTF-8 text files, in the order of ``paths``; a new file starts a new document.

    Each file is read as :func:`parse_documents` says, with its own ``"auto"`` layout. A byte-order
    mark is dropped.

    Raises ValueError, naming the path, for a file that is not UTF-8 text or holds no text; OSError
    (with the path, as Python raises it) for one that cannot be opened.
    """
    documents = []
    for path in paths:
        with open(path, "rb") as file:
            raw = file.read()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{os.fspath(path)}: expected UTF-8 text, "
                f"got byte 0x{raw[error.start]:02x} at offset {error.start}"
            ) from None
        if "\0" in text:
            raise ValueError(
                f"{os.fspath(path)}: expected text, got a NUL byte at offset {raw.index(0)}"
            )
        found = parse_documents(text, layout)
        if not found:
            raise ValueError(
                f"{os.fspath(path)}: expected some text, "
                f"got {len(raw)} bytes with nothing but white space"
            )
        documents += found
    return documents


def builtin_documents() -> list[list[str]]:
    """English prose that every full Python carries: its language reference, ``pydoc_data.topics``.

    One document per topic, in alphabetical order of the topics. Paragraphs that are grammar, code
    or headings (they hold ``::=`` or ``>>>``, or are less than 80 % letters and blanks, or are
    shorter than 20 characters) are left out. A paragraph that occurs in several topics is kept in
    the first only: a fifth of the text is such copies, and without this a held-out document would
    be no stranger to the training text. The text differs a little between Python versions.

    Raises ValueError where Python was installed without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "the built-in text: expected pydoc_data.topics in this Python, "
            "got an installation without it; give text files instead"
        ) from None
    seen = set()
    documents = []
    for name in sorted(topics):
        sentences = []
        for block in _BLANK_LINES.split(topics[name]):
            paragraph = " ".join(block.split())
            letters = sum(1 for c in paragraph if c.isalpha() or c == " ")
            code = "::=" in paragraph or ">>>" in paragraph or letters < 0.8 * len(paragraph)
            if code or len(paragraph) < 20 or paragraph in seen:
                continue
            seen.add(paragraph)
            sentences += split_sentences(paragraph)
        if sentences:
            documents.append(sentences)
    return documents


def split_documents(
    documents: Sequence[list[str]], held_out: float = 0.1, seed: int = 0
) -> tuple[list[list[str]], list[list[str]]]:
    """Split whole documents into a training and a held-out part; both keep the original order.

    ``held_out`` is the share of characters to hold out (0 < held_out < 1). Documents are drawn in
    an order shuffled by ``seed``; one that would exceed the share is passed over. Each side gets at
    least two documents, because a random next sentence must come from another document.

    Returns (training documents, held-out documents). Raises ValueError for fewer than four
    documents or a share outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out!r}")
    if len(documents) < 4:
        raise ValueError(
            f"documents: expected at least 4 (two to train on, two to hold out), "
            f"got {len(documents)}; blank lines separate the documents of a text file"
        )
    sizes = [sum(len(sentence) for sentence in document) for document in documents]
    budget = held_out * sum(sizes)
    order = np.random.default_rng([seed, len(documents)]).permutation(len(documents))
    chosen: set[int] = set()
    for index in order:
        if len(chosen) < len(documents) - 2 and sizes[index] <= budget:
            chosen.add(int(index))
            budget -= sizes[index]
    for index in sorted(range(len(documents)), key=lambda i: sizes[i]):
        if len(chosen) >= 2:
            break
        chosen.add(index)
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [document for i, document in enumerate(documents) if i in chosen]
