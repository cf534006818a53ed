"""Eval mode while a model predicts, and each module's own mode back behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn


class _Use:
    """Who predicts with a model now: how many, and its modules that were in training."""

    def __init__(self) -> None:
        self.count = 0
        self.training: list[nn.Module] = []


_lock = Lock()
_uses: dict[nn.Module, _Use] = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules of ``model`` in eval mode.

    Threads may be inside together: the last one out puts back what the first one found.
    """
    with _lock:
        use = _uses.setdefault(model, _Use())
        use.count += 1
        training = [module for module in model.modules() if module.training]
        if training:
            use.training += training
            model.eval()
    try:
        yield
    finally:
        with _lock:
            use.count -= 1
            if not use.count:
                for module in use.training:
                    module.training = True
                del _uses[model]
