"""Modules without memory, of which only names and shapes are asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What torch runs by a Python reference on the meta device, which imports torch._dynamo and so takes
# as long as importing torch did, to draw nothing.
DRAWS = (nn.init.normal_, Tensor.normal_)


class _Undrawn(TorchFunctionMode):
    """Draws leave a tensor as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """``with on_meta():`` modules are made on the meta device, and nothing is drawn for them."""
    with torch.device("meta"), _Undrawn():
        yield
