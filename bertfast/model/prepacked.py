"""Matrix products with weights that are packed for one call, for inference on the CPU.

oneDNN multiplies a weight that lies in its own blocked layout up to twice as fast as ``F.linear``
multiplies the same weight as it is stored (benchmarks/NOTES.md). Packing costs as much as that
saves on some hundred rows, which a call on many texts has and a call on one has not.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float32, torch.bfloat16)
# A weight is packed once so many rows have been asked of it. On CPUs whose F.linear is as fast as
# oneDNN, packing then adds a twelfth to what these rows cost, and ever less to more.
WORTH = 512
# The number of rows that oneDNN lays the weight out for; other numbers may come.
ROWS = 1024


@functools.cache
def is_available(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this CPU, packs weights of ``dtype`` and multiplies by them.

    oneDNN takes bfloat16 on some CPUs only, and says so by refusing it, so it is tried.
    """
    if dtype not in DTYPES or not torch.backends.mkldnn.is_available():
        return False
    # Whatever the default device and mode are where this is asked first.
    weight = torch.ones(16, 16, dtype=dtype, device="cpu")
    try:
        with torch.no_grad():
            _multiply(weight, _pack(weight), None)
    except (AttributeError, RuntimeError):  # an older torch; a CPU without it
        return False
    return True


class PrepackedLinear(TorchFunctionMode):
    """``with PrepackedLinear():`` takes over ``F.linear`` where nothing is differentiated.

    What it does not take goes where it would go without it: other dtypes, other devices, grad mode,
    autocast, oneDNN switched off (``torch.backends.mkldnn``), weights that are no parameters, and
    the first products of a weight, until ``WORTH`` rows have been multiplied by it.

    Each weight is read when it is packed, and the packed copy is used until the block ends: nobody
    can tell whether a weight was written since, because writing through ``.data`` leaves no trace.
    So one instance serves one call, in one thread, in which nobody writes weights.
    """

    def __init__(self) -> None:
        super().__init__()
        # By the weight's identity, which holds because the weight is kept alive beside it.
        self._seen: dict[int, _Weight] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and _takes(*args):
            x, weight, *bias = args
            packed = self._packed(weight, x.numel() // x.shape[-1])
            if packed is not None:
                return _multiply(x, packed, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))

    def _packed(self, weight: Tensor, rows: int) -> Tensor | None:
        seen = self._seen.get(id(weight))
        if seen is None:
            seen = self._seen[id(weight)] = _Weight(weight)
        seen.rows += rows
        if seen.packed is None and seen.rows >= WORTH:
            seen.packed = _pack(weight)
        return seen.packed


class _Weight:
    """What is known of a weight: how many rows were multiplied by it, and its packed copy."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = 0
        self.packed: Tensor | None = None


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.numel() > 0
        # Neither what a hook or a parametrisation has just computed nor a quantised tensor.
        and type(weight) is torch.nn.Parameter
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and is_available(x.dtype)
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return packed


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
