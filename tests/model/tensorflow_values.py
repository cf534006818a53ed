"""What the variables of the committed TensorFlow checkpoints are called and hold.

``make_tensorflow_checkpoints.py`` writes them with it, and the tests recompute them with it.
"""

from __future__ import annotations

import zlib

import numpy as np

CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 24,
}
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "fox", "dog", "runs", "sleeps"]
VOCAB += ["and", "quick", "lazy", "over", "##s", "##ly", ".", ",", "?", "red", "blue", "is", "not"]
LABELS = 3


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 multiples of 1/128 in [-0.5, 0.5), which every float dtype holds exactly."""
    mixed = (np.arange(np.prod(shape, dtype=np.int64)) + zlib.crc32(name.encode())) * 2654435761
    numbers = ((mixed >> 13) % 128 - 64) / 128
    return numbers.astype(np.float32).reshape(shape)


def body() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder's and the pooler's variables, as Google's code has them."""
    hidden, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name: str, size: int, out: int) -> None:
        shapes[f"bert/{name}/kernel"] = (size, out)
        shapes[f"bert/{name}/bias"] = (out,)

    def norm(name: str) -> None:
        for part in ("beta", "gamma"):
            shapes[f"bert/{name}/LayerNorm/{part}"] = (hidden,)

    for table, rows in (
        ("word", CONFIG["vocab_size"]),
        ("position", CONFIG["max_position_embeddings"]),
        ("token_type", CONFIG["type_vocab_size"]),
    ):
        table = f"{table}_embeddings"
        shapes[f"bert/embeddings/{table}"] = (rows, hidden)
    norm("embeddings")
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}/attention/self/{part}", hidden, hidden)
        dense(f"{prefix}/attention/output/dense", hidden, hidden)
        norm(f"{prefix}/attention/output")
        dense(f"{prefix}/intermediate/dense", hidden, wide)
        dense(f"{prefix}/output/dense", wide, hidden)
        norm(f"{prefix}/output")
    dense("pooler/dense", hidden, hidden)
    return shapes


def heads() -> dict[str, dict[str, tuple[int, ...]]]:
    """Each head's variables: pre-training's, run_classifier's, run_squad's."""
    hidden = CONFIG["hidden_size"]
    return {
        "pretraining": {
            "cls/predictions/transform/dense/kernel": (hidden, hidden),
            "cls/predictions/transform/dense/bias": (hidden,),
            "cls/predictions/transform/LayerNorm/gamma": (hidden,),
            "cls/predictions/transform/LayerNorm/beta": (hidden,),
            "cls/predictions/output_bias": (CONFIG["vocab_size"],),
            "cls/seq_relationship/output_weights": (2, hidden),
            "cls/seq_relationship/output_bias": (2,),
        },
        "classifier": {"output_weights": (LABELS, hidden), "output_bias": (LABELS,)},
        "squad": {"cls/squad/output_weights": (2, hidden), "cls/squad/output_bias": (2,)},
    }
