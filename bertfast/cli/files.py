"""Texts in, results out: arguments, lines, JSON Lines; files that are whole or not there."""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

JSON_LINES = (".jsonl", ".ndjson")


class Record(NamedTuple):
    """One input: where it stands, for messages; its texts; and the object it was, if it was one."""

    place: str
    texts: tuple[str, ...]
    values: dict[str, Any]


class Fields(NamedTuple):
    """The names of an input's texts; ``optional`` ones may be left out, from the end."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def read_arguments(texts: Sequence[str], fields: Fields) -> list[Record]:
    """Texts of the command line, so many for an input as it has fields.

    Raises ValueError if they do not come out even.
    """
    names = fields.required
    if len(texts) % len(names):
        raise ValueError(
            f"expected {' and '.join(names)} for each input, got {len(texts)} arguments"
        )
    rows = [tuple(texts[i : i + len(names)]) for i in range(0, len(texts), len(names))]
    return [
        _record(f"input {i}", row, dict(zip(names, row, strict=True)))
        for i, row in enumerate(rows, 1)
    ]


def read_file(path: str, fields: Fields, form: str | None) -> list[Record]:
    """The inputs of a file, or of standard input (``"-"``).

    ``form`` is ``"jsonl"``, where every line is an object with the fields (blank lines are passed
    over), or ``"lines"``, where every line is an input and a tab stands between two texts; None
    goes by the file's suffix.

    Raises ValueError, naming file and line, for what cannot be read; OSError.
    """
    if form is None:
        form = "jsonl" if Path(path).suffix.lower() in JSON_LINES else "lines"
    name = "stdin" if path == "-" else path
    # Where it is closed, another file may have its number.
    if path == "-" and sys.stdin is None:
        raise ValueError("stdin: expected it open, or --input FILE")
    with open(0, "rb", closefd=False) if path == "-" else open(path, "rb") as file:
        records = [
            record
            for number, line in enumerate(file, 1)
            if (record := _read_line(f"{name}:{number}", line, fields, form)) is not None
        ]
    if not records:
        raise ValueError(f"{name}: expected at least one input, got an empty file")
    return records


def _read_line(place: str, line: bytes, fields: Fields, form: str) -> Record | None:
    if place.endswith(":1"):
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: expected UTF-8 text, got byte 0x{line[error.start]:02x} at {error.start}"
        ) from None
    if form == "jsonl":
        return _from_json(place, text, fields) if text.strip() else None
    texts = text.split("\t") if len(fields.required) > 1 else [text]
    if len(texts) != len(fields.required):
        raise ValueError(
            f"{place}: expected {' and '.join(fields.required)} with a tab between them, "
            f"got {len(texts) - 1} tabs"
        )
    return _record(place, tuple(texts), dict(zip(fields.required, texts, strict=True)))


def _from_json(place: str, text: str, fields: Fields) -> Record:
    try:
        values = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    # A deeply nested line ends in RecursionError, which is no ValueError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: expected JSON, got {text[:40]!r} ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}")
    texts = []
    for name in (*fields.required, *fields.optional):
        if name not in values and name in fields.optional:
            break
        if not isinstance(values.get(name), str):
            found = type(values[name]).__name__ if name in values else "none"
            raise ValueError(f'{place}: expected a string as "{name}", got {found}')
        texts.append(values[name])
    return _record(place, tuple(texts), values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _record(place: str, texts: tuple[str, ...], values: dict[str, Any]) -> Record:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{place}: expected Unicode text, got a lone surrogate") from None
    return Record(place, texts, values)


@contextmanager
def writing(path: str | None) -> Iterator[IO[bytes]]:
    """Where results go: standard output for None, else a file that is there whole or, if anything
    fails, as it was before. A link's file is replaced, not the link; the mode stays."""
    if path is None:
        if sys.stdout is None:
            raise ValueError("stdout: expected it open, or --output FILE")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    if target.exists() and not target.is_file():
        # A device or a pipe stays what it is; a directory is an error here.
        with target.open("wb") as file:
            yield file
        return
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("wb")
    except OSError as error:
        # Of the two names, the one that was asked for.
        raise type(error)(error.errno, error.strerror, path) from None
    try:
        with file:
            if target.exists():
                shutil.copymode(target, temporary)
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
