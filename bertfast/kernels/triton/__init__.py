"""Triton kernels and their launchers, for CUDA tensors, compiled by Triton at their first use.

Nothing here imports triton, which may not be installed: the words' modules do, and
:mod:`bertfast.backends` imports them only where :data:`missing` is None. With
``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter on CPU tensors, which is for tests.
"""

import functools
import importlib.util
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertfast.kernels.device import properties, unsupported_by_gpu, unsupported_dtype

# As triton itself reads it, once, when a kernel is defined.
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")

# The longest row that is normalised, and the longest of which a tile has more than one: 64 of them
# stay within int32 offsets.
MOST_COLUMNS = 65536
# What one program takes of a row at a time; longer rows are taken in pieces.
WIDEST_BLOCK = 8192


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda is None and not interpreted:
        return "this torch was built without CUDA"
    return None


# Why no kernel here can run at all, or None.
missing = _missing()


def unsupported(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take ``x``, or None."""
    if not interpreted:
        return unsupported_by_gpu(x)
    if not x.is_cpu:
        return f"the input is on {x.device}; Triton's interpreter takes CPU tensors"
    if x.dtype == torch.bfloat16:
        return "Triton's interpreter computes torch.bfloat16 wrongly"
    return unsupported_dtype(x)


def unsupported_rows(x: Tensor) -> str | None:
    """The same, where a row is normalised."""
    if x.dim() and x.shape[-1] > MOST_COLUMNS:
        return f"the input's rows have {x.shape[-1]} columns; it takes up to {MOST_COLUMNS}"
    return unsupported(x)


def architecture(device: torch.device) -> str:
    """``"sm_90"`` and the like; ``""`` of a CPU, where kernels are only interpreted or compiled."""
    return properties(device.index)[0] if device.type == "cuda" else ""


def generation(device: torch.device) -> int:
    """8, 9, 10 or later: how a multiprocessor multiplies. 9 where that is not known."""
    name = architecture(device).removeprefix("sm_")
    number = int(name) // 10 if name else 9
    return 8 if number == 12 else number  # sm_120 has the instructions of sm_80


def programs_for(device: torch.device, per_processor: int, tiles: int, pieces: int = 1) -> int:
    """How many programs share out a sum over ``tiles``, for each of ``pieces`` of the columns. One
    device always takes as many, so that its results are the same bits every time."""
    # The interpreter's few are still more than are summed at a time.
    processors = properties(device.index)[1] if device.type == "cuda" else 9
    return max(1, min(processors * per_processor // max(pieces, 1), tiles))


def product_precision(x: Tensor) -> str:
    """Of a product of ``x``: tf32 in float32 where torch may use it, too."""
    # Asking for allow_tf32 is an error where the choice was made by fp32_precision, which knows it.
    if x.is_cuda and x.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def signed(word: int) -> int:
    """A 32-bit word as an int32, so that Triton types all of them alike."""
    return word - (1 << 32) if word >= 1 << 31 else word


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows, columns: of the tile; powers of two, columns at least the dropout mask's 8.
        warps: that share it.
        per_processor: programs per multiprocessor, where programs loop over tiles; four, because
            one waits at its barriers while the others load.
        stages: how many tiles ahead such a loop loads; 1 leaves it to the other programs.
    """

    rows: int
    columns: int
    warps: int
    per_processor: int = 4
    stages: int = 1


def measured_tile(kernel: str, width: int, device: torch.device) -> Tile | None:
    """The tile of that many columns that ``tuned.json`` has for ``kernel`` on this architecture."""
    known = _tuned().get(architecture(device), {}).get(kernel, {}).get(str(width))
    return None if known is None else Tile(columns=width, **known)


def tile(
    kernel: str, columns: int, device: torch.device, *, elements: int, widest: int, per_thread: int
) -> Tile:
    """The tile that ``kernel`` uses on rows of ``columns``.

    From the measured table (``tuned.json``, written by ``benchmarks/tune.py``) where it knows the
    device's architecture and the kernel, else of about ``elements``, ``per_thread`` to a thread.
    """
    if columns % 16:
        # Rows that start anywhere are read element by element, each with an address of its own.
        elements, widest, per_thread = elements // 2, min(widest, 2048), per_thread // 4
    width = min(max(power_of_two(columns), 8), widest)
    found = None if columns % 16 else measured_tile(kernel, width, device)
    if found is None:
        rows = max(1, min(elements // width, 64)) if columns <= MOST_COLUMNS else 1
        found = Tile(rows, width, max(1, min(rows * width // (32 * per_thread), 16)))
    # Offsets inside a tile are int32, so very long rows come one by one.
    return found if columns <= MOST_COLUMNS else replace(found, rows=1)


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("tuned.json").read_text())
    return table
