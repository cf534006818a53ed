"""Modules that are replaced, wrapped, pruned, parametrised or hooked: they are called, also where
a kernel would read their parameters, and two steps of training go the way of plain torch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import bertfast

from .conftest import DTYPE, assert_close

LAYER = "bert.encoder.layer.0."
LINEARS = [
    LAYER + "attention.self.query",
    LAYER + "attention.output.dense",
    LAYER + "intermediate.dense",
    LAYER + "output.dense",
    "cls.predictions.transform.dense",
    "cls.predictions.decoder",
    "cls.seq_relationship",
    "bert.pooler.dense",
]
TABLES = [f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")]
NORMS = [
    "bert.embeddings.LayerNorm",
    LAYER + "attention.output.LayerNorm",
    LAYER + "output.LayerNorm",
    "cls.predictions.transform.LayerNorm",
]
WHERE = [*LINEARS, *TABLES, *NORMS]


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    # Untied, so that a decoder can be changed without the word table.
    config = tiny_config(tie_word_embeddings=False, hidden_dropout_prob=0.2)
    model = bertfast.BertForPreTraining(config).to(DTYPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def step(make_inputs):
    """``step(model)``: the loss of one forward and backward, with labels for both heads."""

    def run(model):
        inputs = make_inputs(model.config, "right", rows=4)
        labels = inputs.kwargs["input_ids"].masked_fill(~inputs.attended, -100)
        labels[:, ::3] = -100
        next_sentence = torch.tensor([0, 1, 0, 1])
        out = model(**inputs.kwargs, labels=labels, next_sentence_label=next_sentence, seed=1)
        out.loss.backward()
        return out.loss.detach()

    return run


def replace(model, where, make):
    parent, _, child = where.rpartition(".")
    new = make(model.get_submodule(where))
    setattr(model.get_submodule(parent), child, new)
    return new


class Around(nn.Module):
    """As LoRA's layers: what is wrapped, and a little more."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.more = nn.Parameter(torch.full((), 0.5, dtype=DTYPE))

    def forward(self, x):
        return self.inner(x) * (1 + self.more)


class Times(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@pytest.mark.parametrize("where", WHERE)
def test_a_wrapper_is_called_and_learns(where, model, step):
    """It multiplies what comes out, as do weight and bias that are multiplied."""
    inner = model.get_submodule(where)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(1.5)
    expected = step(model)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.div_(1.5)
    around = replace(model, where, Around)
    assert_close(step(model), expected)
    assert around.more.grad.abs() > 1e-6


@pytest.mark.parametrize("where", WHERE)
def test_hooks_see_and_change_what_passes(where, model, step):
    part, seen = model.get_submodule(where), []
    plain = step(model)
    handles = [
        part.register_forward_pre_hook(lambda _, args: seen.append("before")),
        part.register_forward_hook(lambda _, args, out: seen.append("after")),
        part.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    assert_close(step(model), plain)
    assert seen == ["before", "after", "backward"]
    handles.append(part.register_forward_hook(lambda _, args, out: out * 2))
    assert abs(step(model) - plain) > 1e-6
    for handle in handles:
        handle.remove()
    assert step(model).equal(plain)


@pytest.mark.parametrize("where", ["cls", "cls.predictions"])
def test_hooks_on_the_head_are_called_with_labels_too(where, model, step):
    plain, seen = step(model), []
    part = model.get_submodule(where)
    handle = part.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[-1]))
    assert_close(step(model), plain)
    assert seen == [24]
    handle.remove()
    part.register_forward_hook(
        lambda _, args, out: (out[0] * 2, out[1]) if where == "cls" else out * 2
    )
    assert abs(step(model) - plain) > 1e-6


def pruned(module):
    prune.random_unstructured(module, "weight", 0.5)


def normed(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, and in use
        nn.utils.weight_norm(module)


CHANGES = {
    "pruned": (pruned, lambda m: prune.remove(m, "weight")),
    "weight norm by hooks": (normed, nn.utils.remove_weight_norm),
    "spectral norm by hooks": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "weight norm": (
        parametrizations.weight_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    ),
    "parametrised": (
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Times()),
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", [*LINEARS, *TABLES])
def test_two_steps_with_a_weight_that_is_computed(where, change, model, step, tmp_path):
    """The second one fails where a weight is read that its hook has not written anew. What comes
    out is what the weight it makes gives."""
    make, remove = CHANGES[change]
    part = model.get_submodule(where)
    make(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(step(model))
        optimizer.step()
    assert losses[0] != losses[1]
    model.eval()
    computed = step(model)
    with pytest.raises(ValueError, match=rf"^save_pretrained: .*{where}\..*remove") as refused:
        model.save_pretrained(tmp_path)
    assert "weight" in str(refused.value)
    assert not any(tmp_path.iterdir())
    remove(part)
    assert_close(step(model), computed, rtol=1e-6)
    model.save_pretrained(tmp_path)
    again = bertfast.BertForPreTraining.from_pretrained(tmp_path)
    assert_close(step(again), step(model))


def test_a_table_that_renormalises_its_rows(model, step):
    model.eval()
    table = model.get_input_embeddings()
    plain = step(model)
    table.max_norm = 0.1
    assert step(model) != plain
    assert table.weight.norm(dim=1).min() < 0.11


def test_checkpointing_repeats_the_dropout_of_an_adapter(model, step):
    """Its masks are torch's, whose generator is put back for the recomputation."""

    def make(inner):
        return nn.Sequential(inner, nn.Dropout(0.5))

    query = replace(model, LAYER + "attention.self.query", make)[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        step(model)
        gradients.append(query.weight.grad.clone())
    assert gradients[0].equal(gradients[1])


def test_checkpointing_takes_what_it_does(model):
    with pytest.raises(ValueError, match=r"^use_reentrant: expected False or None, got bool True"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not model.is_gradient_checkpointing
    with pytest.raises(TypeError, match=r"^debug: expected a keyword of gradient_checkpointing_"):
        model.gradient_checkpointing_enable({"debug": True})
    with pytest.raises(ValueError, match=r"^every_n_layers: expected 1 or None, got int 2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match=r"^offload: expected False or None, got bool True"):
        model.activation_checkpointing_enable(offload=True)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=False)
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
@pytest.mark.parametrize("kind", ["none", "right", "left", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_hidden_states(name, kind, checkpointing, tiny_config, make_inputs):
    torch.manual_seed(0)
    model = getattr(bertfast, name)(tiny_config()).to(DTYPE)
    if checkpointing:
        model.gradient_checkpointing_enable()
    attended = None
    if kind == "packed":
        kwargs = {
            "input_ids": torch.randint(37, (9,)),
            "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32),
            "max_seqlen": 5,
        }
    else:
        inputs = make_inputs(model.config, kind)
        kwargs, attended = inputs.kwargs, inputs.attended
    kwargs["seed"] = 1
    plain = model(**kwargs)[0]
    out = model(**kwargs, output_hidden_states=True)
    assert out[0].equal(plain)
    for state in out.hidden_states:
        state.retain_grad()
    weights = torch.randn_like(out[0])
    if attended is not None:
        weights[~attended] = 0
    (out[0] * weights).sum().backward()
    if name == "BertModel":
        assert out.hidden_states[-1] is out.last_hidden_state
        assert out.hidden_states[-1].grad.equal(weights)
    for state in out.hidden_states:
        assert state.grad.shape == state.shape
        if attended is not None:
            assert state.grad[attended].any()
            assert not state.grad[~attended].any()
        else:
            assert state.grad.any()


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor([[7.0]]), 0])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BertForMaskedLM", (4, 9)),
        ("BertForTokenClassification", (4, 9)),
        ("BertForSequenceClassification", (4,)),
        ("BertForNextSentencePrediction", (4,)),
    ],
)
def test_a_loss_over_a_number_of_items(name, shape, items, tiny_config, make_inputs):
    """As transformers' Trainer wants it: batches of one step count by their labels."""
    torch.manual_seed(0)
    model = getattr(bertfast, name)(tiny_config()).to(DTYPE).eval()
    kwargs = make_inputs(model.config, "none", rows=4).kwargs
    labels = torch.randint(2, shape)
    labels.flatten()[::3] = -100
    count = int((labels != -100).sum())
    mean = model(**kwargs, labels=labels).loss
    got = model(**kwargs, labels=labels, num_items_in_batch=items).loss
    assert got.shape == ()
    assert_close(got, mean * count / max(int(items), 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, tiny_config, make_inputs):
    """A LayerNorm that is called gives float32 under autocast on some devices; what follows does
    not change its dtype by that."""
    model = bertfast.BertForMaskedLM(tiny_config()).eval()
    inputs = make_inputs(model.config).kwargs
    with torch.autocast("cpu", dtype=dtype), bertfast.backend("reference"):
        plain = model(**inputs, output_hidden_states=True)
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.Embedding)):
                module.register_forward_hook(lambda *_: None)
        called = model(**inputs, output_hidden_states=True)
    assert {h.dtype for h in called.hidden_states} == {dtype}
    assert called.logits.dtype == plain.logits.dtype
    error = (called.logits - plain.logits).abs().max() / plain.logits.abs().max()
    assert error < 16 * torch.finfo(dtype).eps


def test_activations_by_all_their_names(tiny_config):
    transformers = pytest.importorskip("transformers")
    x = torch.linspace(-3, 3, 40, dtype=DTYPE).reshape(1, 40)
    for name in ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast",
                 "gelu_python_tanh", "relu"):  # fmt: skip
        intermediate = (
            bertfast.BertModel(tiny_config(hidden_act=name)).encoder.layer[0].intermediate
        )
        nn.init.eye_(intermediate.dense.weight)
        expected = transformers.activations.ACT2FN[name](F.pad(x[:, :24], (0, 16)))
        assert_close(intermediate.to(DTYPE)(x[:, :24]), expected, rtol=1e-6, atol=1e-7)
