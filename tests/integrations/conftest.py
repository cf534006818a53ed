"""Tiny models of the five families, batches, and transformers' own models as their reference."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,  # large, so that no branch of the network is lost in rounding
}
ROBERTA = SIZES | {"type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 53,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",  # and DistilBERT's names
    "attention_dropout",
    "seq_classif_dropout",
    "qa_dropout",
    "summary_last_dropout",
)

CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "Electra": SIZES | {"embedding_size": 16},
    "DistilBert": DISTILBERT,
}
FAMILIES = tuple(CONFIGS)
MASKS = ("none", "right", "left", "holes", "empty row")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For every test in this folder."""


def tiny(family: str, head: str = "Model", *, dropout: float = 0.0, **changes: Any) -> Any:
    """A model of the family in evaluation mode, all of whose parameters are random."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **changes})
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    model = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases are zero otherwise
    return model.eval()


@dataclasses.dataclass
class Inputs:
    """A padded batch as keyword arguments, and what is attended in it."""

    kwargs: dict[str, torch.Tensor]
    attended: torch.Tensor


def make_inputs(family: str, mask: str = "right", rows: int = 4, columns: int = 9) -> Inputs:
    """Random ids and types; rows differ in length."""
    generator = torch.Generator().manual_seed(2)
    shape = (rows, columns)
    ids = torch.randint(3, 53, shape, generator=generator)
    kwargs = {"input_ids": ids}
    if family in ("Bert", "Electra"):
        kwargs["token_type_ids"] = torch.randint(2, shape, generator=generator)
    attended = torch.arange(columns) < (torch.arange(rows) * 3 % columns + 1).unsqueeze(1)
    if mask == "none":
        return Inputs(kwargs, torch.ones(shape, dtype=torch.bool))
    if mask == "left":
        attended = attended.flip(1)
    elif mask == "holes":
        attended = torch.arange(rows * columns).reshape(shape) * 7 % 5 > 1
    elif mask == "empty row":
        attended[1] = False
    padding = CONFIGS[family].get("pad_token_id", 0)
    kwargs["input_ids"] = ids.masked_fill(~attended, padding)
    return Inputs(kwargs | {"attention_mask": attended.long()}, attended)


def double(model: Any) -> Any:
    """A copy in float64, the reference of a gate; its attention is transformers' plainest."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    return model
