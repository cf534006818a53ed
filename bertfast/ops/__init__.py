"""The differentiable operations BERT is made of, on packed tokens.

``T`` tokens of a whole batch lie one after another without padding; ``cu_seqlens`` (int32,
batch + 1) says where each sequence starts and ends. Every op takes ``backend=`` (see
:mod:`bertfast.backends`) and every dropout mask is a pure function of ``(seed, site, element)``
(see :mod:`bertfast.masks`).
"""

from bertfast.backends import load_kernels
from bertfast.ops.attention import attention, attention_qkvpacked
from bertfast.ops.cross_entropy import cross_entropy
from bertfast.ops.dropout import dropout
from bertfast.ops.embedding import embedding
from bertfast.ops.gelu import gelu
from bertfast.ops.layernorm import layernorm

__all__ = [
    "attention",
    "attention_qkvpacked",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layernorm",
]

load_kernels()
