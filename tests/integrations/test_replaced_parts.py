"""Accelerated models in which something was replaced, wrapped or hooked, before or since."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from bertfast.integrations.transformers import accelerate, restore

from .conftest import FAMILIES, make_inputs, tiny

transformers = pytest.importorskip("transformers")


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


def halves(gradients):
    return tuple(None if g is None else g * 0.5 for g in gradients)


CHANGES = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Tanh()),
    "hook": lambda m: m.register_forward_hook(lambda m, args, out: out * 0.5),
    "pre-hook": lambda m: m.register_forward_pre_hook(
        lambda m, args: tuple(x * 0.5 if x.is_floating_point() else x for x in args)
    ),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, into, out: halves(into)),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, out: halves(out)),
}
PLACES = [
    ("Bert", "bert.embeddings.word_embeddings"),
    ("Bert", "bert.encoder.layer.0.attention.self.query"),
    ("Bert", "bert.encoder.layer.0.intermediate.dense"),
    ("Bert", "bert.encoder.layer.0.output.LayerNorm"),
    ("Bert", "cls.predictions.transform.dense"),
    ("Bert", "cls.predictions.decoder"),
    ("Roberta", "lm_head.decoder"),
    ("Electra", "generator_lm_head"),
    ("DistilBert", "distilbert.transformer.layer.0.ffn.lin1"),
    ("DistilBert", "vocab_projector"),
]


def losses(model, kwargs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**kwargs).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("family", "path"), PLACES)
def test_changed_modules_train_as_in_transformers(family, path, change):
    if "norm" in change and path.endswith("LayerNorm"):
        change = "prune"  # they take matrices alone
    base = tiny(family, "ForMaskedLM").double().train()
    inputs = make_inputs(family)
    ids = inputs.kwargs["input_ids"]
    kwargs = inputs.kwargs | {"labels": ids.masked_fill(~inputs.attended, -100)}
    plain = losses(copy.deepcopy(base), kwargs)
    runs = []
    for fast in (False, True):
        model = copy.deepcopy(base)
        if fast:
            accelerate(model, output_logits=False)
        torch.manual_seed(0)  # spectral_norm draws
        CHANGES[change](model.get_submodule(path))
        runs.append(losses(model, kwargs))
    assert runs[1] == pytest.approx(runs[0], rel=1e-8)
    if change in ("prune", "parametrization", "hook", "backward pre-hook"):
        assert runs[1] != pytest.approx(plain, rel=1e-6)  # others may change next to nothing


def layers_of(model):
    return (getattr(model.base_model, "encoder", None) or model.base_model.transformer).layer


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs.kwargs).logits[inputs.attended]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_makes_transformers_own_models(family, tmp_path):
    model = accelerate(tiny(family, "ForMaskedLM"))
    inputs = make_inputs(family)
    own = getattr(transformers, f"{family}ForMaskedLM")
    model.save_pretrained(tmp_path)
    for made in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(made) is own
        assert not any(hasattr(part, "accelerated_from") for part in made.modules())
    torch.testing.assert_close(
        outputs(made.eval(), inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4
    )
    assert type(type(layers_of(model)[0])(model.config)) is type(layers_of(made)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_come_and_go(family):
    model, peer = accelerate(tiny(family, "ForMaskedLM")), tiny(family, "ForMaskedLM")
    inputs = make_inputs(family)
    torch.manual_seed(5)
    fresh = type(layers_of(peer)[0])(peer.config).eval()
    layers_of(model)[0], layers_of(peer)[0] = fresh, copy.deepcopy(fresh)
    for m in (model, copy.deepcopy(model)):
        assert torch.equal(outputs(m, inputs), outputs(peer, inputs))  # transformers' own code
    accelerate(restore(model))
    expected = outputs(peer, inputs)
    assert not torch.equal(outputs(model, inputs), expected)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)
    other = tiny(family, "ForMaskedLM")
    layers_of(other)[1] = layers_of(model)[0]  # an accelerated layer in a plain model
    stack = [
        getattr(m.base_model, "encoder", None) or m.base_model.transformer for m in (model, peer)
    ]
    for part in stack:
        part.layer = part.layer[:1]
    torch.testing.assert_close(outputs(model, inputs), outputs(peer, inputs), rtol=1e-4, atol=1e-4)
    moved = tiny(family, "ForMaskedLM")
    layers_of(moved)[1] = layers_of(peer)[0]
    assert torch.equal(outputs(other, inputs), outputs(moved, inputs))


@pytest.mark.parametrize(
    "path",
    ["embeddings", "encoder", "encoder.layer.0.attention", "encoder.layer.0.attention.self",
     "encoder.layer.1.intermediate", "encoder.layer.1.output", "encoder.layer.0.output.dropout"],
)  # fmt: skip
def test_parts_that_were_replaced_since_are_called(path):
    class Part(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part
            self.LayerNorm = getattr(part, "LayerNorm", None)

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "part" else getattr(self.part, name)

        def forward(self, *args, **kwargs):
            calls.append(path)
            return self.part(*args, **kwargs)

    calls = []
    model = accelerate(tiny("Bert"))
    inputs = make_inputs("Bert")
    with torch.no_grad():
        expected = model(**inputs.kwargs)[0][inputs.attended]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Part(model.get_submodule(path)))
        out = model(**inputs.kwargs)[0][inputs.attended]
    assert calls
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_hidden_states(family):
    inputs = make_inputs(family)
    weights = torch.randn(4, 9, 32).double()
    runs = []
    for model in (tiny(family).double(), accelerate(tiny(family)).double()):
        out = model(**inputs.kwargs, output_hidden_states=True)
        for hidden in out.hidden_states:
            hidden.retain_grad()
        (out.last_hidden_state * weights)[inputs.attended].sum().backward()
        runs.append([hidden.grad for hidden in out.hidden_states])
    assert all(gradient[inputs.attended].any() for gradient in runs[0])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-8, atol=1e-9)


# Who asks for an example in every row


def test_functional_transforms_get_transformers_own_code():
    model = tiny("Bert", "ForMaskedLM").double()
    kwargs = make_inputs("Bert").kwargs
    kwargs["labels"] = kwargs["input_ids"]

    def gradient(m):
        def loss(parameters):
            return torch.func.functional_call(m, parameters, (), kwargs).loss

        return torch.func.grad(loss)(dict(m.named_parameters()))

    expected = gradient(model)
    torch.testing.assert_close(gradient(accelerate(model)), expected)


def test_a_head_with_labels_is_traced_by_transformers_own_code():
    model = accelerate(tiny("Bert", "ForMaskedLM", return_dict=False))
    ids = make_inputs("Bert", "none").kwargs["input_ids"]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, labels):
            return self.model(ids, labels=labels)[0]

    with torch.no_grad():
        traced = torch.jit.trace(Loss(), (ids, ids))
        other = ids.flip(0).masked_fill(ids % 2 == 0, -100)
        torch.testing.assert_close(traced(ids, other), Loss()(ids, other), rtol=1e-4, atol=1e-5)


def test_opacus_sees_sequences(monkeypatch):
    """It marks the parameters whose gradients it takes for each example, from hooks."""
    model = accelerate(tiny("Bert"))
    shapes = []
    dense = model.encoder.layer[1].output.dense
    dense.register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape)))
    inputs = make_inputs("Bert")
    model(**inputs.kwargs)
    monkeypatch.setitem(sys.modules, "opacus", types.ModuleType("opacus"))
    model(**inputs.kwargs)
    dense.weight.grad_sample = None
    model(**inputs.kwargs)
    tokens = (int(inputs.attended.sum()), 48)
    assert shapes == [tokens, tokens, (4, 9, 48)]


def test_a_question_answering_model_of_another_name():
    class Reader(transformers.BertForQuestionAnswering):
        """Its softmax runs over padding, too."""

    torch.manual_seed(1)
    model = Reader(tiny("Bert").config).eval()
    inputs = make_inputs("Bert")
    with torch.no_grad():
        expected = model(**inputs.kwargs).start_logits
        out = accelerate(model)(**inputs.kwargs).start_logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
