"""``accelerate(model)``: transformers' outputs and gradients, in everything transformers does."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import bertfast
from bertfast.integrations import _accelerate
from bertfast.integrations._accelerate import accelerated_class
from bertfast.integrations.transformers import accelerate, restore
from bertfast.masks import attention_keep_mask, dropout_scale, dropout_threshold, keep_mask
from bertfast.model.base import draw_seed
from bertfast.testing import assert_no_worse

from .conftest import CONFIGS, FAMILIES, MASKS, double, make_inputs, tiny

transformers = pytest.importorskip("transformers")

# One head for each way in which a head reads the encoder, and its labels.
HEADS = {
    "ForMaskedLM": lambda ids: {"labels": ids.masked_fill((ids % 3 != 0) | (ids < 3), -100)},
    "ForSequenceClassification": lambda ids: {"labels": torch.arange(len(ids)) % 2},
    "ForTokenClassification": lambda ids: {"labels": (ids % 2).masked_fill(ids < 3, -100)},
    "ForQuestionAnswering": lambda ids: {
        "start_positions": torch.zeros(len(ids), dtype=torch.long),
        "end_positions": torch.arange(len(ids)) % 2,
    },
}


def weighed(out):
    """A loss whose gradient at ``out`` is random."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(8))).sum()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(got, expected, baseline, name):
    """The gate on all gradients together: single ones are often sums of what cancels, whose
    rounding is nobody's fault. In float64 they are compared one by one."""
    assert got.keys() == expected.keys() == baseline.keys()
    joined = (torch.cat([g[key].flatten() for key in got]) for g in (got, expected, baseline))
    assert_no_worse(*joined, kind="model", name=f"{name} gradients")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_all_layers(family, mask):
    model = tiny(family)
    inputs = make_inputs(family, mask)
    exact = double(model)
    with torch.no_grad():
        baseline = model(**inputs.kwargs, output_hidden_states=True)
        reference = exact(**inputs.kwargs, output_hidden_states=True)
        out = accelerate(model)(**inputs.kwargs, output_hidden_states=True)
    assert list(out) == [key for key in baseline if key != "attentions"]
    assert len(out.hidden_states) == len(baseline.hidden_states) == 3
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
    read = inputs.attended.clone()
    read[:, 0] |= read.any(1)  # what heads read, also where it is padding on the left
    for layer, (ours, theirs, peer) in enumerate(
        zip(out.hidden_states, reference.hidden_states, baseline.hidden_states, strict=True)
    ):
        assert_no_worse(
            ours[read], theirs[read], peer[read], kind="model", name=f"{family} {mask} {layer}"
        )
        assert not ours[~read].any()
    if "pooler_output" in out:
        rows = inputs.attended.any(1)
        assert_no_worse(
            out.pooler_output[rows],
            reference.pooler_output[rows],
            baseline.pooler_output[rows],
            kind="model",
            name=f"{family} {mask} pooler",
        )


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_logits_and_gradients(family, head, mask):
    """On enough sequences: of four, one alone may have all of the largest error, which then is one
    rounding, and in torch or in ours large by chance."""
    model = tiny(family, head).train()  # no dropout: what else training mode does counts
    inputs = make_inputs(family, mask, rows=24)
    kwargs = inputs.kwargs | HEADS[head](inputs.kwargs["input_ids"])
    exact, fast = double(model), accelerate(copy.deepcopy(model))
    runs = []
    for m in (exact, model, fast, copy.deepcopy(fast).double()):
        out = m(**kwargs)
        runs.append((out, gradients_of(m, out.loss)))
    (reference, expected), (peer, baseline), (out, got), (same, close) = runs
    torch.testing.assert_close(same.loss, reference.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(close, expected, rtol=1e-8, atol=1e-10)
    name = f"{family}{head} {mask}"
    assert list(out) == list(peer)
    for key in out:
        parts = tuple(output[key].detach() for output in (reference, peer, out))
        assert parts[2].dtype == parts[1].dtype
        if parts[1].dim() < 3:  # a few numbers, whose rounding is a matter of chance
            torch.testing.assert_close(parts[2].double(), parts[0], rtol=1e-4, atol=1e-5)
            continue
        parts = tuple(x[inputs.attended] for x in parts)
        assert_no_worse(parts[2], parts[0], parts[1], kind="model", name=f"{name} {key}")
    check_gradients(got, expected, baseline, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_without_logits(family):
    """``output_logits=False``: the head runs on labelled tokens alone, in training only."""
    head = "ForPreTraining" if family == "Bert" else "ForMaskedLM"
    model = tiny(family, head).train()
    inputs = make_inputs(family, "right")
    kwargs = inputs.kwargs | HEADS["ForMaskedLM"](inputs.kwargs["input_ids"])
    logits = "logits"
    if family == "Bert":
        kwargs["next_sentence_label"] = torch.arange(4) % 2
        logits = "prediction_logits"
    exact, fast = double(model), accelerate(copy.deepcopy(model), output_logits=False)
    runs = [(m(**kwargs), m) for m in (exact, model, fast)]
    (reference, _), _, (out, _) = runs
    assert out[0] is out.loss and logits not in out
    torch.testing.assert_close(out.loss.double(), reference.loss, rtol=1e-5, atol=0)
    gradients = [gradients_of(m, o.loss) for o, m in runs]
    check_gradients(gradients[2], gradients[0], gradients[1], f"{family} without logits")
    assert fast(**inputs.kwargs)[logits] is not None  # without labels there is nothing else
    with torch.no_grad():
        assert fast.eval()(**kwargs)[logits] is not None


def test_a_batch_without_labels_to_learn_from():
    model = accelerate(tiny("Bert", "ForMaskedLM")).train()
    kwargs = make_inputs("Bert").kwargs
    loss = model(**kwargs, labels=torch.full((4, 9), -100)).loss
    assert loss == 0
    assert not any(g.any() for g in gradients_of(model, loss).values())


def test_next_sentence_labels_are_needed_for_a_loss_as_in_transformers():
    model = accelerate(tiny("Bert", "ForPreTraining"))
    out = model(**make_inputs("Bert").kwargs, labels=torch.zeros(4, 9, dtype=torch.long))
    assert out.loss is None


@pytest.mark.parametrize("unpad", [True, False])
def test_padding_is_computed_where_it_is_asked_for(unpad):
    model = tiny("Bert")
    inputs = make_inputs("Bert")
    with torch.no_grad():
        baseline = model(**inputs.kwargs).last_hidden_state
        reference = double(model)(**inputs.kwargs).last_hidden_state
        out = accelerate(model, unpad=unpad)(**inputs.kwargs).last_hidden_state
    padding = ~inputs.attended
    padding[:, 0] = False
    if unpad:
        assert not out[padding].any()
    else:
        assert_no_worse(out, reference, baseline, kind="model", name="padding")


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_embeddings_and_positions_that_are_given(family):
    model = tiny(family)
    inputs = make_inputs(family)
    kwargs = {k: v for k, v in inputs.kwargs.items() if k != "input_ids"}
    embeds = torch.randn(4, 9, 32)
    fast = accelerate(copy.deepcopy(model))
    for more in ({}, {"position_ids": torch.arange(9).flip(0).unsqueeze(0) + 2}):
        runs = []
        for m in (double(model), model, fast):
            given = embeds.detach().clone().to(m.dtype).requires_grad_()
            out = m(inputs_embeds=given, **kwargs, **more).last_hidden_state[inputs.attended]
            weighed(out).backward()
            runs.append((out.detach(), given.grad))
        for reference, baseline, got in zip(*runs, strict=True):
            assert_no_worse(got, reference, baseline, kind="model", name=f"{family} embeds")


def test_roberta_pads_that_are_attended_train_no_position():
    """Without a mask they count as tokens; the row of their position still has no gradient."""
    model = tiny("Roberta")
    ids = torch.tensor([[5, 6, 1, 1], [7, 8, 9, 1]])
    runs = []
    for m in (double(model), model, accelerate(copy.deepcopy(model))):
        out = m(ids).last_hidden_state
        runs.append(gradients_of(m, weighed(out)))
    check_gradients(runs[2], runs[0], runs[1], "attended pads")
    assert not runs[2]["embeddings.position_embeddings.weight"][1].any()


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_activations(activation):
    model = tiny("Bert", hidden_act=activation)
    kwargs = make_inputs("Bert", "none").kwargs
    with torch.no_grad():
        reference, baseline = double(model)(**kwargs)[0], model(**kwargs)[0]
        out = accelerate(model)(**kwargs)[0]
    assert_no_worse(out, reference, baseline, kind="model", name=activation)


# Dropout


class _Dropped(nn.Module):
    """Stands for an ``nn.Dropout`` in a reference: drops what bertfast's mask drops."""

    def __init__(self, p, seed, site):
        super().__init__()
        self.p, self.seed, self.site = p, seed, site

    def forward(self, x):
        threshold = dropout_threshold(self.p)
        rows = torch.arange(x.shape[0] * x.shape[1])
        keep = keep_mask(self.seed, self.site, rows, x.shape[-1], threshold).view(x.shape)
        return x * keep * dropout_scale(threshold)


def _eager_attention(module, query, key, value, attention_mask, scaling, dropout, **_):
    """transformers' eager attention with bertfast's mask; every sequence is at full length."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
    if dropout:
        batch, heads, length, _ = query.shape
        threshold = dropout_threshold(dropout)
        rows = torch.arange(batch * length * heads)
        keep = attention_keep_mask(module.seed, module.site, rows, length, threshold)
        keep = keep.view(batch, length, heads, length).transpose(1, 2)
        weights = weights * keep * dropout_scale(threshold)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def with_masks_of(model, seed):
    """A copy of a base model in which everything is dropped as bertfast drops it."""
    transformers.AttentionInterface.register("bertfast-test-eager", _eager_attention)
    model = copy.deepcopy(model)
    model.set_attn_implementation("bertfast-test-eager")
    p = model.embeddings.dropout.p
    model.embeddings.dropout = _Dropped(p, seed, 0)
    encoder = getattr(model, "encoder", None) or model.transformer
    for index, layer in enumerate(encoder.layer):
        part = getattr(layer.attention, "self", layer.attention)
        part.seed, part.site = seed, 1 + 3 * index
        if hasattr(layer, "ffn"):
            layer.ffn.dropout = _Dropped(p, seed, 3 + 3 * index)
        else:
            layer.attention.output.dropout = _Dropped(p, seed, 2 + 3 * index)
            layer.output.dropout = _Dropped(p, seed, 3 + 3 * index)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_training_drops_by_the_one_mask(family):
    model = tiny(family, dropout=0.3).train()
    kwargs = make_inputs(family, "none").kwargs
    torch.manual_seed(3)
    peer = with_masks_of(model, draw_seed())
    torch.manual_seed(3)
    runs = []
    for m in (double_of(peer), peer, accelerate(model)):
        out = m(**kwargs).last_hidden_state
        runs.append((out.detach(), gradients_of(m, weighed(out))))
    (reference, expected), (baseline, theirs), (out, got) = runs
    assert_no_worse(out, reference, baseline, kind="model", name=f"{family} dropout")
    check_gradients(got, expected, theirs, f"{family} dropout")


def double_of(model):
    return copy.deepcopy(model).double()


def test_a_seed_repeats_a_step_and_no_other_does():
    model = accelerate(tiny("Bert", "ForMaskedLM", dropout=0.2)).train()
    kwargs = make_inputs("Bert").kwargs
    kwargs["labels"] = kwargs["input_ids"]
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        out = model(**kwargs)
        runs.append((out.logits, gradients_of(model, out.loss)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(g, runs[1][1][name]) for name, g in runs[0][1].items())
    assert not torch.equal(runs[0][0], runs[2][0])
    state = torch.get_rng_state()
    assert not torch.equal(model(**kwargs).logits, model(**kwargs).logits)
    assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_is_read_when_it_is_needed():
    model = accelerate(tiny("Bert", dropout=0.2))
    kwargs = make_inputs("Bert").kwargs
    state = torch.get_rng_state()
    with torch.no_grad():
        evaluated = model(**kwargs)[0]
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
        model.train()
        assert not torch.equal(model(**kwargs)[0], evaluated)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(model(**kwargs)[0], evaluated)
        model.embeddings.dropout.p = 0.5
        assert not torch.equal(model(**kwargs)[0], evaluated)
        assert torch.equal(model.eval()(**kwargs)[0], evaluated)


def test_it_is_bertfasts_own_model_bit_by_bit(tmp_path):
    """On a padded batch with dropout: one seed from the same generator, the same sites and rows."""
    theirs = tiny("Bert", dropout=0.1)
    theirs.save_pretrained(tmp_path)
    ours = bertfast.BertModel.from_pretrained(tmp_path).train()
    kwargs = make_inputs("Bert").kwargs
    torch.manual_seed(4)
    expected = ours(**kwargs)
    torch.manual_seed(4)
    out = accelerate(theirs).train()(**kwargs)
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)


# The instance, and what is around it


def test_parameters_are_the_same_objects_under_the_same_names():
    model = tiny("Bert", "ForPreTraining")
    before, state = dict(model.named_parameters()), list(model.state_dict())
    modules = {name: type(m).__name__ for name, m in model.named_modules()}
    assert accelerate(model) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert list(model.state_dict()) == state
    assert {name: type(m).__name__ for name, m in model.named_modules()} == modules
    assert isinstance(model, transformers.BertForPreTraining)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_back_what_was_there_bit_by_bit(family):
    model = tiny(family, "ForMaskedLM")
    inputs = make_inputs(family)
    kwargs = inputs.kwargs | {"labels": inputs.kwargs["input_ids"], "output_hidden_states": True}
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    out = model(**kwargs)
    expected = gradients_of(model, out.loss)
    accelerate(model)
    gradients_of(model, model(**kwargs).loss)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes or model.base_model
    again = model(**kwargs)
    assert torch.equal(again.logits, out.logits) and torch.equal(again.loss, out.loss)
    for key, gradient in gradients_of(model, again.loss).items():
        assert torch.equal(gradient, expected[key]), key


def test_only_the_instance_is_changed():
    """Also where two models share one config object."""
    config = transformers.BertConfig(**CONFIGS["Bert"])
    one, other = (transformers.BertModel(config).eval() for _ in range(2))
    kwargs = make_inputs("Bert").kwargs
    with torch.no_grad():
        expected = other(**kwargs)[0]
        accelerate(one)
        assert torch.equal(other(**kwargs)[0], expected)
    assert type(other) is transformers.BertModel
    assert config._attn_implementation == "sdpa"
    assert type(transformers.BertModel(config)) is transformers.BertModel


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(family, how):
    model = accelerate(tiny(family, "ForMaskedLM"), output_logits=False)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    kwargs = make_inputs(family).kwargs
    with torch.no_grad():
        expected = model(**kwargs).logits
        assert torch.equal(copied(**kwargs).logits, expected)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(**kwargs).logits, expected)
    kwargs["labels"] = kwargs["input_ids"]
    assert copied.train()(**kwargs).logits is None
    restore(copied)
    assert model.train()(**kwargs).logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_transformers_own(family, tmp_path):
    model = accelerate(tiny(family, "ForMaskedLM"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is getattr(transformers, f"{family}ForMaskedLM")
    assert loaded.config.architectures == [f"{family}ForMaskedLM"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    kwargs = make_inputs(family, "none").kwargs
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**kwargs).logits, model(**kwargs).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_gradient_checkpointing_changes_no_bit(family, reentrant):
    model = accelerate(tiny(family, "ForMaskedLM", dropout=0.1)).train()
    kwargs = make_inputs(family).kwargs
    kwargs["labels"] = kwargs["input_ids"]
    torch.manual_seed(5)
    expected = gradients_of(model, model(**kwargs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = (getattr(model.base_model, "encoder", None) or model.base_model.transformer).layer[0]
    original = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or original(*a, **k)
    torch.manual_seed(5)
    got = gradients_of(model, model(**kwargs).loss)
    assert calls
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_gradient_checkpointing_obeys_the_choice_of_a_backend(monkeypatch):
    model = accelerate(tiny("Bert")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = set()
    choose = bertfast.backends._insist
    monkeypatch.setattr(bertfast.backends, "_insist", lambda *a: seen.add(a[2]) or choose(*a))
    monkeypatch.setattr(bertfast.backends, "_passed_over", lambda *a: pytest.fail(f"chose {a}"))
    with bertfast.backend("reference"):
        out = model(**make_inputs("Bert").kwargs)[0].sum()
    out.backward()
    assert seen == {"reference"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast(family):
    model = tiny(family)
    inputs = make_inputs(family)
    reference = double(model)(**inputs.kwargs)[0][inputs.attended]
    fast = accelerate(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        baseline, out = model(**inputs.kwargs)[0], fast(**inputs.kwargs)[0]
    # ELECTRA projects its embeddings: what is linear comes in bfloat16.
    assert out.dtype == baseline.dtype
    assert out.dtype == (torch.bfloat16 if family == "Electra" else torch.float32)
    assert_no_worse(
        out[inputs.attended].bfloat16(),
        reference,
        baseline[inputs.attended].bfloat16(),
        kind="model",
        name=f"{family} autocast",
    )
    half = copy.deepcopy(fast).bfloat16()
    with torch.no_grad():
        assert half(**inputs.kwargs)[0].dtype == torch.bfloat16


def test_training_under_bfloat16_autocast():
    model = tiny("Bert", "ForMaskedLM").train()
    kwargs = make_inputs("Bert").kwargs
    kwargs["labels"] = kwargs["input_ids"].masked_fill(kwargs["attention_mask"] == 0, -100)
    runs = []
    for m in (model, accelerate(copy.deepcopy(model))):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(**kwargs)
        runs.append((out, gradients_of(m, out.loss)))
    exact = double(model)
    reference = exact(**kwargs)
    expected = gradients_of(exact, reference.loss)
    (peer, baseline), (out, got) = runs
    assert (out.loss.dtype, out.logits.dtype) == (peer.loss.dtype, peer.logits.dtype)
    torch.testing.assert_close(out.loss.double(), reference.loss, rtol=0.02, atol=0)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    got, baseline = ({k: g.bfloat16() for k, g in x.items()} for x in (got, baseline))
    check_gradients(got, expected, baseline, "autocast")


# What transformers asks of a model


def test_attentions_come_from_transformers():
    model = tiny("Bert", attn_implementation="eager")
    kwargs = make_inputs("Bert").kwargs | {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**kwargs)
        out = accelerate(model)(**kwargs)
    assert len(out.attentions) == 2
    for name in ("attentions", "hidden_states"):
        assert all(map(torch.equal, out[name], expected[name]))


def test_masks_per_query_and_chosen_hidden_states_are_transformers_too():
    model = tiny("Bert")
    kwargs = make_inputs("Bert", "none").kwargs
    mask = torch.ones(4, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(**kwargs, attention_mask=mask)[0]
        chosen = model(**kwargs, output_hidden_states=[1]).hidden_states
        accelerate(model)
        assert torch.equal(model(**kwargs, attention_mask=mask)[0], expected)
        got = model(**kwargs, output_hidden_states=[1]).hidden_states
    assert got[0] is chosen[0] is None
    assert torch.equal(got[1], chosen[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_and_what_the_config_asks_for(family):
    model = tiny(family, "ForSequenceClassification")
    model.config.output_hidden_states = True
    kwargs = make_inputs(family).kwargs | {"labels": torch.arange(4) % 2, "return_dict": False}
    with torch.no_grad():
        expected, out = model(**kwargs), accelerate(model)(**kwargs)
    assert isinstance(out, tuple) and len(out) == len(expected) == 3
    torch.testing.assert_close(out[:2], expected[:2])
    assert len(out[2]) == len(expected[2]) == 3
    model.config.return_dict = False
    with torch.no_grad():
        assert isinstance(model.base_model(make_inputs(family).kwargs["input_ids"]), tuple)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_the_word_gradient(family):
    """Also not of the word table, of which so many tokens read one row that the order in which
    their gradients are summed shows; checkpointing hooks the table."""
    fast = accelerate(tiny(family)).train()
    ids = torch.full((24, 12), 7)
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            fast.gradient_checkpointing_enable()
            assert fast.get_input_embeddings()._forward_hooks
        fast.zero_grad()
        torch.manual_seed(0)
        weighed(fast(ids)[0]).backward()
        runs.append({n: p.grad.clone() for n, p in fast.named_parameters() if p.grad is not None})
    assert runs[0].keys() == runs[1].keys()
    for name, gradient in runs[0].items():
        assert torch.equal(gradient, runs[1][name]), name


def test_hooks_and_replaced_linear_layers_are_called():
    """As adapters do it: a wrapper around a layer, and a hook that makes embeddings trainable."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.more = nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.more(x)

    model = tiny("Bert").requires_grad_(False)
    layer = model.encoder.layer[0]
    layer.attention.self.query = Adapter(layer.attention.self.query)
    layer.intermediate.dense = Adapter(layer.intermediate.dense)
    layer.output.dense = Adapter(layer.output.dense)
    model.enable_input_require_grads()
    inputs = make_inputs("Bert")
    runs = []
    for m in (double(model), model, accelerate(copy.deepcopy(model))):
        out = m(**inputs.kwargs)[0][inputs.attended]
        runs.append((out.detach(), gradients_of(m, weighed(out))))
    assert len(runs[0][1]) == 6
    assert_no_worse(runs[2][0], runs[0][0], runs[1][0], kind="model", name="adapters")
    check_gradients(runs[2][1], runs[0][1], runs[1][1], "adapters")
    seen = []
    fast = accelerate(model)
    fast.encoder.layer[1].register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    fast.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *a: seen.append("dense"))
    fast(**inputs.kwargs)
    assert seen == ["dense", (int(inputs.attended.sum()), 32)]


def _hundredth(out):
    return tuple(x * 0.01 for x in out) if isinstance(out, tuple) else out * 0.01


def _scale(model, path):
    """Put a part of a subclass, whose outputs are a hundredth, in the place of a part."""
    parent, _, name = path.rpartition(".")
    part = model.get_submodule(path)

    class Scaled(type(part)):
        def forward(self, *args, **kwargs):
            return _hundredth(super().forward(*args, **kwargs))

    part = copy.deepcopy(part)
    part.__class__ = Scaled
    setattr(model.get_submodule(parent), name, part)
    model.tie_weights()


HEAD_PARTS = [
    ("BertForMaskedLM", "cls"),
    ("BertForMaskedLM", "cls.predictions"),
    ("BertForMaskedLM", "cls.predictions.transform"),
    ("BertForPreTraining", "cls"),
    ("BertForPreTraining", "cls.predictions"),
    ("RobertaForMaskedLM", "lm_head"),
    ("XLMRobertaForMaskedLM", "lm_head"),
    ("ElectraForMaskedLM", "generator_predictions"),
    ("DistilBertForMaskedLM", "vocab_transform"),
    ("DistilBertForMaskedLM", "vocab_layer_norm"),
    ("DistilBertForMaskedLM", "vocab_projector"),
    ("DistilBertForMaskedLM", "mlm_loss_fct"),
]


@pytest.mark.parametrize(("cls", "path"), HEAD_PARTS)
def test_replaced_or_hooked_parts_of_a_head_are_called(cls, path):
    family, _, head = cls.partition("For")
    model = tiny(family, f"For{head}")
    kwargs = make_inputs(family, "none").kwargs
    kwargs["labels"] = kwargs["input_ids"]
    if head == "PreTraining":
        kwargs["next_sentence_label"] = torch.arange(4) % 2
    plain = accelerate(copy.deepcopy(model))
    hooked = copy.deepcopy(plain)
    hooked.get_submodule(path).register_forward_hook(lambda m, args, out: _hundredth(out))
    _scale(model, path)
    scaled = accelerate(copy.deepcopy(model), output_logits=False).train()
    with torch.no_grad():
        expected, before = model(**kwargs), plain(**kwargs)
        for m in (hooked, scaled):
            out = m(**kwargs)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-5)
            # DistilBERT's transform is called on labelled tokens alone: then there are no logits.
            for ours, theirs in zip(out.to_tuple()[1:], expected.to_tuple()[1:], strict=False):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.loss, expected.loss, rtol=1e-3)


def test_all_hooks_on_activations_are_called():
    model = accelerate(tiny("Bert")).train()
    seen = []
    activation = model.encoder.layer[0].intermediate.intermediate_act_fn
    activation.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(**make_inputs("Bert").kwargs)[0].sum().backward()
    assert seen == ["backward"]


def test_a_head_of_another_kind_is_called():
    model = tiny("Bert", "ForMaskedLM")
    model.cls = nn.Linear(32, 53)
    kwargs = make_inputs("Bert", "none").kwargs
    kwargs["labels"] = kwargs["input_ids"]
    with torch.no_grad():
        expected, out = model(**kwargs), accelerate(model)(**kwargs)
    torch.testing.assert_close(tuple(out.values()), tuple(expected.values()), rtol=1e-4, atol=1e-4)


def test_the_loss_of_distilbert_may_be_another():
    model = tiny("DistilBert", "ForMaskedLM")
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.5)
    kwargs = make_inputs("DistilBert", "none").kwargs
    kwargs["labels"] = kwargs["input_ids"]
    with torch.no_grad():
        expected, out = model(**kwargs).loss, accelerate(model)(**kwargs).loss
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_layers_that_are_one(family):
    model = tiny(family, "ForMaskedLM").train()
    layers = (getattr(model.base_model, "encoder", None) or model.base_model.transformer).layer
    layers[1] = layers[0]
    kwargs = make_inputs(family).kwargs
    kwargs["labels"] = kwargs["input_ids"].masked_fill(kwargs["attention_mask"] == 0, -100)
    expected, classes = model(**kwargs).loss, [type(m) for m in model.modules()]
    runs = []
    for m in (double(model), copy.deepcopy(model), accelerate(model)):
        out = m(**kwargs)
        runs.append((out.loss.detach(), gradients_of(m, out.loss)))
    torch.testing.assert_close(runs[2][0].double(), runs[0][0], rtol=1e-5, atol=0)
    check_gradients(runs[2][1], runs[0][1], runs[1][1], "one layer twice")
    restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**kwargs).loss, expected)


def test_an_error_changes_nothing(monkeypatch):
    model = tiny("Bert", "ForMaskedLM")
    classes = [type(m) for m in model.modules()]

    def refuse(cls):
        if cls is transformers.BertForMaskedLM:
            raise TypeError("no class")
        return accelerated_class(cls)

    monkeypatch.setattr(_accelerate, "accelerated_class", refuse)
    with pytest.raises(TypeError, match="no class"):
        accelerate(model)
    assert [type(m) for m in model.modules()] == classes


def test_another_layernorm_is_called_and_a_dropout_may_be_gone():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny("Bert")
    model.encoder.layer[0].output.dropout = nn.Identity()
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
    for norms in (model.embeddings, model.encoder.layer[1].output):
        replaced = Doubled(32)
        replaced.load_state_dict(norms.LayerNorm.state_dict())
        norms.LayerNorm = replaced
    kwargs = make_inputs("Bert", "none").kwargs
    with torch.no_grad():
        expected, out = model.train()(**kwargs)[0], accelerate(model)(**kwargs)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_module_that_holds_models():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = tiny("Bert"), tiny("DistilBert")

    pair = Two()
    kwargs = make_inputs("DistilBert").kwargs
    with torch.no_grad():
        expected = pair.left(**kwargs)[0], pair.right(**kwargs)[0]
        accelerate(pair)
        got = pair.left(**kwargs)[0], pair.right(**kwargs)[0]
    attended = kwargs["attention_mask"].bool()
    for a, b in zip(got, expected, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a[attended], b[attended], rtol=1e-4, atol=1e-4)
    restore(pair)
    assert type(pair.left) is transformers.BertModel


def test_compiled():
    model = tiny("Bert")
    fast = accelerate(copy.deepcopy(model))
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        for mask in ("right", "none", "left"):
            kwargs = make_inputs("Bert", mask).kwargs
            assert torch.equal(compiled(**kwargs)[0], fast(**kwargs)[0])


def test_traced_by_transformers_own_code():
    model = accelerate(tiny("Bert", return_dict=False))
    kwargs = make_inputs("Bert", "right").kwargs
    example = kwargs["input_ids"], kwargs["attention_mask"]
    with torch.no_grad():
        traced = torch.jit.trace(model, example)
        mask = torch.ones_like(example[1])  # another mask than it was traced with
        expected = restore(model)(example[0], mask)[0]
        torch.testing.assert_close(traced(example[0], mask)[0], expected)


def test_recorded_by_transformers_own_code():
    model = accelerate(tiny("Bert", return_dict=False))
    ids = make_inputs("Bert", "none").kwargs["input_ids"]
    with torch.no_grad():
        graph = make_fx(lambda ids: model(ids)[0])(ids)
        names = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        assert not any("bertfast" in str(name) for name in names)
        torch.testing.assert_close(graph(ids.flip(0)), restore(model)(ids.flip(0))[0])


def test_empty_batches():
    model = accelerate(tiny("Bert"))
    assert model(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.shape == (0, 5, 32)
    ids = torch.full((2, 5), 7)
    out = model(ids, attention_mask=torch.zeros(2, 5, dtype=torch.long))
    assert not out.last_hidden_state.any()


def test_minilm_gives_the_same_vectors(minilm):
    """A real model on real sentences of different lengths."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm / "tokenizer.json"), pad_token="[PAD]"
    )
    sentences = bertfast.data.builtin_documents()[0][:12]
    kwargs = tokenizer(sentences, padding=True, return_tensors="pt")
    assert not kwargs["attention_mask"].all()
    model = transformers.BertModel.from_pretrained(minilm).eval()

    def vectors():
        with torch.no_grad():
            hidden = model(**kwargs).last_hidden_state
        mask = kwargs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1))

    expected = vectors()
    accelerate(model)
    got = vectors()
    assert not torch.equal(got, expected)
    assert (got - expected).abs().max() < 1e-5
    restore(model)
    model.set_attn_implementation("bertfast")
    assert (vectors() - expected).abs().max() < 1e-5


# Bad input


def test_unknown_models_are_named():
    gpt2 = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4)
    with pytest.raises(TypeError, match=r"model: expected one of BertModel, .*got GPT2LMHeadModel"):
        accelerate(transformers.GPT2LMHeadModel(gpt2))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        accelerate("bert-base-uncased")
    with pytest.raises(TypeError, match="unpad: expected a bool or None, got int"):
        accelerate(tiny("Bert"), unpad=1)
    with pytest.raises(TypeError, match="output_logits: expected a bool, got NoneType"):
        accelerate(tiny("Bert"), output_logits=None)


def test_twice_is_once_too_often():
    model = tiny("Bert", "ForMaskedLM")
    with pytest.raises(ValueError, match="model: expected an accelerated model, got BertForMask"):
        restore(model)
    accelerate(model)
    with pytest.raises(ValueError, match=r"model\.bert: expected .* it is accelerated"):
        accelerate(model)


def _share(model):
    model.encoder.layer[1] = accelerate(tiny("Bert")).encoder.layer[1]
    return model


def _subclass(model):
    class Mine(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return Mine(model.config)


def _replace(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module(model))
        return model

    return change


def _configure(**options):
    def change(model):
        for name, value in options.items():
            setattr(model.config, name, value)
        return model

    return change


def _patch(model):
    layer = model.encoder.layer[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def _dispatch(model):
    model.encoder._hf_hook = object()
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_subclass, TypeError, "model: expected BertModel's forward, got that of Mine"),
        (
            _replace("encoder.layer.1.attention.self", lambda model: nn.Identity()),
            TypeError,
            r"model\.encoder\.layer\.1\.attention\.self: expected BertSelfAttention, got Identity",
        ),
        (
            _replace("encoder.layer.0.output.dropout", lambda model: nn.AlphaDropout(0.1)),
            TypeError,
            r"model\.encoder\.layer\.0\.output\.dropout: expected an nn\.Dropout, got AlphaDrop",
        ),
        (_share, ValueError, r"model\.encoder\.layer\.1: expected a layer as .* accelerated"),
        (_patch, TypeError, r"model\.encoder\.layer\.1: expected BertLayer's forward"),
        (_configure(is_decoder=True), ValueError, r"config\.is_decoder: expected False, got True"),
        (
            _configure(chunk_size_feed_forward=4),
            ValueError,
            r"config\.chunk_size_feed_forward: expected 0, got 4",
        ),
        (
            _configure(position_embedding_type="relative_key"),
            ValueError,
            r"position_embedding_type: expected 'absolute', got 'relative_key'",
        ),
        (_dispatch, ValueError, "expected a model on one device"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(change, error, message):
    model = change(tiny("Bert"))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        accelerate(model)
    assert [type(m) for m in model.modules()] == classes  # nothing is half done


def test_a_decoder_with_cross_attention_is_refused():
    model = tiny("Bert", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match=r"config\.is_decoder"):
        accelerate(model)


def test_what_was_wrapped_afterwards_is_not_restored():
    model = accelerate(tiny("Bert"))
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"model: its forward or class was wrapped after"):
        restore(model)
    del model.forward
    restore(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(4, 8)}, r"attention_mask: expected shape \(4, 9\), got"),
        ({"position_ids": torch.zeros(3, 9).long()}, r"position_ids: expected shape \(4, 9\)"),
        ({"token_type_ids": torch.zeros(4, 8).long()}, r"token_type_ids: expected shape \(4, 9\)"),
        ({"input_ids": torch.full((4, 9), 53)}, "input_ids: expected values from 0 to 52, got 53"),
        ({"input_ids": None}, "You must specify exactly one of input_ids or inputs_embeds"),
    ],
)
def test_bad_input(changes, message):
    model = accelerate(tiny("Bert"))
    with pytest.raises(ValueError, match=message):
        model(**{**make_inputs("Bert", "none").kwargs, **changes})


def test_bad_labels():
    model = accelerate(tiny("Bert", "ForMaskedLM"))
    kwargs = make_inputs("Bert").kwargs
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 9\), got \(4, 8\)"):
        model(**kwargs, labels=torch.zeros(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="labels: expected values from 0 to 52"):
        model(**kwargs, labels=torch.full((4, 9), 53))
