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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertfast import backends, ops
from bertfast.model.base import BertPreTrainedModel
from bertfast.model.config import ERF, BertConfig
from bertfast.model.outputs import EncoderOutput
from bertfast.model.packing import Batch, make_batch
from bertfast.model.plain import is_plain, is_plain_norm, is_plain_table


def linear_activation(x: Tensor, dense: nn.Linear, hidden_act: str) -> Tensor:
    """``activation(dense(x))``, the bias added inside the GELU where nothing is in between."""
    if hidden_act == "relu":
        return F.relu(dense(x))
    approximate = "none" if hidden_act in ERF else "tanh"
    if not is_plain(dense, nn.Linear):
        return ops.gelu(dense(x), approximate=approximate)
    return ops.gelu(F.linear(x, dense.weight), dense.bias, approximate=approximate)


def norm_of_sum(
    x: Tensor, residual: Tensor | None, norm: nn.LayerNorm, p: float, seed: Tensor | None, site: int
) -> Tensor:
    """``norm(residual + dropout(x))``, in ``x``'s dtype; the module is called where it is not a
    plain one, with the same dropout mask."""
    if is_plain_norm(norm):
        return ops.layernorm(
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            residual=residual,
            dropout_p=p,
            seed=seed,
            site=site,
        )
    x = ops.dropout(x, p, seed=seed, site=site)
    out: Tensor = norm(x if residual is None else residual + x)
    return out.to(x.dtype)


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
        p = self.dropout_p if self.training else 0.0
        word, input_ids, vectors = self.word_embeddings, batch.input_ids, batch.inputs_embeds
        if vectors is not None:
            vectors = self._given_vectors(vectors)
        elif not is_plain_table(word):
            vectors = word(input_ids).to(self.dtype)
        tables = (self.token_type_embeddings, self.position_embeddings)
        if not (is_plain_norm(self.LayerNorm) and all(map(is_plain_table, tables))):
            return self._from_modules(
                batch, word(input_ids) if vectors is None else vectors, p, seed
            )
        if vectors is not None:
            # The vectors are the word table, and every token has a row of its own.
            table, padding_idx = vectors, None
            input_ids = torch.arange(batch.tokens, device=vectors.device)
        else:
            table, padding_idx = word.weight, word.padding_idx
        assert input_ids is not None
        return ops.embedding(
            input_ids,
            batch.token_type_ids,
            batch.position_ids,
            table,
            self.token_type_embeddings.weight,
            self.position_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            padding_idx=padding_idx,
            dropout_p=p,
            seed=seed,
            site=0,
        )

    def _from_modules(self, batch: Batch, words: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """The same by calling tables and LayerNorm, one of which does more than it says."""
        types = self.token_type_embeddings(batch.token_type_ids)
        x = self.LayerNorm(words + types + self.position_embeddings(batch.position_ids))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return ops.dropout(x, p, seed=seed, site=0)

    @property
    def dtype(self) -> torch.dtype:
        """The tables' dtype, also of those that are not a plain table any more."""
        return next(self.parameters()).dtype

    def _given_vectors(self, inputs_embeds: Tensor) -> Tensor:
        hidden = self.LayerNorm.normalized_shape[-1]
        dtype = self.dtype
        if inputs_embeds.shape[-1] != hidden:
            raise ValueError(
                f"inputs_embeds: expected vectors of hidden_size {hidden}, "
                f"got {inputs_embeds.shape[-1]}"
            )
        if inputs_embeds.dtype == dtype:
            return inputs_embeds
        if not torch.is_autocast_enabled(inputs_embeds.device.type):
            raise TypeError(
                f"inputs_embeds: expected {dtype} as the model, got {inputs_embeds.dtype}"
            )
        return inputs_embeds.to(dtype)


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
        p = self.dropout_p if self.training else 0.0
        return norm_of_sum(self.dense(x), residual, self.LayerNorm, p, seed, self.site)


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
        return linear_activation(x, self.dense, self.hidden_act)


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
        layout: Batch | None,
        output_attentions: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The last layer's output; in ``layout`` every hidden state, the input first; attentions.

        Without a ``layout`` there are no hidden states.
        """
        hidden_states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        x = _shown(x, layout, hidden_states)
        for layer in self.layer:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, probabilities = _checkpointed(layer, x, batch, seed, output_attentions)
            else:
                x, probabilities = layer(x, batch, seed, output_attentions)
            x = _shown(x, layout, hidden_states)
            if output_attentions:
                attentions.append(probabilities)
        return x, hidden_states, attentions


def _shown(x: Tensor, layout: Batch | None, hidden_states: list[Tensor]) -> Tensor:
    """Add a hidden state as it is returned, and give what the next layer reads."""
    if layout is None:
        return x
    hidden_states.append(layout.pad(x))
    # From what is returned, which costs a copy of padded input, so that gradients come by there.
    return layout.pack(hidden_states[-1]) if torch.is_grad_enabled() else x


def _checkpointed(layer: nn.Module, *inputs: object) -> tuple[Tensor, Tensor | None]:
    # Recomputation may run on autograd's own thread, which does not see this thread's choice of a
    # backend. A compiled graph has it baked in, and torch.compile cannot trace such a context_fn.
    chosen = backends.current()
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (nullcontext(), backends.backend(chosen))
    return checkpoint(
        layer, *inputs, use_reentrant=False, preserve_rng_state=_may_draw(layer), **options
    )


def _may_draw(layer: nn.Module) -> bool:
    """Whether a part of a layer may use torch's generators, as LoRA's dropout does.

    Our own dropout masks are functions of the seed, so that nothing is to be rewound for them.
    """
    ours = (nn.Linear, nn.LayerNorm)
    return not all(
        is_plain(part, type(part)) and (type(part) in ours or type(part).__module__ == __name__)
        for part in layer.modules()
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
        config = self.config  # transformers' is converted
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        layout: Batch | None = None,
        **others: Any,
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
            output_hidden_states: also return the embedding's and every layer's output. With
                gradients, layers are computed from what is returned, so that ``retain_grad`` on
                one of them has its effect; on padded input this costs two copies a layer.
            output_attentions: also return the attention probabilities, before dropout. They are
                computed a second time by plain torch, which is slow and takes S × S memory, and
                outputs are not computed from them: a loss gives them no gradient.
            return_dict: False returns a tuple of what was computed. This one and the two before
                are as the config's fields of these names say where they are None.
            layout: for heads: the padded batch that this packed input is of, in whose layout the
                hidden states are returned.
            others: transformers' other keywords (``head_mask``, ``past_key_values``,
                ``use_cache``, ``encoder_hidden_states``, …), None or False.

        Returns:
            ``last_hidden_state`` ``(B, S, H)`` or ``(T, H)``, ``pooler_output`` ``(B, H)``,
            ``hidden_states``, ``attentions``.

        Raises:
            TypeError, ValueError: a bad input; the message names the argument.
        """
        hidden, attention, as_output = self._asked(
            output_hidden_states, output_attentions, return_dict, others
        )
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
        shown_in = (batch if layout is None else layout) if hidden else None
        x, hidden_states, attentions = self.encoder(x, batch, seed, shown_in, attention)
        output = EncoderOutput(
            last_hidden_state=hidden_states[-1] if hidden and layout is None else batch.pad(x),
            pooler_output=None if self.pooler is None else self.pooler(x, batch.cu_seqlens),
            hidden_states=tuple(hidden_states) if hidden else None,
            attentions=tuple(attentions) if attention else None,
        )
        return output if as_output else output.to_tuple()
