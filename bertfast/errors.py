"""The exceptions bertfast raises besides ``ValueError`` and ``TypeError``, and how messages show a
value."""

from typing import Any


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here, or not on these inputs."""


class CheckpointError(ValueError):
    """A file or directory of weights is missing, damaged, or does not fit the model."""


class KernelError(RuntimeError):
    """A native kernel refused a launch; the message carries the kernel's name and its numbers."""


class InputError(ValueError):
    """One of several inputs cannot be used.

    Attributes:
        index: which one, from 0.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"input {index}: {reason}")
        self.index = index
        self.reason = reason


def short(value: Any) -> str:
    """``value`` for a message: in one line and never pages of it, an array by its shape."""
    if getattr(value, "shape", None):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(line.strip() for line in repr(value).splitlines())
    return text if len(text) <= 80 else text[:77] + "..."


def shown(value: Any) -> str:
    """:func:`short`, with the value's type, where what is wrong may be the type."""
    name, text = type(value).__name__, short(value)
    return text if text.startswith(name) else f"{name} {text}"
