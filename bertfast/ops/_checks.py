"""Argument checks shared by the ops. Each message names the argument, what was expected, what came.

Shapes, dtypes and devices are checked on every call. Values (ids, labels, ``cu_seqlens``) are
checked by the launchers, through :func:`values_are_checked`: always on CPU tensors, and on CUDA
only under ``BERTFAST_CHECK=1``, because looking at a value there makes the host wait.
"""

import os

import torch
from torch import Tensor

_CHECK_CUDA_VALUES = os.environ.get("BERTFAST_CHECK", "") == "1"


def check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_floating(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def check_integers(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {value.dtype}")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(value.shape)}")


def check_like(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """``value`` has the dtype and device of ``like``."""
    check_tensor(name, value)
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as {like_name}, got {value.dtype}")
    check_device(name, value, like_name, like)


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    # Comparing device objects costs a microsecond, asking both for the CPU a tenth of it.
    if not (value.is_cpu and like.is_cpu) and value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as {like_name}, got {value.device}"
        )


def check_parameter(
    name: str, value: Tensor, expected: tuple[int, ...], like_name: str, like: Tensor
) -> None:
    """A parameter has ``like``'s dtype, or is float32 under lower-precision activations."""
    check_tensor(name, value)
    if value.dtype != like.dtype and value.dtype != torch.float32:
        raise TypeError(
            f"{name}: expected {like.dtype} as {like_name}, or torch.float32, got {value.dtype}"
        )
    check_shape(name, value, expected)
    check_device(name, value, like_name, like)


def check_norm(
    weight: Tensor, bias: Tensor, eps: float, columns: int, like_name: str, like: Tensor
) -> None:
    """LayerNorm's parameters, both ``(columns,)`` and of one dtype, and its ``eps``."""
    check_parameter("weight", weight, (columns,), like_name, like)
    check_parameter("bias", bias, (columns,), like_name, like)
    if weight.dtype != bias.dtype:
        raise TypeError(f"bias: expected {weight.dtype} as weight, got {bias.dtype}")
    check_number("eps", eps, least=0.0)


def check_seed(seed: Tensor | None, like_name: str, like: Tensor) -> None:
    if seed is None:
        raise ValueError(
            "seed: expected an int64 tensor of one element when dropout_p > 0, got None"
        )
    check_tensor("seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            "seed: expected an int64 tensor of one element, "
            f"got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    check_device("seed", seed, like_name, like)


def check_integer(name: str, value: int, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected a number >= {least}, got {value}")


def check_number(name: str, value: float, least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Written so that NaN fails.
    if least is not None and not value >= least:
        raise ValueError(f"{name}: expected a number >= {least:g}, got {value}")


def check_site(site: int) -> None:
    check_integer("site", site)
    if not 0 <= site <= 0xFFFFFFFF:
        raise ValueError(f"site: expected a 32-bit unsigned integer, got {site}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: expected an int32 tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    check_device(name, cu_seqlens, like_name, like)


def values_are_checked(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at without making a GPU's host wait."""
    return x.device.type == "cpu" or _CHECK_CUDA_VALUES


def check_cu_seqlens_values(
    name: str, cu_seqlens: Tensor, tokens: int, max_name: str, max_seqlen: int
) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {bounds[0]}")
    longest = 0
    for i in range(1, len(bounds)):
        length = bounds[i] - bounds[i - 1]
        if length < 0:
            raise ValueError(
                f"{name}: expected values that never fall, got {bounds[i - 1]} before {bounds[i]} "
                f"at position {i}"
            )
        longest = max(longest, length)
    if bounds[-1] > tokens:
        raise ValueError(f"{name}: expected to end at or before {tokens} tokens, got {bounds[-1]}")
    if longest > max_seqlen:
        raise ValueError(
            f"{max_name}: expected at least the longest sequence, {longest}, got {max_seqlen}"
        )


def check_range(name: str, values: Tensor, upper: int, ignored: int | None = None) -> None:
    """All of ``values`` lie in ``[0, upper)`` or are ``ignored``."""
    # One pass where nothing is wrong: asking each value takes as long as the look-up it guards.
    if values.numel() == 0:
        return
    if ignored is None:
        least, most = torch.aminmax(values)
        if int(least) >= 0 and int(most) < upper:
            return
    bad = (values < 0) | (values >= upper)
    if ignored is not None:
        bad &= values != ignored
    if bool(bad.any()):
        where = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{name}: expected values from 0 to {upper - 1}"
            + (f" (or {ignored})" if ignored is not None else "")
            + f", got {int(values.flatten()[where])} at position {where}"
        )
