"""gelu: with ``z = x + bias``,

* erf:  ``y = z Phi(z)``,   ``dy/dz = Phi(z) + z phi(z)``;
* tanh: ``y = z/2 (1 + t)``, ``t = tanh(c (z + a z^3))``,
  ``dy/dz = (1 + t)/2 + z/2 (1 - t^2) c (1 + 3 a z^2)``, ``c = sqrt(2/pi)``, ``a = 0.044715``.
"""

import math

import torch
from torch import Tensor

from bertfast.kernels.reference import accumulation_dtype

_A = 0.044715
_C = math.sqrt(2.0 / math.pi)


def supports(x: Tensor) -> str | None:
    return None


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    z = x.to(accumulation_dtype(x))
    return z if bias is None else z + bias


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    z = _sum(x, bias)
    if approximate == "tanh":
        y = 0.5 * z * (1 + torch.tanh(_C * (z + _A * z**3)))
    else:
        y = 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))
    return y.to(x.dtype).contiguous()


def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    z = _sum(x, bias)
    if approximate == "tanh":
        t = torch.tanh(_C * (z + _A * z**3))
        slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _C * (1 + 3 * _A * z * z)
    else:
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        slope = cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    dz = dout * slope
    if bias is None:
        dbias = x.new_empty(0)
    else:
        dbias = dz.reshape(-1, bias.shape[0]).sum(0).to(bias.dtype)
    return dz.to(x.dtype).contiguous(), dbias
