"""Whole processes from start to end: a model class beside torch alone, and a verb on one short text
beside torch and the weights.
"""

import json
import subprocess
import sys
from functools import partial

import pytest

from .turns import Calls

IMPORTS = {
    "torch": "import torch",
    "bertfast": "import torch; import bertfast; bertfast.BertModel",
}
WEIGHTS = "import sys, torch; from safetensors.torch import load_file; load_file(sys.argv[1])"
TEXT = "How old are you?"


def _process(*arguments: str) -> str:
    """What Python prints; where it is installed from is as it is here."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _imports() -> Calls:
    return {name: partial(_process, "-c", code) for name, code in IMPORTS.items()}


def _verb(folder) -> Calls:
    weights = folder / "model.safetensors"
    verb = ("-m", "bertfast", "embed", "--model", str(folder), "--json", TEXT)
    assert len(json.loads(_process(*verb))["embedding"]) == 384
    return {
        "torch": partial(_process, "-c", WEIGHTS, str(weights)),
        "bertfast": partial(_process, *verb),
    }


@pytest.mark.parametrize("implementation", ["torch", "bertfast"])
def bench_import(turns, implementation):
    turns.info.update(case="importing `BertModel`, and `import torch`")
    turns.time("start-up import", implementation, _imports, rounds=(7, 21))


@pytest.mark.parametrize("implementation", ["torch", "bertfast"])
def bench_verb(turns, minilm, implementation):
    turns.info.update(case="`bertfast embed`, and torch reading the weights")
    turns.time("start-up embed", implementation, partial(_verb, minilm), rounds=(7, 21))
