"""The forward passes that ``accelerate`` gives to transformers' models, on packed tokens.

A class here is put before the class of a model or layer instance. Modules, parameters and
their names stay transformers' own; between them, the arithmetic is :mod:`bertfast.ops`'. Where a
linear layer or an embedding has been replaced or has hooks, the module itself is called.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from bertfast import backends, ops
from bertfast.integrations._packing import Packing, pad, places, sequences
from bertfast.model.base import draw_seed
from bertfast.model.plain import is_plain, is_plain_norm, is_plain_table
from bertfast.ops._checks import check_shape
from bertfast.ops._recorders import values_are_hidden

# The class of an activation module and what it is to ops.gelu; others are called as they are.
_APPROXIMATIONS = {
    entry[0] if isinstance(entry, tuple) else entry: approximate
    for approximate, names in (
        ("none", ("gelu", "gelu_python")),
        ("tanh", ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")),
    )
    for entry in (ACT2CLS[name] for name in names if name in ACT2CLS)
}


@dataclass(frozen=True)
class Batch:
    """What all layers of one forward share.

    Args:
        packing: who attends to whom.
        seed: of the dropout masks, int64 ``(1,)``; None when nothing is dropped.
        backend: the ops' backend. A checkpointed layer is computed again on a thread that does not
            see an enclosing ``with bertfast.backend(...)``.
    """

    packing: Packing
    seed: Tensor | None
    backend: str | None

    def dropout_p(self, dropout: Any) -> float:
        """The probability of a dropout module now: its own mode and ``p`` count."""
        return dropout.p if _drops(dropout) else 0.0


class Accelerated(nn.Module):
    """What is put before a class: copies and pickles know it by the class it was made from.

    An instance becomes one by :func:`accelerate` alone. Calling the class, as
    ``type(model)(config)`` and ``model.from_pretrained`` do, makes one of transformers' own.
    """

    accelerated_from: type[nn.Module]
    # Where the modules lie whose place is taken, and the forwards that each of them may have.
    parts: tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if (args or kwargs) and "accelerated_from" in cls.__dict__:
            return cls.accelerated_from(*args, **kwargs)
        return super().__new__(cls)  # copies, pickles and DataParallel's replicas

    def is_whole(self) -> bool:
        """Whether all of :attr:`parts` are there still, none of them replaced or wrapped."""
        for path, forwards in self.parts:
            part: Any = self
            for name in path:
                # Not by getattr(), which is slow, and this is done in each forward.
                part = part._modules.get(name)
                if part is None:
                    return False
            if type(part).forward not in forwards or "forward" in part.__dict__:
                return False
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (type(self).accelerated_from,), self.__getstate__()


def needs_whole_rows(model: nn.Module) -> bool:
    """Whether somebody records what is computed, or computes it for each example alone.

    torch.func's transforms and opacus's hooks expect an example in every row, not a token.
    """
    if torch.compiler.is_exporting() or values_are_hidden():
        return True
    if torch.compiler.is_compiling() or "opacus" not in sys.modules:
        return False
    return any(hasattr(p, "grad_sample") for p in model.parameters())


def _unpickled(cls: type[nn.Module]) -> nn.Module:
    from bertfast.integrations._accelerate import accelerated_class

    made: Any = accelerated_class(cls)
    return made.__new__(made)


class AcceleratedModel(Accelerated):
    """A base model: unpads once, runs its layers on packed tokens, pads once."""

    bertfast_unpad: bool = True
    config: Any
    embeddings: Any

    def _layers(self) -> Any:
        raise NotImplementedError

    def _output(self, x: Tensor, hidden_states: tuple[Tensor, ...] | None) -> Any:
        raise NotImplementedError

    def _encode(self, call: dict[str, Any]) -> Any:
        """``forward`` with all its arguments by name; None where it is transformers' to compute."""
        asked = {
            name: getattr(self.config, name, None) if call.get(name) is None else call[name]
            for name in ("output_hidden_states", "output_attentions", "return_dict")
        }
        mask = call["attention_mask"]
        ids, embeds = call["input_ids"], call["inputs_embeds"]
        if (
            (ids is None) == (embeds is None)  # transformers says what is wrong
            or asked["output_attentions"]
            or asked["output_hidden_states"] not in (None, False, True)
            or (mask is not None and mask.dim() != 2)
            or any(call.get(name) is not None for name in _OTHER_WAYS)
            or needs_whole_rows(self)
            or not self._is_accelerated()
        ):
            return None
        tokens = ids if ids is not None else embeds
        shape = (tokens.shape[0], tokens.shape[1])
        rows, packing = self._pack(mask, shape, tokens.device)
        seed = draw_seed().to(tokens.device) if any(map(_drops, self._dropouts())) else None
        batch = Batch(packing, seed, backends.current())
        x = self._embed(call, rows, shape, batch)
        dtype = self._output_dtype(x)
        hidden_states = []
        for index, layer in enumerate(self._layers()):
            if asked["output_hidden_states"]:
                padded = pad(x.to(dtype), rows, shape)
                hidden_states.append(padded)
                if padded.requires_grad:  # so that what comes after reaches it
                    x = padded.flatten(0, 1).to(x.dtype)
                    x = x if rows is None else x.index_select(0, rows)
            # By position: reentrant checkpointing sees no gradient in keywords.
            x = layer(x, batch, index)
        x = pad(x.to(dtype), rows, shape)
        out = self._output(x, (*hidden_states, x) if asked["output_hidden_states"] else None)
        return out.to_tuple() if asked["return_dict"] is False else out

    def _is_accelerated(self) -> bool:
        """Whether the model and its layers are what :func:`accelerate` found and made. A layer may
        be wrapped by what hands attributes on, as torch's sharding and checkpointing wrappers."""
        if not self.is_whole():
            return False
        for layer in self._layers():
            is_whole = getattr(layer, "is_whole", None)
            if is_whole is None or "forward" in layer.__dict__ or not is_whole():
                return False
        return True

    def _output_dtype(self, x: Tensor) -> torch.dtype:
        """What transformers returns; under autocast the kernels keep the lower precision."""
        if not torch.is_autocast_enabled(x.device.type):
            return x.dtype
        if x.is_cuda:  # autocast runs LayerNorm in float32 there
            return torch.float32
        # On the CPU it is promoted to what the embedding gave, which no linear layer has lowered
        # but ELECTRA's projection.
        if hasattr(self, "embeddings_project"):
            return x.dtype
        return self.embeddings.position_embeddings.weight.dtype

    def _pack(
        self, mask: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor | None, Packing]:
        """The rows that are computed, as places in the batch (None: all), and who attends."""
        if mask is None:
            attended = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            check_shape("attention_mask", mask, shape)
            attended = mask.to(device) != 0
        computed = attended
        if not self.bertfast_unpad:
            computed = torch.ones_like(attended)
        elif shape[1] and mask is not None:
            # Heads read the first column also where it is padding on the left.
            computed = attended.clone()
            computed[:, 0] |= attended.any(1)
        rows = places(computed)
        cu_seqlens_q, max_seqlen_q = sequences(computed)
        among = attended.reshape(-1) if rows is None else attended.reshape(-1)[rows]
        keys = places(among)
        if keys is None:
            return rows, Packing(None, cu_seqlens_q, max_seqlen_q, None, cu_seqlens_q, max_seqlen_q)
        return rows, Packing(None, cu_seqlens_q, max_seqlen_q, keys, *sequences(attended))

    def _dropouts(self) -> Iterator[nn.Module]:
        yield self.embeddings.dropout
        for layer in self._layers():
            yield from layer.dropouts()

    def _positions(self, call: dict[str, Any], shape: tuple[int, int]) -> Tensor:
        """Where no positions are given: columns; in RoBERTa places among what is no padding."""
        ids = call["input_ids"]
        tokens = ids if ids is not None else call["inputs_embeds"]
        columns = torch.arange(shape[1], device=tokens.device).unsqueeze(0)
        padding = getattr(self.embeddings, "padding_idx", None)
        if padding is None:
            return columns
        if ids is None:
            return columns + padding + 1
        counted = (ids != padding).long()
        return counted.cumsum(1) * counted + padding

    def _embed(
        self, call: dict[str, Any], rows: Tensor | None, shape: tuple[int, int], batch: Batch
    ) -> Tensor:
        def take(name: str, x: Tensor | None) -> Any:
            if x is None:
                return None
            if x.shape[:2] != (1, shape[1]):
                check_shape(name, x, (*shape, *x.shape[2:]))
            x = x.expand(*shape, *x.shape[2:]).reshape(-1, *x.shape[2:])
            return x if rows is None else x.index_select(0, rows)

        part = self.embeddings
        positions = call["position_ids"]
        positions = self._positions(call, shape) if positions is None else positions
        positions = take("position_ids", positions)
        ids, embeds = (take(name, call[name]) for name in ("input_ids", "inputs_embeds"))
        types, token_type = None, getattr(part, "token_type_embeddings", None)
        if token_type is not None:
            types = take("token_type_ids", call["token_type_ids"])
            types = torch.zeros_like(positions) if types is None else types
        if embeds is None and not is_plain_table(part.word_embeddings):
            embeds = part.word_embeddings(ids)
        p = batch.dropout_p(part.dropout)
        tables = [table for table in (token_type, part.position_embeddings) if table is not None]
        if not is_plain_norm(part.LayerNorm) or not all(map(is_plain_table, tables)):
            x = part.word_embeddings(ids) if embeds is None else embeds
            x = x if token_type is None else x + token_type(types)
            x = part.LayerNorm(x + part.position_embeddings(positions))
            x = ops.dropout(x, p, seed=batch.seed, site=0, backend=batch.backend)
        else:
            if embeds is None:
                word, padding_idx = part.word_embeddings.weight, part.word_embeddings.padding_idx
            else:
                # The given vectors are the word table, and every token has a row of its own.
                word, padding_idx = embeds.to(part.position_embeddings.weight.dtype), None
                ids = torch.arange(word.shape[0], device=word.device)
            x = ops.embedding(
                ids,
                types,
                positions,
                word,
                None if token_type is None else token_type.weight,
                _without_padding_gradient(part.position_embeddings),
                part.LayerNorm.weight,
                part.LayerNorm.bias,
                part.LayerNorm.eps,
                padding_idx=padding_idx,
                dropout_p=p,
                seed=batch.seed,
                site=0,
                backend=batch.backend,
            )
        project = getattr(self, "embeddings_project", None)  # ELECTRA's, if sizes differ
        return x if project is None else project(x)


# Arguments that only transformers' own forward knows what to do with.
_OTHER_WAYS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "is_causal",
    "cu_seq_lens_q",
)


def _drops(dropout: Any) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _without_padding_gradient(table: nn.Embedding) -> Tensor:
    """The table's weight; its ``padding_idx`` row, which RoBERTa's positions have, gets none."""
    weight, row = table.weight, table.padding_idx
    if row is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    weight = weight.view_as(weight)  # a hook on the parameter itself would stay
    index = torch.tensor([row], device=weight.device)
    weight.register_hook(lambda gradient: gradient.index_fill(0, index, 0.0))
    return weight


class AcceleratedBert(AcceleratedModel):
    """BERT, RoBERTa, XLM-RoBERTa and ELECTRA."""

    encoder: Any
    pooler: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        out = None if args else self._encode(named | kwargs)
        return super().forward(*named.values(), *args, **kwargs) if out is None else out

    def _layers(self) -> Any:
        return self.encoder.layer

    def _output(self, x: Tensor, hidden_states: tuple[Tensor, ...] | None) -> Any:
        if not hasattr(self, "pooler"):  # ELECTRA
            return BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=x, hidden_states=hidden_states
            )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x),
            hidden_states=hidden_states,
        )


class AcceleratedDistilBert(AcceleratedModel):
    """DistilBERT, which has no token types and no pooler."""

    transformer: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
        }
        out = self._encode(named | kwargs)
        return super().forward(**named, **kwargs) if out is None else out

    def _layers(self) -> Any:
        return self.transformer.layer

    def _output(self, x: Tensor, hidden_states: tuple[Tensor, ...] | None) -> Any:
        return BaseModelOutput(last_hidden_state=x, hidden_states=hidden_states)


class AcceleratedLayer(Accelerated):
    """One encoder layer. Given a :class:`Batch`, it takes packed tokens ``(T, hidden)``."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(attention_mask, Batch):
            return self._packed(hidden_states, attention_mask, *args)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def dropouts(self) -> Iterator[nn.Module]:
        raise NotImplementedError

    def _packed(self, x: Tensor, batch: Batch, index: int) -> Tensor:
        raise NotImplementedError


class AcceleratedBertLayer(AcceleratedLayer):
    """The layer of BERT, RoBERTa, XLM-RoBERTa and ELECTRA."""

    attention: Any
    intermediate: Any
    output: Any

    def dropouts(self) -> Iterator[nn.Module]:
        yield self.attention.self.dropout
        yield self.attention.output.dropout
        yield self.output.dropout

    def _packed(self, x: Tensor, batch: Batch, index: int) -> Tensor:
        part, block, dense = self.attention.self, self.attention.output, self.intermediate.dense
        site = 1 + 3 * index
        context = _attend(part, (part.query(x), part.key(x), part.value(x)), batch, site)
        x = _add_norm(block.dense(context), x, block.LayerNorm, block.dropout, batch, site + 1)
        wide = _activate(x, dense, self.intermediate.intermediate_act_fn, batch)
        block = self.output
        return _add_norm(block.dense(wide), x, block.LayerNorm, block.dropout, batch, site + 2)


class AcceleratedDistilBertLayer(AcceleratedLayer):
    """DistilBERT's layer, which drops nothing between attention and its LayerNorm."""

    attention: Any
    sa_layer_norm: Any
    ffn: Any
    output_layer_norm: Any

    def dropouts(self) -> Iterator[nn.Module]:
        yield self.attention.dropout
        yield self.ffn.dropout

    def _packed(self, x: Tensor, batch: Batch, index: int) -> Tensor:
        part, ffn, site = self.attention, self.ffn, 1 + 3 * index
        context = _attend(part, (part.q_lin(x), part.k_lin(x), part.v_lin(x)), batch, site)
        x = _add_norm(part.out_lin(context), x, self.sa_layer_norm, None, batch, site + 1)
        wide = _activate(x, ffn.lin1, ffn.activation, batch)
        out = ffn.lin2(wide)
        return _add_norm(out, x, self.output_layer_norm, ffn.dropout, batch, site + 2)


def _attend(part: Any, qkv: tuple[Tensor, Tensor, Tensor], batch: Batch, site: int) -> Tensor:
    size = part.attention_head_size
    q, k, v = (x.view(x.shape[0], x.shape[1] // size, size) for x in qkv)
    out = batch.packing.attend(
        q,
        k,
        v,
        scale=None,
        dropout_p=batch.dropout_p(part.dropout),
        seed=batch.seed,
        site=site,
        backend=batch.backend,
    )
    return out.flatten(1)


def _add_norm(
    x: Tensor, residual: Tensor, norm: Any, dropout: Any, batch: Batch, site: int
) -> Tensor:
    """``norm(residual + dropout(x))``."""
    p = 0.0 if dropout is None else batch.dropout_p(dropout)
    if not is_plain_norm(norm):
        dropped = ops.dropout(x, p, seed=batch.seed, site=site, backend=batch.backend)
        return norm(dropped + residual)
    return ops.layernorm(
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        residual=residual.to(x.dtype),
        dropout_p=p,
        seed=batch.seed,
        site=site,
        backend=batch.backend,
    )


def _activate(x: Tensor, dense: Any, activation: Any, batch: Batch) -> Tensor:
    """``activation(dense(x))``, the bias added inside the GELU where nothing else is in between."""
    approximate = _APPROXIMATIONS.get(type(activation))
    if approximate is None or not is_plain(activation, type(activation)):
        return activation(dense(x))
    if not is_plain(dense, nn.Linear):
        return ops.gelu(dense(x), approximate=approximate, backend=batch.backend)
    x = F.linear(x, dense.weight)
    return ops.gelu(x, dense.bias, approximate=approximate, backend=batch.backend)
