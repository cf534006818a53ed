"""The modes of a model's modules, threads that share a task, and copies of tasks."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bertfast
from bertfast.tasks import Answer, Embed, FillMask

from .conftest import TEXTS


@pytest.fixture
def folder(make_model):
    return make_model("BertModel", hidden_dropout_prob=0.5)


@pytest.mark.parametrize("whole", [False, True])
def test_each_module_keeps_its_mode(whole, folder, tiny_tokenizer) -> None:
    model = bertfast.BertModel.from_pretrained(folder).train(whole)
    # A frozen part of a model in training, or one part in training of a model that is not.
    model.encoder.layer[1].train(not whole)
    modes = [module.training for module in model.modules()]
    found = Embed(model, tiny_tokenizer).many(TEXTS)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(found, Embed.from_pretrained(folder).many(TEXTS))


def test_threads_share_a_model_in_training(folder, tiny_tokenizer) -> None:
    model = bertfast.BertModel.from_pretrained(folder).train()
    tasks = [Embed(model, tiny_tokenizer), Embed(model, tiny_tokenizer)]
    expected = Embed.from_pretrained(folder).many(TEXTS)
    inside, leave = threading.Event(), threading.Event()

    def hook(*_):
        if threading.current_thread() is threading.main_thread():
            leave.set()
            first.result(60)
        else:
            inside.set()
            assert leave.wait(60)

    model.encoder.layer[1].register_forward_pre_hook(hook)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(tasks[0].many, TEXTS)
        assert inside.wait(60)
        # Comes while the first one predicts, and goes on behind it.
        second = tasks[1].many(TEXTS)
    torch.testing.assert_close(first.result(), expected)
    torch.testing.assert_close(second, expected)
    assert all(module.training for module in model.modules())


def test_an_error_restores_modes(folder, tiny_tokenizer) -> None:
    model = bertfast.BertModel.from_pretrained(folder).train()

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.encoder.layer[1].register_forward_pre_hook(fail)
    embed = Embed(model, tiny_tokenizer)
    with pytest.raises(RuntimeError, match="in the middle"):
        embed(TEXTS[0])
    assert all(module.training for module in model.modules())
    handle.remove()
    torch.testing.assert_close(embed(TEXTS[0]), Embed.from_pretrained(folder)(TEXTS[0]))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        (Embed, "BertModel", TEXTS[0]),
        (FillMask, "BertForMaskedLM", "a [MASK]"),
        (Answer, "BertForQuestionAnswering", ("why", TEXTS[0])),
    ],
)
def test_copies(task, name, value, copied, make_model) -> None:
    ready = task.from_pretrained(make_model(name))
    (expected,) = ready.many([value])
    (found,) = copied(ready).many([value])
    assert torch.equal(found, expected) if task is Embed else found == expected
