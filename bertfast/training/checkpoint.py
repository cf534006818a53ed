"""Training checkpoints: everything that a resumed run needs to be bitwise the run that was never
interrupted.

One file of tensors and plain values (``torch.save``), read with ``weights_only=True``, so that
loading a foreign file runs no code from it. For weights to share, use ``model.save_pretrained``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

_FORMAT = "bertfast training checkpoint 1"
_KEYS = {"format", "model", "optimizer", "cpu_rng", "cuda_rng", "progress"}


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write model, optimizer, torch's random states (CPU and every CUDA device) and ``progress`` to
    one file.

    ``progress``: plain values (numbers, strings, lists, dicts): the position in the data and
    whatever else the loop keeps. The file appears under its name only when it is complete and on
    disk; an older one stays whole until then. The directory must exist.
    """
    state = {
        "format": _FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "progress": progress,
    }
    temporary = f"{os.fspath(path)}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, optimizer and random states in place; returns ``progress`` as it was saved.

    Raises FileNotFoundError for a missing file, and ValueError, naming the path, for a damaged or
    foreign file or one of another model or optimizer.
    """
    name = os.fspath(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{name}: expected a bertfast training checkpoint, "
            f"got a file torch cannot read: {reason}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT or set(state) != _KEYS:
        raise ValueError(
            f"{name}: expected a file with format {_FORMAT!r}, got another kind of file"
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a checkpoint of this model and optimizer, got: {error}"
        ) from None
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["progress"]
