"""Forked processes compute, with torch's operations and ours."""

import subprocess
import sys
from pathlib import Path

import pytest

import bertfast
from bertfast.data import save_tokenizer, train_vocab


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is OpenMP GNU's")
def test_forked_processes_compute(tmp_path):
    """After import, loading and a prediction, by os, multiprocessing and DataLoader."""
    tokenizer = train_vocab([["some words about a thing that is not here"] * 5], 100)
    config = bertfast.BertConfig(
        vocab_size=2000,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    bertfast.BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path, max_length=64)
    program = Path(__file__).with_name("forked.py")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
