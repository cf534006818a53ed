"""Matrix products with weights that are packed once, for inference on the CPU.

oneDNN multiplies a weight that lies in its own blocked layout up to twice as fast as ``F.linear``
multiplies the same weight as it is stored (benchmarks/NOTES.md). Packing costs about as much as one
product of a few tokens and a copy of the weight, which pays where a model is kept and called again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

DTYPES = (torch.float32, torch.bfloat16)
# The number of rows that oneDNN lays the weight out for; other numbers may come.
ROWS = 1024


def is_available() -> bool:
    """Whether this build of torch has what packs weights and multiplies by them."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PrepackedLinear(TorchFunctionMode):
    """``with PrepackedLinear():`` takes over ``F.linear`` where nothing is differentiated.

    What it does not take goes where it would go without it: other dtypes, other devices, grad mode,
    autocast. A weight is packed at its first product, kept as long as the weight lives, and packed
    again after it was written to (but torch does not say so of what is written through ``.data``).
    Holds in the thread that entered it; one instance may be entered again and again, which is what
    keeps the packed weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: Any = WeakTensorKeyDictionary()
        self._available = is_available()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is packed cannot be copied or saved, and is packed again where it is wanted.
        return type(self), ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and self._available and _takes(*args):
            x, weight, *bias = args
            packed = self._pack(weight)
            return torch.ops.mkldnn._linear_pointwise(
                x, packed, bias[0] if bias else None, "none", [], ""
            )
        return func(*args, **(kwargs or {}))

    def _pack(self, weight: Tensor) -> Tensor:
        written = (weight._version, weight.data_ptr())
        known = self._packed.get(weight)
        if known is None or known[0] != written:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self._packed[weight] = known = (written, packed)
        return known[1]


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.shape[0] > 0
        # A tensor made in inference mode does not say when it was written to.
        and not weight.is_inference()
        and isinstance(weight, torch.nn.Parameter)
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled("cpu")
    )
