"""Small models and batches shared by the model's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bertfast
from bertfast import backends

# In float64 two orders of the same sums agree to many digits, and a mistake differs by more than
# rounding. Native kernels have no float64: on a backend asked for by BERTFAST_BACKEND the same
# tests run in float32, where only the larger mistakes are seen.
DTYPE = torch.float64 if backends.current() in (None, "reference") else torch.float32


def assert_close(got: Any, expected: Any, *, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """The tolerances are those of :data:`DTYPE` float64; float32 has its own."""
    if torch.float32 == DTYPE:
        rtol, atol = 1e-3, 1e-4
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,  # large, so that no branch of the network is lost in rounding
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For every test in this folder."""


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., bertfast.BertConfig]:
    """``tiny_config(**changes)`` is a BERT of a few thousand parameters."""
    return lambda **changes: bertfast.BertConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def make_mask() -> Callable[[str, int, int], torch.Tensor | None]:
    """``make_mask(kind, rows, columns)`` with padding ``right``, ``left``, ``holes`` or ``none``.

    Rows differ in length, and the first column of ``holes`` is always attended.
    """

    def make(kind: str, rows: int, columns: int) -> torch.Tensor | None:
        if kind == "none":
            return None
        lengths = torch.arange(rows) * 3 % columns + 1
        mask = (torch.arange(columns) < lengths.unsqueeze(1)).long()
        if kind == "left":
            return mask.flip(1)
        if kind == "holes":
            mask = (torch.arange(rows * columns).reshape(rows, columns) * 7 % 5 > 1).long()
            mask[:, 0] = 1
        return mask

    return make


@dataclasses.dataclass
class Inputs:
    """A padded batch as keyword arguments, and what is attended in it."""

    kwargs: dict[str, torch.Tensor]
    attended: torch.Tensor


@pytest.fixture(scope="session")
def make_inputs(make_mask: Any) -> Callable[..., Inputs]:
    """``make_inputs(config, kind, rows, columns, seed)``: random ids, types and a mask."""

    def make(
        config: bertfast.BertConfig, kind: str = "right", rows: int = 3, columns: int = 9,
        seed: int = 0,
    ) -> Inputs:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, columns)
        kwargs = {
            "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
            "token_type_ids": torch.randint(config.type_vocab_size, shape, generator=generator),
        }
        mask = make_mask(kind, rows, columns)
        if mask is None:
            return Inputs(kwargs, torch.ones(shape, dtype=torch.bool))
        return Inputs({**kwargs, "attention_mask": mask}, mask.bool())

    return make
