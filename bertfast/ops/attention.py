"""attention: softmax attention over packed sequences of different lengths."""

import math

import torch
from torch import Tensor

from bertfast.backends import choose, kernel
from bertfast.ops._checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_floating,
    check_integer,
    check_like,
    check_number,
    check_shape,
    values_are_checked,
)
from bertfast.ops._operator import Operator
from bertfast.ops.dropout import dropout_arguments

MAX_HEAD_DIM = 256


def _check_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    names: tuple[str, str] = ("cu_seqlens_q", "max_seqlen_q"),
) -> None:
    if values_are_checked(cu_seqlens_q):
        check_cu_seqlens_values(names[0], cu_seqlens_q, q.shape[0], names[1], max_seqlen_q)
        if cu_seqlens_k is not cu_seqlens_q:
            check_cu_seqlens_values(
                "cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k
            )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    threshold: int,
    site: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_values(q, k, cu_seqlens_q, keys, max_seqlen_q, max_seqlen_k)
    return kernel("attention", backend).forward(
        q,
        k,
        v,
        cu_seqlens_q,
        keys,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        seed,
        threshold,
        site,
    )


def _forward_fake(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    threshold,
    site,
    backend,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _empty_logsumexp(q)


def _empty_logsumexp(q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    threshold: int,
    site: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    kernel("attention", backend).backward(
        dout,
        q,
        k,
        v,
        out,
        logsumexp,
        cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        seed,
        threshold,
        site,
        (dq, dk, dv),
    )
    return dq, dk, dv


def _backward_fake(dout, q, k, v, *_) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(*inputs[:3], *outputs, *inputs[3:6])
    ctx.options = inputs[6:]


def _gradients(ctx, saved, dout, backward):
    return (*backward(dout, *saved, *ctx.options), *[None] * 10)


_attention = Operator(
    "attention",
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def _packed_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    threshold: int,
    site: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    names = ("cu_seqlens", "max_seqlen")
    _check_values(q, k, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, names)
    return kernel("attention", backend).forward(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale,
        causal,
        seed,
        threshold,
        site,
    )


def _packed_forward_fake(
    qkv, cu_seqlens, seed, max_seqlen, scale, causal, threshold, site, backend
) -> tuple[Tensor, Tensor]:
    q = qkv.select(1, 0)
    return q.new_empty(q.shape), _empty_logsumexp(q)


def _packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    threshold: int,
    site: int,
    backend: str,
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    kernel("attention", backend).backward(
        dout,
        *qkv.unbind(1),
        out,
        logsumexp,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale,
        causal,
        seed,
        threshold,
        site,
        dqkv.unbind(1),
    )
    return dqkv


def _packed_backward_fake(dout, qkv, *_) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _packed_save(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(inputs[0], *outputs, *inputs[1:3])
    ctx.options = inputs[3:]


def _packed_gradients(ctx, saved, dout, backward):
    return (backward(dout, *saved, *ctx.options), *[None] * 8)


_attention_qkvpacked = Operator(
    "attention_qkvpacked",
    forward=_packed_forward,
    backward=_packed_backward,
    forward_fake=_packed_forward_fake,
    backward_fake=_packed_backward_fake,
    save=_packed_save,
    gradients=_packed_gradients,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``dropout(softmax(scale * q k^T)) v`` within each sequence and head.

    Scaled dot-product attention (Vaswani et al., "Attention Is All You Need", 2017, section 3.2).
    Nothing of size sequence x sequence is kept for backward.

    Args:
        q: ``(Tq, heads, d)`` floating point, ``1 <= d <= 256``. Rows from ``cu_seqlens_q[-1]`` on
            are storage: their output and gradient are zeros.
        k, v: ``(Tk, heads, d)`` like ``q``.
        cu_seqlens_q: int32 ``(batch + 1,)``, starts at 0, never falls, ends at or before ``Tq``:
            sequence i is rows ``cu_seqlens_q[i]`` up to ``cu_seqlens_q[i + 1]``.
        cu_seqlens_k: the same for the keys; None: as the queries.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        scale: None: ``1 / sqrt(d)``.
        causal: query i sees key j <= i + Sk - Sq (aligned at the bottom right). A query that sees
            no key gives 0 and gets gradient 0.
        dropout_p: probability in [0, 1] that an attention probability is dropped.
        seed: int64, one element, on ``q``'s device; needed when ``dropout_p > 0``.
        site: 32-bit number of the place in the model.
        backend: see :mod:`bertfast.backends`.

    Returns:
        ``(Tq, heads, d)`` in ``q``'s dtype.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type. On CUDA the
            values of ``cu_seqlens`` are looked at only under ``BERTFAST_CHECK=1``.
        BackendError: ``backend`` cannot run this.
    """
    _check_heads("q", q, 3)
    for name, tensor in (("k", k), ("v", v)):
        check_like(name, tensor, "q", q)
    check_shape("k", k, (k.shape[0] if k.dim() else 0, *q.shape[1:]))
    check_shape("v", v, tuple(k.shape))
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q)
    check_integer("max_seqlen_q", max_seqlen_q, least=0)
    if cu_seqlens_k is None:
        check_shape("k", k, tuple(q.shape))
        max_seqlen_k = max_seqlen_q
    else:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "q", q)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k: expected shape {tuple(cu_seqlens_q.shape)} as cu_seqlens_q, "
                f"got {tuple(cu_seqlens_k.shape)}"
            )
        if max_seqlen_k is None:
            raise ValueError("max_seqlen_k: expected a number beside cu_seqlens_k, got None")
        check_integer("max_seqlen_k", max_seqlen_k, least=0)
        if cu_seqlens_k is cu_seqlens_q:
            cu_seqlens_k = None  # a custom op's inputs may not be the same tensor twice
    seed, threshold, scale = _options(q, dropout_p, seed, site, scale, causal)
    return _attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        threshold,
        site,
        choose("attention", q, backend, max(max_seqlen_q, max_seqlen_k)),
    )


def attention_qkvpacked(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention that reads queries, keys and values in place from one projection's output.

    Args:
        qkv: ``(T, 3, heads, d)``: queries, keys and values. Its gradient is one such tensor.
        cu_seqlens, max_seqlen, scale, causal, dropout_p, seed, site, backend: as in
            :func:`attention`.

    Returns:
        ``(T, heads, d)`` in ``qkv``'s dtype.

    Raises:
        ValueError, TypeError, BackendError: as :func:`attention`.
    """
    _check_heads("qkv", qkv, 4)
    if qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape (T, 3, heads, d), got {tuple(qkv.shape)}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, "qkv", qkv)
    check_integer("max_seqlen", max_seqlen, least=0)
    seed, threshold, scale = _options(qkv, dropout_p, seed, site, scale, causal)
    return _attention_qkvpacked(
        qkv,
        cu_seqlens,
        seed,
        max_seqlen,
        scale,
        causal,
        threshold,
        site,
        choose("attention", qkv, backend, max_seqlen),
    )


def _check_heads(name: str, x: Tensor, dims: int) -> None:
    check_floating(name, x)
    layout = "(T, heads, d)" if dims == 3 else "(T, 3, heads, d)"
    if x.dim() != dims:
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
    if x.shape[-2] < 1 or not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: expected shape {layout} with heads >= 1 and 1 <= d <= {MAX_HEAD_DIM}, "
            f"got {tuple(x.shape)}"
        )


def _options(
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    scale: float | None,
    causal: bool,
) -> tuple[Tensor | None, int, float]:
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if scale is not None:
        check_number("scale", scale)
    threshold, seed = dropout_arguments(dropout_p, seed, site, "q" if x.dim() == 3 else "qkv", x)
    return seed, threshold, 1.0 / math.sqrt(x.shape[-1]) if scale is None else float(scale)
