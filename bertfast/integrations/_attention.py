"""``attn_implementation="bertfast"``: the attention and the mask function for transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from bertfast.integrations._packing import Packing, pad, places, sequences
from bertfast.model.base import draw_seed
from bertfast.ops._checks import check_device, check_floating, check_shape, check_tensor

# Keyword arguments by which models ask for what the kernels do not compute.
_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the scores",
    "head_mask": "a mask on heads",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
    "output_attentions": "attention probabilities as an output",
}
_INSTEAD = 'use attn_implementation="sdpa" or "eager" for this model'


class Mask:
    """The keys that are attended, bool ``(B, kv_length)``, which only :func:`attention` reads.

    Models that do not go through transformers' attention interface ask for a mask all the same and
    add it to their scores. Zeros and ones would spoil them silently, so this is no tensor: it can
    be asked what it is and moved, and refuses everything else.

    Args:
        attended: the tensor.
        q_length: how many queries it is for.
        causal, first: whether query i sees no key behind ``first + i``.
        asked_by: the model, for messages.

    ``packing``, of the queries and the keys, is worked out here, once per forward, and handed from
    layer to layer.
    """

    asked_by = "a model"  # on the class, too: a copy in the making has no attributes yet

    def __init__(
        self, attended: Tensor, q_length: int, causal: bool, first: int, asked_by: str = asked_by
    ) -> None:
        self.attended = attended
        self.q_length, self.causal, self.first = q_length, causal, first
        self.asked_by = asked_by
        self.packing = _pack(attended != 0, q_length, causal, first)
        self.shape, self.ndim = attended.shape, attended.ndim
        self.dtype, self.device = attended.dtype, attended.device

    def dim(self) -> int:
        return self.ndim

    def size(self, *dim: int) -> Any:
        return self.attended.size(*dim)

    def __len__(self) -> int:
        return len(self.attended)

    def to(self, *args: Any, **kwargs: Any) -> "Mask":
        """As a tensor's; one that was moved is packed again."""
        moved = self.attended.to(*args, **kwargs)
        if moved is self.attended:
            return self
        return Mask(moved, self.q_length, self.causal, self.first, self.asked_by)

    def contiguous(self, **_: Any) -> "Mask":
        return self

    def clone(self, **_: Any) -> "Mask":
        return self  # nobody writes into it

    def __getattr__(self, name: str) -> Any:
        # Also an AttributeError, so that hasattr() gets its answer.
        raise AttributeError(self._refusal(name))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        flat = (y for x in (*args, *(kwargs or {}).values()) for y in _flat(x))
        raise ValueError(next(x for x in flat if isinstance(x, cls))._refusal(func.__name__))

    def _refusal(self, name: str) -> str:
        return (
            f"attention_mask: expected {self.asked_by} to hand it to transformers' attention "
            f"interface, got {name!r} of it: models that compute attention themselves are not "
            'supported; use attn_implementation="eager" for this model'
        )


def _flat(x: Any) -> Iterator[Any]:
    """What is in a list of tensors, as ``torch.cat`` takes it."""
    yield from x if isinstance(x, (tuple, list)) else (x,)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Mask, *_: Any) -> Any:
        raise ValueError(self._refusal(name))

    return refuse


# Python looks for these in the class alone.
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (
    *(before + _name for _name in _BINARY for before in ("", "r", "i")),
    *("neg", "pos", "invert", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
    *("getitem", "setitem", "iter", "bool", "int", "float", "array", "contains"),
):
    setattr(Mask, f"__{_name}__", _refuse(f"__{_name}__"))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str | None = None,
    config: Any = None,
    **_: Any,
) -> Mask:
    """The mask function of ``attn_implementation="bertfast"``, called once per forward.

    Args:
        batch_size, q_length, kv_length: of the attention that is to come.
        q_offset, kv_offset: the position of the first query and of the first key.
        mask_function: transformers' pattern: causal or bidirectional, nothing else.
        attention_mask: bool ``(B, keys seen)``, False for padding; None for no padding.
        device: of the mask, where none is given.
        config: of the model, whose name is told where it cannot use the mask.

    Returns:
        bool ``(B, kv_length)``: the keys that are attended. It can be handed to :func:`attention`,
        copied and moved, and nothing else.

    Raises:
        ValueError, TypeError: a pattern or mask that the kernels do not compute.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise ValueError(
            f"mask_function: expected a causal or a bidirectional mask, got {name}: windows, "
            f"chunks, packed or blocked sequences are not supported; {_INSTEAD}"
        )
    if isinstance(attention_mask, Mask):  # generate() makes it first, and the model once more
        attention_mask = attention_mask.attended
    if attention_mask is None:
        attended = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        _check_mask(attention_mask)
        attended = attention_mask[:, kv_offset : kv_offset + kv_length] != 0
        missing = kv_length - attended.shape[1]
        attended = torch.nn.functional.pad(attended, (0, missing)) if missing else attended
        check_shape("attention_mask", attended, (batch_size, kv_length))
    causal = mask_function is causal_mask_function
    first = int(q_offset) - kv_offset if causal else 0
    asked_by = Mask.asked_by if config is None else f"the model of a {type(config).__name__}"
    return Mask(attended, q_length, causal, first, asked_by)


def _check_mask(attention_mask: Tensor) -> None:
    check_tensor("attention_mask", attention_mask)
    if attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected shape (B, S), 1 for a token and 0 for padding, got "
            f"{tuple(attention_mask.shape)}: masks per query and biases are not supported; "
            f"{_INSTEAD}"
        )


def _pack(attended: Tensor, q_length: int, causal: bool, first: int) -> Packing:
    """The packing of keys ``attended``, bool ``(B, Sk)``; causal queries start at key ``first``."""
    batch, kv_length = attended.shape
    if not causal:
        # All queries are computed, those on padding too: where there are as many queries as keys,
        # nothing says whether they are the same tokens or, in cross-attention, others.
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=attended.device) * q_length
        return Packing(None, cu_seqlens, q_length, places(attended), *sequences(attended))
    last = first + q_length
    if first < 0 or last > kv_length:
        raise ValueError(
            f"q_offset: expected queries among the {kv_length} keys, got keys {first} to {last - 1}"
        )
    # Keys behind the last query are a static cache's free places. What is left ends with the
    # queries themselves, so that without padding key j is seen by query i up to the bottom right.
    columns = torch.arange(kv_length, device=attended.device)
    keys = attended & (columns < last)
    queries = attended[:, first:last]
    return Packing(
        places(queries), *sequences(queries), places(keys), *sequences(keys), causal=True
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of ``attn_implementation="bertfast"``.

    Args:
        module: the attention layer. Its ``layer_idx``, if it has one, sets the dropout's site.
        query: ``(B, heads, Sq, d)`` floating point, ``d <= 256``.
        key, value: ``(B, key heads, Sk, d)``; query heads share them in groups.
        attention_mask: what :func:`mask` returned, or any 0/1 ``(B, Sk)``; None for no padding.
        scaling: None: ``1 / sqrt(d)``.
        dropout: probability; its seed is drawn from torch's default CPU generator in each call.
        is_causal: for a mask that :func:`mask` did not make; None: ``module.is_causal``, or True
            where there is none, as transformers' own functions take it.
        kwargs: others that models pass. Those that ask for another attention are refused.

    Returns:
        ``(B, Sq, heads, d)``, and None for the probabilities, which are never formed. A query that
        sees no key gives zeros, and so does padding among causal queries.

    Raises:
        ValueError, TypeError: what the kernels do not compute; the message names it.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: expected None, got {what}, not supported; {_INSTEAD}")
    check_floating("query", query)
    batch, heads, q_length, _ = query.shape
    packing = _packing_of(module, query, key, attention_mask, is_causal)
    if key.shape[1] != heads:
        if heads % key.shape[1]:
            raise ValueError(
                f"key: expected a number of heads that divides query's {heads}, got {key.shape[1]}"
            )
        key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if packing.queries is not None:
        q = q.index_select(0, packing.queries)
    layer = getattr(module, "layer_idx", None)
    out = packing.attend(
        q,
        k,
        v,
        scale=scaling,
        dropout_p=dropout,
        seed=draw_seed().to(query.device) if dropout > 0 else None,
        site=1 + 3 * layer if isinstance(layer, int) else 1,
    )
    return pad(out, packing.queries, (batch, q_length)), None


def _packing_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | Mask | None,
    is_causal: bool | None,
) -> Packing:
    batch, _, q_length, _ = query.shape
    kv_length = key.shape[2]
    if attention_mask is None:
        attended = torch.ones(batch, kv_length, dtype=torch.bool, device=query.device)
    else:
        made = attention_mask if isinstance(attention_mask, Mask) else None
        keys = attention_mask.attended if isinstance(attention_mask, Mask) else attention_mask
        _check_mask(keys)
        check_shape("attention_mask", keys, (batch, kv_length))
        check_device("attention_mask", keys, "query", query)
        if made is not None:
            if made.q_length == q_length:
                return made.packing
            is_causal = made.causal
        attended = keys != 0
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return _pack(attended, q_length, bool(causal), kv_length - q_length if causal else 0)
