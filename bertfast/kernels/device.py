"""What launchers for a GPU, Triton's or CUDA's, ask of the device."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def properties(index: int) -> tuple[str, int]:
    """``"sm_90"`` and the like, and the number of multiprocessors."""
    return architecture(index), torch.cuda.get_device_properties(index).multi_processor_count


# What is asked while torch.compile traces is read anew each time: torch.compile knows the device's
# properties as a constant, but no cache around them.
def architecture(index: int) -> str:
    """``"sm_90"`` and the like."""
    of_device = torch.cuda.get_device_properties(index)
    return f"sm_{of_device.major}{of_device.minor}"


def shared_memory(index: int) -> int:
    """Bytes that a block may have, where it asks for more than all may."""
    of_device: Any = torch.cuda.get_device_properties(index)
    return int(of_device.shared_memory_per_block_optin)


def unsupported_by_gpu(x: Tensor) -> str | None:
    """Why no kernel for a GPU can take ``x``, or None."""
    if not x.is_cuda:
        return f"the input is on {x.device}, not on a CUDA device"
    if torch.cuda.get_device_properties(x.device.index).major < 8:
        return f"{x.device} has a compute capability below 8.0"
    return unsupported_dtype(x)


def unsupported_dtype(x: Tensor) -> str | None:
    """The same, of its dtype alone: where a GPU's kernels run on the CPU."""
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"the input is {x.dtype}; it takes torch.float32, torch.bfloat16 and torch.float16"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A launch goes to the current device, so ``x``'s is made current, and the other one again."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
