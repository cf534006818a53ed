"""How tensors lie when a kernel of ours, native or Triton, reads them."""

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """``x`` contiguous, and without the sign torch may keep as a mere flag."""
    return x.resolve_neg().contiguous() if x.is_neg() else x.contiguous()


def dense_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)


def address(x: Tensor | None) -> int:
    """Of the first element; 0, a null pointer, of what is not there."""
    return 0 if x is None else x.data_ptr()


def by_head(x: Tensor) -> Tensor:
    """``x`` in any strides, but the elements of a head side by side."""
    return x if x.stride(-1) == 1 and not x.is_neg() else dense(x)


def rows_and_columns(x: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Of ``x`` as gelu takes it: without a bias the rows' ends mean nothing, and all is one row."""
    if bias is None:
        return 1, x.numel()
    return x.numel() // bias.shape[0] if bias.shape[0] else 0, bias.shape[0]
