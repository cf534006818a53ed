"""A small tokenizer, and small random models that both bertfast and transformers load."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bertfast
from bertfast.data import builtin_documents, save_tokenizer, train_vocab

LENGTH = 48
# Each of them gets several windows, one row, nothing.
TEXTS = [
    "The value of an expression is computed when it is executed.",
    "Names refer to objects.",
    "",
    "The following sections describe the standard types that are built into the interpreter, and "
    "the operations that they support: comparisons, numeric types, iterators and generators, "
    "sequences, text, binary data, sets, mappings, context managers, and special attributes of "
    "functions, methods, modules, classes and instances; those of unusual names come last.",
    "An unbelievable (yet documented) Überraschung: naïve co-operation!",
    "x",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For every test in this folder."""


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_vocab(builtin_documents()[:12], 400)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """``make_model("BertForMaskedLM", num_labels=3, …)``: a directory with random weights and the
    tokenizer, made once."""
    made: dict[Any, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = (name, repr(changes))
        if key not in made:
            torch.manual_seed(zlib.crc32(repr(key).encode()))  # whichever test is the first
            config = bertfast.BertConfig(
                **{
                    "vocab_size": tiny_tokenizer.get_vocab_size(),
                    "hidden_size": 24,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "intermediate_size": 40,
                    "max_position_embeddings": LENGTH,
                    "initializer_range": 0.3,
                    **changes,
                }
            )
            folder = tmp_path_factory.mktemp(name)
            model = getattr(bertfast, name)(config)
            # Biases are drawn as zeros, which would hide one that is left out.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter += torch.randn_like(parameter) * 0.1
            model.save_pretrained(folder)
            save_tokenizer(tiny_tokenizer, folder, max_length=LENGTH)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def theirs() -> Callable[[Path, str], tuple[Any, Any]]:
    """transformers' model of a directory, in eval mode, and its tokenizer."""
    import transformers

    transformers.logging.disable_progress_bar()

    def load(folder: Path, name: str) -> tuple[Any, Any]:
        model = getattr(transformers, name).from_pretrained(folder).eval()
        return model, transformers.AutoTokenizer.from_pretrained(folder)

    return load
