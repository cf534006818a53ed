"""BERT whose hot paths are hand-written kernels.

``bertfast.BertModel`` takes the weights of a Hugging Face BERT and gives the same outputs; every
softmax attention, residual + dropout + LayerNorm, bias + GELU, embedding and masked-LM
cross-entropy in it runs through :mod:`bertfast.ops`.

Importing this package touches no GPU and no optional dependency; names are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bertfast import forks as forks  # from now on, forked processes can compute

__version__ = "0.1.0"

_EXPORTS = {
    "BertConfig": "bertfast.model.config",
    "BertModel": "bertfast.model.bert",
    "BertForPreTraining": "bertfast.model.heads",
    "BertForMaskedLM": "bertfast.model.heads",
    "BertForNextSentencePrediction": "bertfast.model.heads",
    "BertForSequenceClassification": "bertfast.model.heads",
    "BertForTokenClassification": "bertfast.model.heads",
    "BertForQuestionAnswering": "bertfast.model.heads",
    "BertForMultipleChoice": "bertfast.model.heads",
    "backend": "bertfast.backends",
    "explain": "bertfast.backends",
}
_SUBMODULES = ("backends", "data", "errors", "model", "ops", "tasks", "testing", "training")

__all__ = [*_EXPORTS, *_SUBMODULES, "__version__"]

if TYPE_CHECKING:
    from bertfast.backends import backend, explain
    from bertfast.model.bert import BertModel
    from bertfast.model.config import BertConfig
    from bertfast.model.heads import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"bertfast.{name}")
    else:
        raise AttributeError(f"module 'bertfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
