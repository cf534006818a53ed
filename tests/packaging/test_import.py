"""What importing bertfast does and does not, and which CPU kernels it takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bertfast import BertConfig, BertModel, _cpu
from bertfast.data import builtin_documents, save_tokenizer, train_vocab

from .conftest import run

# What takes as long to import as torch does.
HEAVY = {"torch._dynamo", "torch._inductor", "sympy", "transformers"}
if torch.version.cuda is None:  # Triton's kernels are imported where they may run
    HEAVY.add("triton")


def evaluate(code: str, tmp_path: Path, **environment: str) -> object:
    done = run(sys.executable, "-c", code, cwd=tmp_path, **environment)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_loads_nothing_optional_and_touches_no_gpu(tmp_path: Path) -> None:
    loaded = evaluate(
        "import json, sys\n"
        # torch itself imports it where it is: here it is not.
        "sys.modules['triton'] = None\n"
        "import bertfast\n"
        "bare = sorted(name for name, module in sys.modules.items() if module)\n"
        "for name in bertfast.__all__:\n"
        "    if name not in ('data', 'tasks', 'training'):\n"
        "        getattr(bertfast, name)\n"
        "import torch\n"
        "full = sorted(name for name, module in sys.modules.items() if module)\n"
        "print(json.dumps([bare, full, torch.cuda.is_initialized()]))",
        tmp_path,
    )
    bare, full, gpu = loaded
    optional = {"transformers", "triton", "sentence_transformers", "pytest", "hypothesis"}
    optional |= {"huggingface_hub", "tensorflow"}
    assert optional & set(bare) == set()
    assert optional & set(full) == set()
    # The bare import is instant: what is heavy comes with the first name that needs it.
    assert {"torch", "numpy", "tokenizers"} & set(bare) == set()
    assert gpu is False


def test_a_model_class_costs_little_beside_torch(tmp_path: Path) -> None:
    """What takes as long to import as torch does stays away."""
    loaded = evaluate(
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import bertfast; bertfast.BertModel; bertfast.tasks.Embed\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        tmp_path,
        TRITON_INTERPRET="0",
    )
    assert "bertfast.model.bert" in loaded
    assert HEAVY & set(loaded) == set()


def test_a_verb_costs_little_beside_torch(tmp_path: Path) -> None:
    """A prediction, reading and saving a checkpoint and another vocabulary import nothing heavy,
    and the garbage collector does not walk what torch is made of."""
    tokenizer = train_vocab(builtin_documents()[:3], 300)
    save_tokenizer(tokenizer, tmp_path, max_length=16)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(tmp_path)
    loaded, collects, frozen, seen = evaluate(
        "import gc, json, sys\n"
        "from bertfast.cli import main\n"
        "assert main(['embed', '--model', '.', 'Names refer to objects.']) == 0\n"
        "collector = gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects())\n"
        "import bertfast\n"
        "model = bertfast.BertModel.from_pretrained('.')\n"
        "model.resize_token_embeddings(400)\n"
        "model.save_pretrained('again')\n"
        "print(json.dumps([sorted(sys.modules), *collector]))",
        tmp_path,
        TRITON_INTERPRET="0",
    )
    assert "bertfast.tasks.embed" in loaded
    assert HEAVY & set(loaded) == set()
    assert collects is True
    assert frozen > seen


# A process for each would take a minute; a fork of one that has what is not ours takes no time.
IMPORT_EACH = """
import importlib, importlib.util, json, os, sys, traceback
from pathlib import Path
import torch
for name in ("numpy", "tokenizers", "safetensors.torch", "triton"):
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
root = Path(importlib.util.find_spec("bertfast").origin).parent
failed = {}
names = []
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
    name = name.removesuffix(".__init__")
    if name == "bertfast.__main__":
        continue
    if name.startswith("bertfast.kernels.triton.") and "triton" not in sys.modules:
        continue
    if name.startswith("bertfast.integrations."):  # transformers takes many seconds
        continue
    names.append(name)
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed[name] = True
print(json.dumps([names, list(failed)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_every_module_imports_alone(tmp_path: Path) -> None:
    names, failed = evaluate(IMPORT_EACH, tmp_path)
    assert "bertfast.kernels.reference.dropout" in names
    assert len(names) > 60
    assert failed == []


ISA = "import json; from bertfast import _cpu; print(json.dumps(_cpu.isa()))"


def test_the_best_instruction_set_runs_by_default(tmp_path: Path) -> None:
    assert evaluate(ISA, tmp_path) == _cpu.isas()[-1]


@pytest.mark.parametrize("name", _cpu.isas())
def test_an_instruction_set_can_be_forced(name: str, tmp_path: Path) -> None:
    assert evaluate(ISA, tmp_path, BERTFAST_CPU_ISA=name) == name


def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    done = run(sys.executable, "-c", ISA, cwd=tmp_path, check=False, BERTFAST_CPU_ISA="avx1024")
    assert done.returncode == 1  # an exception, not a crash
    last = done.stdout.strip().splitlines()[-1]
    for part in ("BERTFAST_CPU_ISA", "avx1024", "baseline"):
        assert part in last
    # `bertfast env` is what one runs then: it must answer and repeat the message.
    done = run(
        sys.executable, "-m", "bertfast", "env", "--json", cwd=tmp_path, check=False,
        BERTFAST_CPU_ISA="avx1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    information = json.loads(done.stdout[done.stdout.index("{") :])
    assert "avx1024" in information["kernels"]["error"]
    assert information["environment"]["BERTFAST_CPU_ISA"] == "avx1024"
