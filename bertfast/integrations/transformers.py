"""bertfast inside Hugging Face's transformers (5.4 or newer).

Importing this module registers ``attn_implementation="bertfast"``, attention for any transformers
model that goes through its attention interface. :func:`accelerate` does more for a BERT, RoBERTa,
XLM-RoBERTa, DistilBERT or ELECTRA: it swaps the layers of an instance for bertfast's kernels.
"""

import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface

OLDEST = "5.4"
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"bertfast.integrations.transformers: expected transformers >= {OLDEST}, "
        f"got {transformers.__version__}"
    )

from bertfast.integrations._accelerate import accelerate, restore  # noqa: E402
from bertfast.integrations._attention import attention, mask  # noqa: E402

__all__ = ["accelerate", "attention", "mask", "restore"]

AttentionInterface.register("bertfast", attention)
AttentionMaskInterface.register("bertfast", mask)
