"""Which rows of a padded batch attend, and to which: what attention on packed rows needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bertfast import ops
from bertfast.ops._recorders import is_graph_recorded


@dataclass(frozen=True)
class Packing:
    """The query rows of a padded batch and the key rows they see, packed.

    Args:
        queries: int64, places of the query rows in the flattened batch, None for all rows in their
            order.
        cu_seqlens_q, max_seqlen_q: where their sequences start, as :func:`bertfast.ops.attention`
            takes it.
        keys: int64, places of the key rows among the rows they are chosen from, None for all.
        cu_seqlens_k, max_seqlen_k: the same for the keys.
        causal: query i sees key j <= i + keys - queries.
    """

    queries: Tensor | None
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    keys: Tensor | None
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    causal: bool = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        dropout_p: float,
        seed: Tensor | None,
        site: int,
        backend: str | None = None,
    ) -> Tensor:
        """Attention of the packed queries ``(Tq, heads, d)`` to the chosen ones of the keys."""
        if self.keys is not None:
            k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        return ops.attention(
            q,
            k,
            v,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            scale=scale,
            causal=self.causal,
            dropout_p=dropout_p,
            seed=seed,
            site=site,
            backend=backend,
        )


def places(chosen: Tensor) -> Tensor | None:
    """Where a bool mask is true, in its flattened order: int64, None if that is everywhere."""
    _refuse_recording()
    flat = chosen.reshape(-1).nonzero().squeeze(1)
    return None if flat.shape[0] == chosen.numel() else flat


def sequences(chosen: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` and ``max_seqlen`` of the true places in each row of a bool ``(B, S)``."""
    lengths = chosen.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _refuse_recording() -> None:
    # An export notices by itself what depends on values.
    if not torch.compiler.is_compiling() and is_graph_recorded():
        raise NotImplementedError(
            "attention_mask: a recording (torch.jit.trace, make_fx) would be right for this mask "
            'only; record the model with attn_implementation="sdpa", after '
            "bertfast.integrations.transformers.restore where it is accelerated"
        )


def pad(x: Tensor, rows: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Packed ``(T, ...)`` to ``(B, S, ...)``, zeros where ``rows`` names no place."""
    if rows is not None:
        x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, rows, x)
    return x.reshape(*shape, *x.shape[1:])
