"""The forward that ``accelerate`` gives to masked-LM heads: a loss of labelled tokens alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import (
    BertForPreTrainingOutput,
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertPredictionHeadTransform,
    BertPreTrainingHeads,
)
from transformers.models.electra.modeling_electra import ElectraGeneratorPredictions
from transformers.models.roberta.modeling_roberta import RobertaLMHead
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLMHead

from bertfast import ops
from bertfast.integrations._layers import Accelerated, needs_whole_rows
from bertfast.model.heads import IGNORED
from bertfast.model.plain import is_computed_by, is_plain
from bertfast.ops._checks import check_shape

Transform = Callable[[Tensor], Tensor]


class AcceleratedMaskedLM(Accelerated):
    """A masked-LM model. Its loss multiplies the labelled tokens with the vocabulary and no others.

    The logits are transformers' own, of all tokens, and cost what they cost; nothing goes back
    through them unless the caller's own loss does. A head that has hooks, or parts with another
    forward than transformers', is transformers' to compute, at each call anew.
    """

    bertfast_logits: bool = True
    base_model_prefix: str
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        # Beyond three, the models' positional arguments differ.
        others = labels is None or len(args) > 3 or needs_whole_rows(self)
        found = None if others else self._predictions()
        if found is None or not is_plain(found[1], nn.Linear):
            return super().forward(*args, **kwargs)
        return self._with_loss(args, dict(kwargs), *found)

    def _predictions(self) -> tuple[Transform, Any] | None:
        """What comes before the decoder, ``(..., hidden)`` to ``(..., embedding)``; the decoder.
        None where that is not all that the head computes."""
        raise NotImplementedError

    def _with_loss(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], transform: Transform, decoder: Any
    ) -> Any:
        labels, return_dict = kwargs.pop("labels"), kwargs.pop("return_dict", None)
        outputs = getattr(self, self.base_model_prefix)(*args, return_dict=True, **kwargs)
        loss, logits = self._loss(outputs.last_hidden_state, labels, transform, decoder)
        out = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(out, return_dict)

    def _returned(self, out: Any, return_dict: bool | None) -> Any:
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return out if wanted else out.to_tuple()

    def _loss(
        self, hidden: Tensor, labels: Tensor, transform: Transform, decoder: Any
    ) -> tuple[Tensor, Tensor | None]:
        check_shape("labels", labels, tuple(hidden.shape[:2]))
        labels = labels.to(hidden.device).reshape(-1)
        labelled = (labels != IGNORED).nonzero().squeeze(1)
        logits = None
        if self.bertfast_logits or not self.training:
            x = transform(hidden)
            logits = decoder(x)
            x = x.flatten(0, 1).index_select(0, labelled)
        else:
            x = transform(hidden.flatten(0, 1).index_select(0, labelled))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the decoder would
        labels = labels.index_select(0, labelled)
        return ops.cross_entropy(x, decoder.weight, decoder.bias, labels), logits


class AcceleratedBertMaskedLM(AcceleratedMaskedLM):
    """``BertForMaskedLM``."""

    cls: Any
    heads: type[nn.Module] = BertOnlyMLMHead

    def _predictions(self) -> tuple[Transform, Any] | None:
        if not is_computed_by(self.cls, self.heads):
            return None
        head = self.cls.predictions
        if not is_computed_by(head, BertLMPredictionHead):
            return None
        if not is_computed_by(head.transform, BertPredictionHeadTransform):
            return None
        return head.transform, head.decoder


class AcceleratedBertPreTraining(AcceleratedBertMaskedLM):
    """``BertForPreTraining``."""

    heads = BertPreTrainingHeads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("next_sentence_label") is None:  # transformers then gives no loss at all
            return super(AcceleratedMaskedLM, self).forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _with_loss(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], transform: Transform, decoder: Any
    ) -> Any:
        labels, return_dict = kwargs.pop("labels"), kwargs.pop("return_dict", None)
        next_sentence_label = kwargs.pop("next_sentence_label")
        outputs = self.bert(*args, return_dict=True, **kwargs)  # type: ignore[operator]
        loss, logits = self._loss(outputs.last_hidden_state, labels, transform, decoder)
        relationship = self.cls.seq_relationship(outputs.pooler_output)
        loss = loss + F.cross_entropy(relationship.view(-1, 2), next_sentence_label.view(-1))
        out = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(out, return_dict)


class AcceleratedRobertaMaskedLM(AcceleratedMaskedLM):
    """``RobertaForMaskedLM`` and ``XLMRobertaForMaskedLM``."""

    lm_head: Any

    def _predictions(self) -> tuple[Transform, Any] | None:
        head = self.lm_head
        if not any(is_computed_by(head, cls) for cls in (RobertaLMHead, XLMRobertaLMHead)):
            return None
        return lambda x: head.layer_norm(F.gelu(head.dense(x))), head.decoder


class AcceleratedElectraMaskedLM(AcceleratedMaskedLM):
    """``ElectraForMaskedLM``."""

    generator_predictions: Any
    generator_lm_head: Any

    def _predictions(self) -> tuple[Transform, Any] | None:
        if not is_computed_by(self.generator_predictions, ElectraGeneratorPredictions):
            return None
        return self.generator_predictions, self.generator_lm_head


class AcceleratedDistilBertMaskedLM(AcceleratedMaskedLM):
    """``DistilBertForMaskedLM``."""

    vocab_transform: Any
    activation: Any
    vocab_layer_norm: Any
    vocab_projector: Any
    mlm_loss_fct: Any

    def _predictions(self) -> tuple[Transform, Any] | None:
        loss = self.mlm_loss_fct
        if not is_plain(loss, nn.CrossEntropyLoss) or loss.weight is not None:
            return None
        if (loss.ignore_index, loss.reduction, loss.label_smoothing) != (IGNORED, "mean", 0.0):
            return None
        return self._transform, self.vocab_projector

    def _transform(self, x: Tensor) -> Tensor:
        return self.vocab_layer_norm(self.activation(self.vocab_transform(x)))
