"""Settings files that come with a model: every key is obeyed, known to change nothing, or refused.

Whoever reads a file takes the keys that it obeys, and then says which of the others cannot change a
result. What is left then is an error: a setting that nobody looks at gives other numbers than those
its author has seen, and says nothing.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from bertfast.errors import CheckpointError, short
from bertfast.model.config import read_json


class Settings:
    """The keys of one JSON file.

    A key that is null is as good as absent, for whoever does not ask ``in``.

    Raises CheckpointError, here and in every method, that names the file, the key, what was
    expected and what came.
    """

    def __init__(self, file: Path, values: Any) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: expected a JSON object, got {short(values)}")
        self.file = file
        self._left = dict(values)

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Those of a file, which are none if it is not there."""
        return cls(file, read_json(file) if file.is_file() else {})

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def items(self) -> list[tuple[str, Any]]:
        """Those that nobody has taken yet."""
        return list(self._left.items())

    def take(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """What the key has, which is then done with; None if it has nothing."""
        value = self._left.pop(key, None)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # To Python, True is an integer.
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if value is None or fits:
            return value
        raise self.error(key, value, expected)

    def flag(self, key: str) -> bool | None:
        value: bool | None = self.take(key, bool, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.take(key, str, "a string")
        return value

    def count(self, key: str) -> int | None:
        """An integer from 1 on, or None."""
        value: int | None = self.take(key, int, "a positive integer")
        if value is not None and value < 1:
            raise self.error(key, value, "a positive integer")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The key may be one of these, or absent."""
        value = self._left.pop(key, None)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise self.error(key, value, " or ".join(repr(a) for a in allowed) or "nothing")

    def finish(self, harmless: Container[str] = ()) -> None:
        """Refuse what nobody has taken, but for the keys that cannot change a result and for those
        that set nothing."""
        for key, value in self._left.items():
            if key not in harmless and value is not None and value not in ("", [], {}):
                raise self.error(key, value, "no such setting, which may change the result")

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {key}: expected {expected}, got {short(value)}")
