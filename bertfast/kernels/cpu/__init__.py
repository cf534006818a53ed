"""Thin calls into ``bertfast._cpu``, the native C++ kernels (``csrc/cpu``).

A launcher allocates the outputs, hands over addresses and sizes, and turns a refused launch into a
:class:`bertfast.errors.KernelError`. It does no arithmetic on tensors.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from bertfast.errors import KernelError

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_lib: ModuleType | None = None
_import_error = ""
try:
    # After torch, so that both use the one OpenMP runtime torch has loaded.
    _lib = importlib.import_module("bertfast._cpu")
except ImportError as error:
    # Asked for by name, an instruction set that cannot run is an error, not a fallback.
    if os.environ.get("BERTFAST_CPU_ISA") and not isinstance(error, ModuleNotFoundError):
        raise
    _import_error = str(error)


def library() -> ModuleType:
    """The loaded extension module."""
    if _lib is None:
        raise KernelError(f"bertfast._cpu is not there: {_import_error}")
    return _lib


def unsupported(x: Tensor) -> str | None:
    """Why the native kernels cannot take ``x``, or None."""
    if _lib is None:
        return f"bertfast._cpu is not there ({_import_error}); bertfast env says why"
    if not x.is_cpu:
        return f"the input is on {x.device}, not on the CPU"
    if x.dtype not in _DTYPES:
        return f"the input is {x.dtype}; it takes torch.float32 and torch.bfloat16"
    return None


def threads() -> int:
    """How many threads a kernel may use: what torch may use, as this Python thread sees it."""
    return torch.get_num_threads()


def dtype_code(x: Tensor) -> int:
    return _DTYPES[x.dtype]


def row_blocks(rows: int) -> int:
    """In how many shares backward sums over rows; a function of the rows alone, so that the result
    does not depend on the number of threads."""
    return max(1, min(64, rows // 32))


def check_launch(status: int, kernel: str, **numbers: object) -> None:
    if status != 0:
        listed = ", ".join(f"{name}={value}" for name, value in numbers.items())
        what = "ran out of memory" if status < 0 else f"refused its argument group {status}"
        raise KernelError(f"bertfast._cpu.{kernel} {what}: {listed}")
