"""Which implementation of an op runs, and why.

The choice, strongest first: the op's ``backend=`` argument, an enclosing ``with backend(name):``,
the environment variable ``BERTFAST_BACKEND`` (read once, at import), and otherwise the first
entry of the op's row in :data:`TABLE` that supports the input: on a GPU the one that was measured
fastest there, then the row's order. Several may be asked for, ``"cuda,triton"``: the first that can
run an op runs it.
"""

import importlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bertfast.errors import BackendError
from bertfast.kernels.device import architecture

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Op word -> its backends, in the order automatic choice tries them. ``bertfast/kernels/<backend>/
# <word>.py`` exists exactly for these pairs; tests/ops/test_backends.py holds the two together.
TABLE: dict[str, tuple[str, ...]] = {
    "attention": ("cpu", "triton", "cuda", "reference"),
    "layernorm": ("cpu", "triton", "cuda", "reference"),
    "gelu": ("cpu", "triton", "cuda", "reference"),
    "embedding": ("cpu", "triton", "reference"),
    "cross_entropy": ("cpu", "triton", "reference"),
    "dropout": ("cpu", "triton", "cuda", "reference"),
}
# On CPU tensors these run in an interpreter or an emulation, which is for tests: there they must be
# asked for by name.
ON_GPU = ("triton", "cuda")


def read_winners(path: Path) -> dict[str, dict[str, list[tuple[int, str]]]]:
    """Architecture -> op word -> the fastest GPU backend up to each length, by length.

    The file is what ``make gpu`` measured: ``{"sm_90": {"gelu": {"3072": "triton"}}}``.
    """
    return {
        gpu: {
            word: sorted((int(length), name) for length, name in lengths.items())
            for word, lengths in words.items()
        }
        for gpu, words in json.loads(path.read_text()).items()
    }


_winners = read_winners(Path(__file__).parent / "kernels" / "winners.json")


def _check_name(name: str, source: str) -> str:
    for one in name.split(","):
        if one not in BACKENDS:
            raise ValueError(
                f"{source}: expected one of {', '.join(BACKENDS)}, or several with commas between "
                f"them, got {name!r}"
            )
    return name


def _from_environment() -> str | None:
    name = os.environ.get("BERTFAST_BACKEND", "").strip()
    return _check_name(name, "BERTFAST_BACKEND") if name not in ("", "auto") else None


class _ThreadChoice(threading.local):
    # Not a ContextVar: torch.compile cannot trace one in a full graph. And an attribute of the
    # instance, not the class: only that makes a compiled graph look whether the choice is another.
    def __init__(self) -> None:
        self.name: str | None = None


_environment = _from_environment()
_thread = _ThreadChoice()
_warned: set[str] = set()
_modules: dict[tuple[str, str], "ModuleType | _Missing"] = {}


class _Missing:
    """Stands for the kernels of a backend that cannot run here at all."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def supports(self, x: Tensor) -> str | None:
        return self.reason


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run the ops inside the ``with`` block, in this thread, on the backend ``name``, or of several
    (``"cuda,triton"``) each on the first that can run it.

    ``None`` gives back the automatic choice. A backward pass always runs on the backend of its
    forward, wherever it is called from.

    Raises:
        ValueError: ``name`` is no backend.
        BackendError: (from the op inside) the backend has no kernel for the op, or the kernel
            cannot run on its input.
    """
    if name is not None:
        _check_name(name, "backend")
    before = _thread.name
    _thread.name = name if name is not None else "auto"
    try:
        yield
    finally:
        _thread.name = before


def load_kernels() -> None:
    """Import every implementation :data:`TABLE` names; the ops do it when they are imported.

    Not on first use, which may be inside ``torch.compile``: it cannot trace an import. A backend
    whose package says what is ``missing`` for it is left out.
    """
    for word, names in TABLE.items():
        for name in names:
            package = importlib.import_module(f"bertfast.kernels.{name}")
            reason = getattr(package, "missing", None)
            _modules[word, name] = (
                importlib.import_module(f"bertfast.kernels.{name}.{word}")
                if reason is None
                else _Missing(reason)
            )


def kernel(word: str, name: str) -> Any:
    """The module that implements op ``word`` on backend ``name``."""
    if not _modules:
        load_kernels()
    return _modules[word, name]


def choose(word: str, x: Tensor, requested: str | None = None, length: int | None = None) -> str:
    """The backend that runs op ``word`` on the main input ``x``.

    Args:
        length: of what a kernel takes at a time, which decides how fast it is: the longest sequence
            of attention; None is the last dimension of ``x``.

    Raises:
        ValueError: ``requested`` is no backend.
        BackendError: the backend was asked for by name and cannot run this.
    """
    if requested is not None:
        _check_name(requested, "backend")
        return _insist(word, x, requested)
    ambient = current()
    if ambient is not None:
        return _insist(word, x, ambient)
    for name in _in_order(word, x, length):
        if _passed_over(word, name, x) is None:
            if name == "reference" and x.is_cuda:
                _warn_fallback(word, x)
            return name
    raise BackendError(f"{word}: no backend supports {x.dtype} on {x.device}")


def _in_order(word: str, x: Tensor, length: int | None) -> tuple[str, ...]:
    """The word's backends as an automatic choice tries them."""
    if not x.is_cuda or not _winners:
        return TABLE[word]
    return by_speed(word, architecture(x.device.index), length or x.shape[-1])


def by_speed(word: str, gpu: str, length: int) -> tuple[str, ...]:
    """The word's backends, first the one that was measured fastest at ``length``: at the next
    longer one that was measured, or the longest."""
    measured = _winners.get(gpu, {}).get(word, [])
    if not measured:
        return TABLE[word]
    fastest = measured[-1][1]
    for longest, name in reversed(measured):
        if length <= longest:
            fastest = name
    return (fastest, *(name for name in TABLE[word] if name != fastest))


def _passed_over(word: str, name: str, x: Tensor) -> str | None:
    """Why an automatic choice does not take this backend, or None."""
    reason: str | None = kernel(word, name).supports(x)
    if reason is None and name in ON_GPU and x.is_cpu:
        return "it would be interpreted, which must be asked for by name"
    return reason


def current() -> str | None:
    """What ``with backend(...)`` or the environment asks for; None leaves it to the input."""
    name = _thread.name if _thread.name is not None else _environment
    return None if name == "auto" else name


def _insist(word: str, x: Tensor, names: str) -> str:
    refused = ""
    for name in names.split(","):
        if name not in TABLE[word]:
            reason = f"has no kernel for it; it has {', '.join(TABLE[word])}"
        else:
            unsupported = kernel(word, name).supports(x)
            if unsupported is None:
                return name
            reason = f"cannot run: {unsupported}"
        refused += f"{'; ' if refused else ''}backend {name!r} {reason}"
    raise BackendError(f"{word}: {refused}")


def _warn_fallback(word: str, x: Tensor) -> None:
    if word not in _warned and not torch.compiler.is_compiling():
        _warned.add(word)
        warnings.warn(
            f"bertfast: {word} runs on the plain-torch reference on {x.device} ({x.dtype}); "
            "bertfast.explain() says why",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Explanation:
    """One row of :func:`explain`: what op ``op`` runs on, and why not on the others."""

    op: str
    backend: str | None
    passed_over: dict[str, str] = field(default_factory=dict)


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[Explanation]:
    """For each op, the backend that would run it now, and the reason for each one passed over.

    Args:
        device: where the inputs would be; the first CUDA device if there is one, else the CPU.
        dtype: the inputs' dtype.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is here, got {device} without CUDA")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    # 64 is an ordinary head dim, so it stands for inputs in general.
    x = torch.empty(1, 1, 64, device=device, dtype=dtype)
    ambient = current()
    rows = []
    for word, names in TABLE.items():
        chosen: str | None = None
        passed_over: dict[str, str] = {}
        for name in BACKENDS:
            if name not in names:
                passed_over[name] = "has no kernel for this op"
        asked = ambient.split(",") if ambient is not None else []
        others = [name for name in _in_order(word, x, None) if name not in asked]
        for name in [name for name in asked if name in names] + others:
            if name in asked:
                reason = kernel(word, name).supports(x)
            else:
                reason = _passed_over(word, name, x)
                if reason is None and asked:
                    reason = f"backend {ambient!r} was asked for"
            if reason is not None:
                passed_over[name] = reason
            elif chosen is None:
                chosen = name
            else:
                passed_over[name] = f"{chosen!r} comes first"
        rows.append(Explanation(word, chosen, passed_over))
    return rows
