"""docs/transformers.md says what is so: its programs run and print what stands below them."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bertfast.integrations.transformers import accelerate

from .conftest import FAMILIES, make_inputs, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_program_has_its_output():
    assert len(PROGRAMS) == PAGE.count("```python") == 3


def test_the_programs_print_what_the_page_says(tmp_path):
    """Each in a namespace of its own, one after another in one process."""
    run = "import json, sys\nfor code in json.load(sys.stdin):\n    exec(code, {}), print('--')"
    done = subprocess.run(
        [sys.executable, "-c", run],
        input=json.dumps([code for code, _ in PROGRAMS]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("--\n")[:-1] == [output for _, output in PROGRAMS]


def row(start):
    (found,) = re.findall(rf"^\| {start}(.*)$", PAGE, re.MULTILINE)
    return found


def hooked(model, kwargs):
    """The modules whose hooks are called. Each hook is alone: a hook makes others be called."""
    called = set()
    for name, module in model.named_modules():
        handle = module.register_forward_hook(lambda *_, name=name: called.add(name))
        model(**kwargs)
        handle.remove()
    return called


def test_the_hooks_that_are_not_called():
    missing = set()
    for family in FAMILIES:
        model = tiny(family, "ForPreTraining" if family == "Bert" else "ForMaskedLM")
        kwargs = make_inputs(family).kwargs
        kwargs["labels"] = kwargs["input_ids"]
        if family == "Bert":
            kwargs["next_sentence_label"] = torch.arange(4) % 2
        with torch.no_grad():
            called = hooked(model, kwargs)
            missing |= {n.split(".")[-1] for n in called - hooked(accelerate(model), kwargs)}
    assert missing == set(re.findall(r"`(\w+)`", row("hooks on ")))


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
def test_labels_on_padding(head):
    model = tiny("Bert", head)
    inputs = make_inputs("Bert")
    labels = torch.ones_like(inputs.kwargs["input_ids"])
    with torch.no_grad():
        hidden = model.bert(**inputs.kwargs).last_hidden_state * inputs.attended.unsqueeze(-1)
        logits = (model.cls if head == "ForMaskedLM" else model.classifier)(hidden)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        fast = accelerate(copy.deepcopy(model))
        theirs = model(**inputs.kwargs, labels=labels).loss
        loss = fast(**inputs.kwargs, labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(loss, theirs, rtol=1e-3)
        labels[~inputs.attended] = -100
        theirs = model(**inputs.kwargs, labels=labels).loss
        loss = fast(**inputs.kwargs, labels=labels).loss
        torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-5)
    assert "count against zeros" in row("labels on padding") and "-100" in row("labels on padding")
