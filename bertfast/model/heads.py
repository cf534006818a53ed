"""BERT's task heads (Devlin et al., "BERT", 2019, sections 3.1 and 4), with Hugging Face's names.

Every head takes the inputs of ``BertModel.forward``, padded or packed, and works on packed
tokens: it unpads once, hands packed tokens to ``self.bert``, and pads only its outputs.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops
from bertfast.errors import shown
from bertfast.model.base import BertPreTrainedModel, init_parameter
from bertfast.model.bert import BertModel, linear_activation, norm_of_sum
from bertfast.model.config import BertConfig
from bertfast.model.outputs import (
    LogitsOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
)
from bertfast.model.packing import Batch, make_batch, may_look
from bertfast.model.plain import is_plain
from bertfast.ops._checks import (
    check_device,
    check_integers,
    check_range,
    check_shape,
    check_tensor,
)
from bertfast.ops._recorders import values_are_hidden

if TYPE_CHECKING:
    from typing_extensions import Unpack

HEAD_DROPOUT_SITE = 0xFFFF0000
IGNORED = -100

# input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(TypedDict, total=False):
    """What every head's ``forward`` takes besides its inputs and labels.

    ``cu_seqlens``, ``max_seqlen``, ``seed``, ``output_hidden_states``, ``output_attentions``,
    ``return_dict`` and whatever leaves a feature off, as in ``BertModel.forward``.
    ``num_items_in_batch``, which transformers' ``Trainer`` gives: the loss is the sum over labels
    divided by it, in place of their mean.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int | None
    seed: int | Tensor | None
    output_hidden_states: bool | None
    output_attentions: bool | None
    return_dict: bool | None
    num_items_in_batch: int | Tensor | None
    head_mask: None
    use_cache: bool | None


class Call(NamedTuple):
    """A head's forward, halfway: the batch, ``self.bert``'s packed output, the dropout seed, and
    what the caller asked for."""

    batch: Batch
    out: Any
    seed: Tensor | None
    return_dict: bool
    num_items: int | Tensor | None


class BertHeadModel(BertPreTrainedModel):
    """A ``BertModel`` under ``self.bert`` and a head on it."""

    bert: BertModel
    # Whether there is one loss, over ``labels``, which transformers' Trainer asks by this name.
    accepts_loss_kwargs: ClassVar[bool] = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        p = config.classifier_dropout
        self.dropout_p = config.hidden_dropout_prob if p is None else p

    def _init_head(self) -> None:
        """Tie first and then draw, so that the word table, drawn by ``BertModel``, stays."""
        self.tie_weights()
        for name, parameter in self.named_parameters():
            if not name.startswith("bert."):
                init_parameter(name, parameter, self.config)

    def _encode(
        self,
        inputs: Inputs,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> Call:
        if not self.accepts_loss_kwargs:
            others["num_items_in_batch"] = num_items_in_batch
        hidden, attention, as_output = self._asked(
            output_hidden_states, output_attentions, return_dict, others
        )
        num_items = None if num_items_in_batch is None else _count(num_items_in_batch)
        batch = make_batch(
            *inputs, cu_seqlens, max_seqlen, max_positions=self.config.max_position_embeddings
        )
        seed = self.dropout_seed(seed, batch.position_ids.device)
        out = self.bert(
            **batch.packed_inputs(),
            seed=seed,
            output_hidden_states=hidden,
            output_attentions=attention,
            return_dict=True,
            layout=batch,
        )
        return Call(batch, out, seed, as_output, num_items)

    def _dropout(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """The dropout before a classifier, on the rows of ``x``."""
        if not self.training:
            return x
        return ops.dropout(x, self.dropout_p, seed=seed, site=HEAD_DROPOUT_SITE)


class BertPredictionTransform(nn.Module):
    """Dense, activation and LayerNorm before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        x = linear_activation(x, self.dense, self.hidden_act)
        return norm_of_sum(x, None, self.LayerNorm, 0.0, None, 0)


class BertPredictionHead(nn.Module):
    """The masked-LM head: transform, then the decoder, usually the word table itself."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        # Checkpoints know the decoder's bias by both names.
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(T, hidden)`` to logits ``(T, vocab)``."""
        return self.decoder(self.transform(x))

    def loss(self, x: Tensor, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``(T, hidden)`` against ``(T,)``; only labelled tokens cost."""
        if not values_are_hidden():  # where no shape may depend on the labels
            labelled = (labels != IGNORED).nonzero().squeeze(1)
            x, labels = x.index_select(0, labelled), labels.index_select(0, labelled)
        hidden, decoder = self.transform(x), self.decoder
        if not is_plain(decoder, nn.Linear):
            return _class_loss("labels", decoder(hidden), labels, num_items)
        if num_items is None:
            return ops.cross_entropy(hidden, decoder.weight, decoder.bias, labels)
        total = ops.cross_entropy(hidden, decoder.weight, decoder.bias, labels, reduction="sum")
        return total / num_items


class BertMaskedLMHead(nn.Module):
    """``cls`` of a masked-LM model."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertPredictionHead(config)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, hidden)`` to logits ``(T, vocab)``."""
        return self.predictions(x)


class BertNextSentenceHead(nn.Module):
    """``cls`` of a next-sentence model."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        """``(B, hidden)`` to logits ``(B, 2)``."""
        return self.seq_relationship(pooled)


class BertPreTrainingHeads(nn.Module):
    """``cls`` of a pre-training model."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, hidden)`` and ``(B, hidden)`` to logits ``(T, vocab)`` and ``(B, 2)``."""
        return self.predictions(x), self.seq_relationship(pooled)


class BertPredictionModel(BertHeadModel):
    """A head model with a masked-LM decoder under ``self.cls.predictions``."""

    head: ClassVar[type[nn.Module]] = BertMaskedLMHead
    cls: Any

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        """Replace the masked-LM decoder; call :meth:`tie_weights` for its bias's other name."""
        self.cls.predictions.decoder = embeddings

    def tie_weights(self) -> None:
        predictions = self.cls.predictions
        predictions.bias = predictions.decoder.bias
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.get_input_embeddings().weight

    def _predict(
        self, call: Call, labels: Tensor | None, output_logits: bool, *more: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """The masked-LM loss; the logits where they are wanted; what ``self.cls`` made of ``more``.

        With labels, the decoder's product and the loss are one op on labelled tokens, unless
        somebody watches or changes what comes in between.
        """
        batch, x = call.batch, call.out.last_hidden_state
        loss: Tensor | None = None
        logits: Any = None
        rest: Any = None
        packed = None if labels is None else batch.labels("labels", labels)
        read = (self.cls, type(self).head), (self.cls.predictions, BertPredictionHead)
        called = not all(is_plain(module, kind) for module, kind in read)
        if packed is None or output_logits or called:
            logits = self.cls(x, *more)
            logits, rest = logits if more else (logits, None)
        elif more:
            rest = self.cls.seq_relationship(*more)
        if packed is not None and called:
            loss = _class_loss("labels", logits, packed, call.num_items)
        elif packed is not None:
            loss = self.cls.predictions.loss(x, packed, call.num_items)
        wanted = labels is None or output_logits
        return loss, batch.pad(logits) if wanted else None, rest


class BertForMaskedLM(BertPredictionModel):
    """BERT with the masked-LM head. See ``BertModel`` for the inputs.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertMaskedLMHead(config)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_logits: bool = False,
        **options: "Unpack[Options]",
    ) -> LogitsOutput | tuple[Any, ...]:
        """Predict words.

        Args:
            labels: int ``(B, S)`` or ``(T,)``: a word id, or -100 for no label. Labels on padding
                are ignored. Only labelled tokens go through the head.
            output_logits: with labels, also return the logits of all tokens.
            options: see :class:`Options`.

        Returns:
            ``loss``, the mean over labelled tokens (0 if there are none); ``logits``
            ``(B, S, vocab)`` or ``(T, vocab)``, zeros on padding.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        loss, logits, _ = self._predict(call, labels, output_logits)
        return _finish(LogitsOutput(loss, logits), call)


class BertForPreTraining(BertPredictionModel):
    """BERT with the masked-LM and the next-sentence head, as it is pre-trained.

    Args:
        config: the model's shape.
    """

    head = BertPreTrainingHeads
    # Two losses, of words and of sentences, have no number of items in common.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_logits: bool = False,
        **options: "Unpack[Options]",
    ) -> PreTrainingOutput | tuple[Any, ...]:
        """Predict words, and whether the second sentence follows the first.

        Args:
            labels: as in :meth:`BertForMaskedLM.forward`.
            next_sentence_label: int ``(B,)``: 0 where the second sentence follows the first, 1
                where it is a random one, -100 for no label.
            output_logits: with labels, also return ``prediction_logits``.
            options: see :class:`Options`.

        Returns:
            ``loss``, the sum of the losses whose labels were given; ``prediction_logits``
            ``(B, S, vocab)`` or ``(T, vocab)``; ``seq_relationship_logits`` ``(B, 2)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        pooled = call.out.pooler_output
        loss, logits, relationship = self._predict(call, labels, output_logits, pooled)
        if next_sentence_label is not None:
            next_loss = _class_loss("next_sentence_label", relationship, next_sentence_label)
            loss = next_loss if loss is None else loss + next_loss
        return _finish(PreTrainingOutput(loss, logits, relationship), call)


class BertForNextSentencePrediction(BertHeadModel):
    """BERT with the next-sentence head.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config)
        self.cls = BertNextSentenceHead(config)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: "Unpack[Options]",
    ) -> LogitsOutput | tuple[Any, ...]:
        """Say whether the second sentence follows the first.

        Args:
            labels: int ``(B,)``: 0 where it follows, 1 where it is a random one, -100 for no label.
            options: see :class:`Options`.

        Returns:
            ``loss``; ``logits`` ``(B, 2)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        logits = self.cls(call.out.pooler_output)
        loss = None if labels is None else _class_loss("labels", logits, labels, call.num_items)
        return _finish(LogitsOutput(loss, logits), call)


class BertForSequenceClassification(BertHeadModel):
    """BERT with a classifier or regressor on the pooled output.

    Args:
        config: the model's shape; ``num_labels`` outputs, ``problem_type`` for the loss.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: "Unpack[Options]",
    ) -> LogitsOutput | tuple[Any, ...]:
        """Classify each sequence.

        Args:
            labels: by ``config.problem_type``: float ``(B,)`` or ``(B, num_labels)`` for
                ``regression`` (mean squared error), int ``(B,)`` for
                ``single_label_classification`` (cross-entropy), float ``(B, num_labels)`` for
                ``multi_label_classification`` (binary cross-entropy). Without a problem type, one
                output means regression, integer labels one class, others several.
            options: see :class:`Options`.

        Returns:
            ``loss``; ``logits`` ``(B, num_labels)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        logits = self.classifier(self._dropout(call.out.pooler_output, call.seed))
        loss = None if labels is None else self._loss(logits, labels, call.num_items)
        return _finish(LogitsOutput(loss, logits), call)

    def _loss(self, logits: Tensor, labels: Tensor, num_items: int | Tensor | None) -> Tensor:
        check_tensor("labels", labels)
        problem = self.config.problem_type
        if problem is None:
            if logits.shape[1] == 1:
                problem = "regression"
            elif labels.is_floating_point():
                problem = "multi_label_classification"
            else:
                problem = "single_label_classification"
        if problem == "single_label_classification":
            return _class_loss("labels", logits, labels, num_items)
        if problem == "regression" and logits.shape[1] == 1 and labels.dim() == 1:
            labels = labels.unsqueeze(1)
        check_shape("labels", labels, tuple(logits.shape))
        check_device("labels", labels, "input", logits)
        logits = _at_least_float32(logits)
        labels = labels.to(logits.dtype)
        if problem == "regression":
            loss = F.mse_loss(logits, labels, reduction="sum")
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return loss / (max(logits.numel(), 1) if num_items is None else num_items)


class BertForTokenClassification(BertHeadModel):
    """BERT with a classifier on every token.

    Args:
        config: the model's shape; ``num_labels`` outputs.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: "Unpack[Options]",
    ) -> LogitsOutput | tuple[Any, ...]:
        """Classify each token.

        Args:
            labels: int ``(B, S)`` or ``(T,)``, -100 for no label. Labels on padding are ignored.
            options: see :class:`Options`.

        Returns:
            ``loss``; ``logits`` ``(B, S, num_labels)`` or ``(T, num_labels)``, zeros on padding.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        logits = self.classifier(self._dropout(call.out.last_hidden_state, call.seed))
        loss = None
        if labels is not None:
            loss = _class_loss(
                "labels", logits, call.batch.labels("labels", labels), call.num_items
            )
        return _finish(LogitsOutput(loss, call.batch.pad(logits)), call)


class BertForQuestionAnswering(BertHeadModel):
    """BERT that marks the first and the last token of an answer.

    Args:
        config: the model's shape, with ``num_labels`` 2: one output for each end.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    # Positions are no ``labels``, which a number of items is of.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels: expected 2 for question answering (start, end), "
                f"got {config.num_labels}"
            )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: "Unpack[Options]",
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Score every token as the start and as the end of the answer.

        Args:
            start_positions, end_positions: int ``(B,)`` or ``(B, 1)``: the column of the answer's
                ends, or for packed input their place in the sequence. Positions beyond the
                sequence, or on padding, do not count; negative ones mean the first column.
            options: see :class:`Options`.

        Returns:
            ``loss``, the mean of both ends' cross-entropy over the attended tokens, when both
            positions were given; ``start_logits`` and ``end_logits`` ``(B, S)`` or ``(T,)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        call = self._encode(inputs, **options)
        scores = self.qa_outputs(call.out.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start = _position_loss("start_positions", call.batch, scores[0], start_positions)
            end = _position_loss("end_positions", call.batch, scores[1], end_positions)
            loss = (start + end) / 2
        start_logits, end_logits = (call.batch.pad(x, torch.finfo(x.dtype).min) for x in scores)
        output = QuestionAnsweringOutput(loss, start_logits, end_logits)
        return _finish(output, call)


class BertForMultipleChoice(BertHeadModel):
    """BERT that scores the choices of a question.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = self.config  # transformers' is converted
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._init_head()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        **options: "Unpack[Options]",
    ) -> LogitsOutput | tuple[Any, ...]:
        """Score each choice.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: ``(B, choices, S)``, and
                ``inputs_embeds`` ``(B, choices, S, H)``; or packed, each choice a sequence.
            labels: int ``(B,)``, the right choice, -100 for no label.
            num_choices: for packed input, how many sequences in a row belong to one question.
            options: see :class:`Options`.

        Returns:
            ``loss``; ``logits`` ``(B, choices)``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if options.get("cu_seqlens") is None:
            if num_choices is not None:
                raise ValueError("num_choices: expected None for input of shape (B, choices, S)")
            inputs, num_choices = _flatten_choices(inputs)
        elif isinstance(num_choices, bool) or not isinstance(num_choices, int) or num_choices < 1:
            raise ValueError(
                f"num_choices: expected an integer >= 1 for packed input, got {num_choices!r}"
            )
        call = self._encode(inputs, **options)
        scores = self.classifier(self._dropout(call.out.pooler_output, call.seed))
        if num_choices and scores.shape[0] % num_choices:
            raise ValueError(
                f"num_choices: expected a divisor of the {scores.shape[0]} packed sequences, "
                f"got {num_choices}"
            )
        logits = scores.reshape(scores.shape[0] // max(num_choices, 1), num_choices)
        loss = None if labels is None else _class_loss("labels", logits, labels, call.num_items)
        return _finish(LogitsOutput(loss, logits), call)


def _flatten_choices(inputs: Inputs) -> tuple[Inputs, int]:
    """``(B, choices, S, ...)`` to ``(B * choices, S, ...)``, and the number of choices."""
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    flat: list[Any] = []
    for name, x in zip(names, inputs, strict=True):
        expected = 4 if name == "inputs_embeds" else 3
        if x is not None:
            check_tensor(name, x)
        if x is not None and x.dim() != expected:
            raise ValueError(
                f"{name}: expected shape (B, choices, S{', H' if expected == 4 else ''}), "
                f"got {tuple(x.shape)}"
            )
        flat.append(None if x is None else x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
    tokens = inputs[0] if inputs[0] is not None else inputs[4]
    ids, mask, types, positions, embeds = flat
    return (ids, mask, types, positions, embeds), 0 if tokens is None else tokens.shape[1]


def _finish(output: Any, call: Call) -> Any:
    """Add what was asked for of all layers, in the caller's layout."""
    output.hidden_states = call.out.hidden_states
    output.attentions = call.batch.pad_attentions(call.out.attentions)
    return output if call.return_dict else output.to_tuple()


def _count(num_items: int | Tensor) -> int | Tensor:
    """What a sum of losses is divided by; where nothing is labelled, at all, the sum is 0."""
    if isinstance(num_items, Tensor) and num_items.numel() == 1 and num_items.dtype != torch.bool:
        return num_items.reshape(()).clamp(min=1)
    if isinstance(num_items, bool) or not isinstance(num_items, int) or num_items < 0:
        raise TypeError(
            f"num_items_in_batch: expected an integer >= 0 or a tensor of one element, got "
            f"{shown(num_items)}"
        )
    return max(num_items, 1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _class_loss(
    name: str, logits: Tensor, labels: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of ``(N, classes)`` against ``(N,)``; 0 where nothing is labelled."""
    check_integers(name, labels)
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    check_shape(name, labels, (logits.shape[0],))
    check_device(name, labels, "input", logits)
    if may_look(labels):
        check_range(name, labels, logits.shape[1], ignored=IGNORED)
    labels = labels.long()
    # The sum over the count, and not torch's mean, which is NaN for an empty or unlabelled batch.
    loss = F.cross_entropy(_at_least_float32(logits), labels, ignore_index=IGNORED, reduction="sum")
    return loss / ((labels != IGNORED).sum().clamp(min=1) if num_items is None else num_items)


def _position_loss(name: str, batch: Batch, scores: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy over each sequence's tokens of ``(T,)`` scores against ``(B,)``."""
    check_integers(name, positions)
    if positions.dim() == 2 and positions.shape[1] == 1:
        positions = positions.squeeze(1)
    scores = _at_least_float32(scores)
    grid, attended = batch.to_grid(scores, torch.finfo(scores.dtype).min), batch.attended()
    rows, columns = grid.shape
    check_shape(name, positions, (rows,))
    check_device(name, positions, "input", scores)
    if grid.numel() == 0:
        return grid.sum()
    positions = positions.long().clamp(min=0)
    inside = positions.clamp(max=columns - 1)
    counted = (positions < columns) & attended.gather(1, inside.unsqueeze(1)).squeeze(1)
    return _class_loss(name, grid, inside.masked_fill(~counted, IGNORED))
