"""Thin calls into ``bertfast._cuda``, the CUDA C++ kernels (``csrc/cuda``).

A launcher allocates the outputs, hands over addresses and sizes, and turns a failed launch into a
:class:`bertfast.errors.KernelError` with CUDA's message. It does no arithmetic on tensors.

For tests, ``BERTFAST_CUDA_EMULATION`` is the path of the same module compiled for the CPU
(``csrc/emulation``), which takes CPU tensors.
"""

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from bertfast.errors import KernelError
from bertfast.kernels.device import (
    on_device,
    properties,
    shared_memory,
    unsupported_by_gpu,
    unsupported_dtype,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_lib: ModuleType | None = None
_tried: dict[int, str | None] = {}
# Why no kernel here can run at all, or None.
missing: str | None = None

_emulation = os.environ.get("BERTFAST_CUDA_EMULATION", "").strip()
try:
    if _emulation:
        _spec = importlib.util.spec_from_file_location("_cuda", _emulation)
        if _spec is None or _spec.loader is None:
            raise ImportError(
                "BERTFAST_CUDA_EMULATION: expected the path of the emulated module, "
                f"got {_emulation!r}"
            )
        _lib = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_lib)
    elif torch.version.cuda is None:
        missing = "this torch was built without CUDA"
    else:
        _lib = importlib.import_module("bertfast._cuda")
except ImportError as error:
    # Asked for by name, it is an error, not a fallback.
    if _emulation:
        raise
    missing = f"bertfast._cuda is not there ({error}); bertfast env says why"


def library() -> ModuleType:
    """The loaded extension module."""
    if _lib is None:
        raise KernelError(f"bertfast._cuda is not there: {missing}")
    return _lib


def emulated() -> bool:
    """Whether the kernels run on the CPU."""
    return _lib is not None and bool(_lib.emulated)


def _unusable(device: int) -> str | None:
    """Why the device runs nothing of the module, an old driver or another architecture, or None."""
    if device not in _tried:
        with torch.cuda.device(device):
            status = library().try_device(device)
        text = library().status_text(status)
        _tried[device] = f"cuda:{device} cannot run bertfast._cuda: {text}" if status else None
    return _tried[device]


# What a device cannot run it never can; torch.compile takes the answer as a constant. This is all
# that torch.compiler.assume_constant_result does, but for importing torch._dynamo, which takes as
# long as torch.
_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(x: Tensor) -> str | None:
    """Why the CUDA kernels cannot take ``x``, or None."""
    if _lib is None:
        return missing
    if not emulated():
        return unsupported_by_gpu(x) or _unusable(x.device.index)
    if not x.is_cpu:
        return f"the input is on {x.device}; the emulation takes CPU tensors"
    return unsupported_dtype(x)


def dtype_code(x: Tensor) -> int:
    return _DTYPES[x.dtype]


def processors_of(x: Tensor) -> int:
    """Of ``x``'s device; one where it is emulated, so that few blocks go round several times."""
    return properties(x.device.index)[1] if x.is_cuda else 1


def shared_memory_of(x: Tensor) -> int:
    """Bytes that a block may have on ``x``'s device; where it is emulated, as on an H100."""
    return shared_memory(x.device.index) if x.is_cuda else 227 * 1024


def launch(kernel: str, x: Tensor, *arguments: object, **numbers: object) -> None:
    """Call a launcher of ``csrc/cuda`` on ``x``'s device and torch's stream there.

    Args:
        arguments: its own: addresses, sizes, options.
        numbers: for the message, where it fails.

    Raises:
        KernelError: the launch failed; the message is CUDA's.
    """
    device = x.device.index if x.is_cuda else 0
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    with on_device(x):
        status = getattr(library(), kernel)(device, processors_of(x), stream, *arguments)
    if status:
        listed = ", ".join(f"{name}={value}" for name, value in numbers.items())
        text = library().status_text(status)
        raise KernelError(f"bertfast._cuda.{kernel}: CUDA error: {text}: {listed}, {x.dtype}")
