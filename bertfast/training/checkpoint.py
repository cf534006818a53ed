"""Training checkpoints: everything that a resumed run needs to be bitwise the run that was never
interrupted.

One file of tensors and plain values (``torch.save``), read with ``weights_only=True``, so that
loading a foreign file runs no code from it. For weights to share, use ``model.save_pretrained``.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

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
    state = read_checkpoint(path, model, optimizer)
    restore(state, model, optimizer)
    return state["progress"]


def read_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The content of a checkpoint that fits ``model`` and ``optimizer``, which are not changed.

    Raises as ``load_checkpoint``.
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
    misfit = (
        _model_misfit(state["model"], model)
        or _optimizer_misfit(state["optimizer"], optimizer)
        or _generator_misfit(state["cpu_rng"], state["cuda_rng"])
    )
    if misfit:
        raise ValueError(f"{name}: expected a checkpoint of this model and optimizer, got {misfit}")
    return state


def restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put what ``read_checkpoint`` returned into model, optimizer and random generators."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def _model_misfit(saved: Any, model: nn.Module) -> str | None:
    now = model.state_dict()
    if not isinstance(saved, dict) or not all(isinstance(w, Tensor) for w in saved.values()):
        return "weights that are no dict of tensors"
    if saved.keys() != now.keys():
        names = sorted(map(str, saved.keys() ^ now.keys()))
        return f"weights of other names, such as {names[0]}"
    for name, weight in now.items():
        if saved[name].shape != weight.shape:
            return f"{name} of shape {tuple(saved[name].shape)} instead of {tuple(weight.shape)}"
    return None


def _optimizer_misfit(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(states, dict):
        return "an optimizer state without param_groups and state"
    now = optimizer.param_groups
    if [group.keys() for group in groups] != [group.keys() for group in now]:
        return "an optimizer of other settings"
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in now]:
        return "an optimizer of other parameters"
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in now for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in states.get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                return (
                    f"an optimizer's {key} of shape {tuple(value.shape)} "
                    f"instead of {tuple(parameter.shape)}"
                )
    return None


def _generator_misfit(cpu: Any, cuda: Any) -> str | None:
    try:
        torch.Generator().set_state(cpu)
    except (RuntimeError, TypeError) as error:
        return f"a random state that torch refuses ({error})"
    if not isinstance(cuda, list) or not all(isinstance(s, Tensor) for s in cuda):
        return "random states of CUDA devices that are no list of tensors"
    return None
