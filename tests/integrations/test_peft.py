"""``accelerate()`` on models with adapters of peft, put in before it or after it."""

from __future__ import annotations

import copy

import pytest
import torch

from bertfast.integrations.transformers import accelerate, restore

from .conftest import make_inputs, tiny

peft = pytest.importorskip("peft")

QUERY_VALUE = {"Bert": ["query", "value"], "DistilBert": ["q_lin", "v_lin"]}
TOKENS = list(range(3, 30))


def lora(targets, **more):
    return peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, **more)


ADAPTERS = {
    "query and value": lambda q: lora(q),
    "all linear layers": lambda q: lora("all-linear"),
    "tables": lambda q: lora(["word_embeddings", "position_embeddings", *q]),
    "DoRA": lambda q: lora([*q, "lin1", "dense"], use_dora=True),
    "copies of modules": lambda q: lora(q, modules_to_save=["word_embeddings", "LayerNorm"]),
    "tokens and LoRA": lambda q: lora(q, trainable_token_indices=TOKENS),
    "tokens": lambda q: peft.TrainableTokensConfig(
        target_modules=["word_embeddings"], token_indices=TOKENS
    ),
}


def train(model, kwargs):
    """Three steps: their losses, and what has been trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**kwargs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, trained


@pytest.mark.parametrize("first", ["accelerate", "peft"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_adapters_train_as_without_it(family, adapter, first):
    base = tiny(family, "ForTokenClassification").double()
    inputs = make_inputs(family)
    labels = (inputs.kwargs["input_ids"] % 2).masked_fill(~inputs.attended, -100)
    kwargs = inputs.kwargs | {"labels": labels}
    config = ADAPTERS[adapter](QUERY_VALUE[family])
    expected = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).double()
    if first == "accelerate":
        accelerate(base)
    model = peft.get_peft_model(base, config).double()
    if first == "peft":
        accelerate(model)
    model.load_state_dict(expected.state_dict())
    before = copy.deepcopy(expected.state_dict())
    losses, trained = train(model.train(), kwargs)
    theirs, peers = train(expected.train(), kwargs)
    torch.testing.assert_close(losses, theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(trained, peers, rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(before[name], p) for name, p in trained.items())
    merged, peer = model.merge_and_unload(), expected.merge_and_unload()
    with torch.no_grad():
        expected = peer(**kwargs).logits[inputs.attended]
        for m in (merged, restore(merged)):
            torch.testing.assert_close(m(**kwargs).logits[inputs.attended], expected)


def test_lora_drops_in_training():
    """Its dropout is a module of its own, which is called and is none of the encoder's."""
    config = lora(QUERY_VALUE["Bert"], lora_dropout=0.5)
    model = accelerate(peft.get_peft_model(tiny("Bert"), config)).eval()
    kwargs = make_inputs("Bert").kwargs
    with torch.no_grad():
        assert torch.equal(model(**kwargs)[0], model(**kwargs)[0])
        model.train()
        assert not torch.equal(model(**kwargs)[0], model(**kwargs)[0])
