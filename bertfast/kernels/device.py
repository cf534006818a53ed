"""What launchers for a GPU, Triton's or CUDA's, ask of the device."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def properties(index: int) -> tuple[str, int]:
    """``"sm_90"`` and the like, and the number of multiprocessors."""
    of_device = torch.cuda.get_device_properties(index)
    return f"sm_{of_device.major}{of_device.minor}", of_device.multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A launch goes to the current device, so ``x``'s is made current, and the other one again."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
