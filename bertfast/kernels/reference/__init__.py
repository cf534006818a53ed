"""Plain torch, any floating dtype, any device: the oracle, and the documentation of the maths.

Nothing here calls a fused torch op, and nothing is tuned: what a kernel must compute stands here in
the shortest form. Arithmetic is float32 at least, float64 on float64 inputs.
"""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics and sums over ``x`` are taken."""
    return torch.promote_types(x.dtype, torch.float32)
