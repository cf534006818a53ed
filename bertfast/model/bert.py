"""BERT's encoder (Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", NAACL 2019), on packed tokens.

Modules and parameters are named as in Hugging Face's BERT, so that checkpoints fit both. Between
the unpadding at the start and the padding at the end a batch is ``x``, ``(T, hidden)``: all its
tokens one after another. The arithmetic between matrix products is in :mod:`bertfast.ops`.

Dropout masks come from ``seed`` (one per forward) and a site number: 0 for the embedding, and for
layer l 1 + 3l for the attention probabilities, 2 + 3l for the attention's and 3 + 3l for the
feed-forward block's output.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertfast import backends, ops
from bertfast.model.base import BertPreTrainedModel
from bertfast.model.config import BertConfig
from bertfast.model.outputs import EncoderOutput
from bertfast.model.packing import Batch, make_batch


def check_linear(name: str, module: nn.Module) -> None:
    """Refuse what computes something else than ``F.linear`` of its parameters, as a LoRA wrapper.

    Where the parameters are read directly, ``module.forward`` would be left out silently.
    Subclasses that only change where the parameters come from (``parametrize``) are fine.
    """
    if getattr(type(module), "forward", None) is not nn.Linear.forward:
        raise TypeError(
            f"{name}: expected an nn.Linear, whose parameters are read as weights, "
            f"got {type(module).__name__}, whose forward would not be called"
        )


def linear_activation(x: Tensor, dense: nn.Linear, hidden_act: str, name: str) -> Tensor:
    """``activation(dense(x))``, the bias added inside the GELU; ``name`` is for messages."""
    if hidden_act == "relu":
        return F.relu(dense(x))
    check_linear(name, dense)
    approximate = "none" if hidden_act == "gelu" else "tanh"
    return ops.gelu(F.linear(x, dense.weight), dense.bias, approximate=approximate)


class BertEmbeddings(nn.Module):
    """Word + position + token type, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, batch: Batch, seed: Tensor | None) -> Tensor:
        word, input_ids = self.word_embeddings.weight, batch.input_ids
        padding_idx = self.word_embeddings.padding_idx
        if input_ids is None:
            # The given vectors are the word table, and every token has a row of its own.
            assert batch.inputs_embeds is not None
            word, padding_idx = self._given_vectors(batch.inputs_embeds), None
            input_ids = torch.arange(batch.tokens, device=word.device)
        return ops.embedding(
            input_ids,
            batch.token_type_ids,
            batch.position_ids,
            word,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=padding_idx,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=seed,
            site=0,
        )

    def _given_vectors(self, inputs_embeds: Tensor) -> Tensor:
        table = self.word_embeddings.weight
        if inputs_embeds.shape[-1] != table.shape[1]:
            raise ValueError(
                f"inputs_embeds: expected vectors of hidden_size {table.shape[1]}, "
                f"got {inputs_embeds.shape[-1]}"
            )
        if inputs_embeds.dtype == table.dtype:
            return inputs_embeds
        if not torch.is_autocast_enabled(inputs_embeds.device.type):
            raise TypeError(
                f"inputs_embeds: expected {table.dtype} as the model, got {inputs_embeds.dtype}"
            )
        return inputs_embeds.to(table.dtype)


class BertSelfAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V for all heads."""

    def __init__(self, config: BertConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dropout_p, self.site = config.attention_probs_dropout_prob, 1 + 3 * layer

    def forward(
        self, x: Tensor, batch: Batch, seed: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        # Three products: joining the weights for one costs more than it saves, and in training
        # would keep a copy of them.
        shape = (x.shape[0], self.heads, self.head_size)
        q, k, v = (project(x).view(shape) for project in (self.query, self.key, self.value))
        out = ops.attention(
            q,
            k,
            v,
            cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=seed,
            site=self.site,
        )
        probabilities = attention_probabilities(q, k, batch) if output_attentions else None
        return out.reshape(x.shape), probabilities


def attention_probabilities(q: Tensor, k: Tensor, batch: Batch) -> Tensor:
    """The attention probabilities before dropout, by plain torch: slow, S × S, for looking at.

    Args:
        q, k: ``(T, heads, d)``.

    Returns:
        ``(B, heads, S, S)`` in at least float32; zeros where the query or the key is padding.
        ``S`` is ``max_seqlen`` (or ``T``, if that is less) for packed input.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (batch.to_grid(x.to(dtype)).transpose(1, 2) for x in (q, k))
    attended = batch.attended()[:, None, None, :]
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    # The lowest finite number and not -inf: a row without any key must not become NaN.
    scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * (attended & attended.transpose(2, 3))


class BertAddNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))), which ends both blocks of a layer."""

    def __init__(self, config: BertConfig, size: int, site: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout_p, self.site = config.hidden_dropout_prob, site

    def forward(self, x: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
        return ops.layernorm(
            self.dense(x),
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=seed,
            site=self.site,
        )


class BertAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: BertConfig, layer: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer)
        self.output = BertAddNorm(config, config.hidden_size, site=2 + 3 * layer)

    def forward(
        self, x: Tensor, batch: Batch, seed: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, probabilities = self.self(x, batch, seed, output_attentions)
        return self.output(context, x, seed), probabilities


class BertIntermediate(nn.Module):
    """The wide half of the feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return linear_activation(x, self.dense, self.hidden_act, "intermediate.dense")


class BertLayer(nn.Module):
    """One encoder layer: attention, then feed-forward, each with its residual and LayerNorm."""

    def __init__(self, config: BertConfig, layer: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer)
        self.intermediate = BertIntermediate(config)
        self.output = BertAddNorm(config, config.intermediate_size, site=3 + 3 * layer)

    def forward(
        self, x: Tensor, batch: Batch, seed: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        x, probabilities = self.attention(x, batch, seed, output_attentions)
        return self.output(self.intermediate(x), x, seed), probabilities


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        seed: Tensor | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The last layer's output, and what was asked for of all layers; the input comes first."""
        hidden_states, attentions = [x], []
        for layer in self.layer:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, probabilities = _checkpointed(layer, x, batch, seed, output_attentions)
            else:
                x, probabilities = layer(x, batch, seed, output_attentions)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(probabilities)
        return x, hidden_states, attentions


def _checkpointed(layer: nn.Module, *inputs: object) -> tuple[Tensor, Tensor | None]:
    # The mask is a function of the seed, so there is no generator to rewind. Recomputation may
    # run on autograd's own thread, which does not see this thread's choice of a backend.
    # A compiled graph has the backend baked in, and torch.compile cannot trace such a context_fn.
    if torch.compiler.is_compiling():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    chosen = backends.current()
    return checkpoint(
        layer,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), backends.backend(chosen)),
    )


class BertPooler(nn.Module):
    """tanh(dense(first token)) for each sequence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``(T, hidden)`` to ``(B, hidden)``; zeros for a sequence of length zero."""
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        if x.shape[0] == 0:
            return x.new_zeros(starts.shape[0], x.shape[1])
        # An empty sequence at the very end starts behind the last row.
        first = x[starts.clamp(max=x.shape[0] - 1)]
        return torch.tanh(self.dense(first)) * (ends > starts).unsqueeze(1)


class BertModel(BertPreTrainedModel):
    """The encoder, with a pooler for whole-sequence tasks.

    Takes Hugging Face's checkpoints and gives its outputs, with these decisions: padding is never
    computed and its outputs are zeros; the pooler reads each sequence's first attended token; an
    all-masked row is a sequence of length zero and gives zeros.

    Args:
        config: the model's shape.
        add_pooling_layer: whether there is a pooler and a ``pooler_output``.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: int | Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> EncoderOutput | tuple[Tensor | tuple[Tensor, ...], ...]:
        """Encode a batch: padded ``(B, S)``, or packed ``(T,)`` with ``cu_seqlens``.

        Args:
            input_ids: int64 or int32 ``(B, S)`` or ``(T,)``.
            attention_mask: integer or bool ``(B, S)``, 1 for a token and 0 for padding, which may
                lie anywhere; None when nothing is padding.
            token_type_ids: like ``input_ids``, or ``(1, S)``; None is all zeros.
            position_ids: like ``input_ids``, or ``(1, S)``; None counts columns (padded) or
                places in the sequence (packed).
            inputs_embeds: ``(B, S, H)`` or ``(T, H)`` in the model's dtype, in place of
                ``input_ids``' rows of the word table.
            cu_seqlens: int32 ``(B + 1,)``, where packed sequences start and end; rows behind
                ``cu_seqlens[-1]`` are storage that no token sees.
            max_seqlen: the longest packed sequence or more.
            seed: of the dropout masks, an int or an int64 tensor of one element; None draws one
                from torch's CPU generator. Ignored when nothing is dropped.
            output_hidden_states: also return the embedding's and every layer's output.
            output_attentions: also return the attention probabilities, before dropout. They are
                computed a second time by plain torch, which is slow and takes S × S memory.
            return_dict: False returns a tuple of what was computed.

        Returns:
            ``last_hidden_state`` ``(B, S, H)`` or ``(T, H)``, ``pooler_output`` ``(B, H)``,
            ``hidden_states``, ``attentions``.

        Raises:
            TypeError, ValueError: a bad input; the message names the argument.
        """
        batch = make_batch(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            cu_seqlens,
            max_seqlen,
            max_positions=self.config.max_position_embeddings,
        )
        seed = self.dropout_seed(seed, batch.position_ids.device)
        x = self.embeddings(batch, seed)
        x, hidden_states, attentions = self.encoder(
            x, batch, seed, output_hidden_states, output_attentions
        )
        output = EncoderOutput(
            last_hidden_state=batch.pad(x),
            pooler_output=None if self.pooler is None else self.pooler(x, batch.cu_seqlens),
            hidden_states=batch.pad_all(tuple(hidden_states)) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()
