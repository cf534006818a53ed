"""Dropout, checkpointing, copies, threads, resizing: what a model does between its weights."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune

import bertfast
from bertfast import backends

from .conftest import DTYPE, assert_close

DROPPING = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return bertfast.BertForPreTraining(tiny_config(**DROPPING)).to(DTYPE)


@pytest.fixture
def step(make_inputs):
    """``step(model, **more)``: loss and gradients of one forward and backward."""

    def run(model, **more):
        inputs = make_inputs(model.config, "right", rows=4)
        labels = inputs.kwargs["input_ids"].masked_fill(~inputs.attended, -100)
        labels[:, ::3] = -100
        labels[1, 0] = 1
        model.zero_grad()
        next_sentence = torch.tensor([0, 1, 0, 1])
        out = model(**inputs.kwargs, labels=labels, next_sentence_label=next_sentence, **more)
        out.loss.backward()
        return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    return run


def same(a, b):
    return a[0].equal(b[0]) and all(a[1][name].equal(b[1][name]) for name in a[1])


def test_the_seed_is_the_whole_state_of_dropout(model, step):
    first = step(model, seed=3)
    assert same(first, step(model, seed=3))
    assert same(first, step(model, seed=torch.tensor([3])))
    losses = {step(model, seed=seed)[0].item() for seed in (4, -3, 3 + 2**32, 2**63 - 1)}
    assert len({first[0].item(), *losses}) == 5  # all 64 bits count


def test_without_a_seed_the_cpu_generator_decides(model, step):
    torch.manual_seed(5)
    first, second = step(model), step(model)
    assert not same(first, second)
    torch.manual_seed(5)
    assert same(first, step(model))
    state = torch.get_rng_state()
    step(model, seed=1)
    step(model.eval())
    assert state.equal(torch.get_rng_state())  # nothing is drawn that is not needed


def test_eval_has_no_dropout_and_train_gets_it_back(model, step):
    dropped = step(model, seed=1)
    clean = step(model.eval(), seed=1)
    assert same(clean, step(model, seed=2))
    assert not same(clean, dropped)
    assert same(dropped, step(model.train(), seed=1))


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_probability_reaches_its_place(where, tiny_config, step):
    off = dict.fromkeys(DROPPING, 0.0)
    torch.manual_seed(0)
    clean = bertfast.BertForPreTraining(tiny_config(**off)).to(DTYPE)
    torch.manual_seed(0)
    dropping = bertfast.BertForPreTraining(tiny_config(**{**off, where: 0.5})).to(DTYPE)
    state = torch.get_rng_state()
    reference = step(clean)
    assert state.equal(torch.get_rng_state())
    assert same(reference, step(dropping.eval()))
    assert not same(reference, step(dropping.train(), seed=1))


def test_full_dropout_is_finite(tiny_config, step):
    config = tiny_config(hidden_dropout_prob=1.0, attention_probs_dropout_prob=1.0)
    loss, gradients = step(bertfast.BertForPreTraining(config))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


def test_every_dropout_of_the_model_is_where_the_reference_puts_it(tiny_config):
    """One layer in plain torch with the masks of the contract, site by site."""
    from bertfast.masks import attention_keep_mask, dropout_scale, keep_mask
    from bertfast.masks import dropout_threshold as threshold_of

    config = tiny_config(num_hidden_layers=2, num_labels=3, classifier_dropout=0.4, **DROPPING)
    torch.manual_seed(0)
    model = bertfast.BertForTokenClassification(config).to(DTYPE)
    seed, ids, tokens = torch.tensor([11]), torch.randint(37, (2, 5)), torch.arange(10)
    got = model(ids, seed=seed).logits

    def drop(x, p, site):
        t = threshold_of(p)
        return x * keep_mask(seed, site, tokens, x.shape[1], t) * dropout_scale(t)

    bert = model.bert
    e = bert.embeddings
    positions = torch.arange(5).repeat(2)
    x = e.word_embeddings(ids.flatten()) + e.position_embeddings(positions)
    x = drop(e.LayerNorm(x + e.token_type_embeddings.weight[0]), 0.3, 0)
    for i, layer in enumerate(bert.encoder.layer):
        a, t = layer.attention.self, threshold_of(0.2)
        q, k, v = (p(x).reshape(2, 5, 3, 8).transpose(1, 2) for p in (a.query, a.key, a.value))
        p = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
        keep = attention_keep_mask(seed, 1 + 3 * i, torch.arange(30), 5, t)
        p = p * keep.reshape(2, 5, 3, 5).transpose(1, 2) * dropout_scale(t)
        context = (p @ v).transpose(1, 2).reshape(10, 24)
        out = layer.attention.output
        x = out.LayerNorm(drop(out.dense(context), 0.3, 2 + 3 * i) + x)
        wide = torch.nn.functional.gelu(layer.intermediate.dense(x))
        x = layer.output.LayerNorm(drop(layer.output.dense(wide), 0.3, 3 + 3 * i) + x)
    expected = model.classifier(drop(x, 0.4, 0xFFFF0000)).reshape(2, 5, 3)
    assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMultipleChoice"])
def test_pooled_heads_drop_out(name, tiny_config):
    config = tiny_config(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.5
    )
    model = getattr(bertfast, name)(config).to(DTYPE)
    ids = torch.randint(37, (2, 5)) if "Choice" not in name else torch.randint(37, (2, 2, 5))
    a, b = model(ids, seed=1).logits, model(ids, seed=2).logits
    assert not a.equal(b)
    assert a.equal(model(ids, seed=1).logits)
    clean = model.eval()(ids).logits
    assert clean.equal(model(ids, seed=2).logits)


def test_given_vectors_get_the_mask_of_their_ids(tiny_config):
    model = bertfast.BertModel(tiny_config(**DROPPING)).to(DTYPE)
    ids = torch.randint(37, (2, 5))
    vectors = model.get_input_embeddings()(ids)
    a = model(ids, seed=9).last_hidden_state
    assert a.equal(model(inputs_embeds=vectors, seed=9).last_hidden_state)


def test_gradient_checkpointing_changes_no_bit(model, step):
    plain = step(model, seed=2)
    model.gradient_checkpointing_enable()
    calls = []
    # A hook before, not after: recomputation stops as soon as it has the last saved tensor.
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert same(plain, step(model, seed=2))
    assert len(calls) == 2  # once forward, once again in backward
    torch.manual_seed(0)
    first = step(model)
    model.gradient_checkpointing_disable()
    torch.manual_seed(0)
    assert same(first, step(model))
    assert len(calls) == 5
    handle.remove()


def test_recomputation_runs_on_the_backend_of_its_forward(model, make_inputs):
    """Also when backward is called outside the ``with`` block that chose it."""
    inputs = make_inputs(model.config)
    model.gradient_checkpointing_enable()
    seen = []

    def note(*_):
        seen.append(bertfast.backends.current())

    model.bert.encoder.layer[0].register_forward_pre_hook(note)
    with bertfast.backend("reference"):
        loss = model(**inputs.kwargs).prediction_logits.square().mean()
    loss.backward()
    assert seen == ["reference", "reference"]


def test_asking_for_more_changes_nothing(model, make_inputs):
    kwargs = make_inputs(model.config).kwargs
    ask = {"output_attentions": True, "output_hidden_states": True}
    a, b = model(**kwargs, seed=1), model(**kwargs, seed=1, **ask)
    assert a.prediction_logits.equal(b.prediction_logits)
    assert b.hidden_states[-1].shape == (3, 9, 24)
    assert len(b.attentions) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(copied, model, step):
    other = copied(model)
    assert same(step(model, seed=1), step(other, seed=1))
    decoder = other.cls.predictions
    assert decoder.decoder.weight is other.get_input_embeddings().weight
    assert decoder.bias is decoder.decoder.bias
    assert other.config == model.config
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.any()


def test_outputs_pickle_and_index(model, make_inputs):
    out = model(**make_inputs(model.config).kwargs)
    logits, relationship = out.to_tuple()
    assert out[0] is logits is out["prediction_logits"] is out.prediction_logits
    assert out[-1] is relationship
    assert out[:1] == (logits,)
    assert len(out) == 2
    assert "loss" not in out
    # Names, as transformers' outputs give them.
    names = ["prediction_logits", "seq_relationship_logits"]
    assert [*out] == [*out.keys()] == [*dict(out)] == names
    assert [*out.values()][1] is relationship
    assert isinstance(out, dict)
    with pytest.raises(KeyError, match="prediction_logits, seq_relationship_logits; got 'loss'"):
        out["loss"]
    again = pickle.loads(pickle.dumps(model.eval()(**make_inputs(model.config).kwargs)))
    assert dict(again.items()).keys() == {"prediction_logits", "seq_relationship_logits"}


@pytest.mark.skipif(
    backends.current() == "triton", reason="Triton's interpreter takes one thread at a time"
)
def test_threads_do_not_disturb_each_other(model, make_inputs):
    inputs = [make_inputs(model.config, kind, seed=i) for i, kind in enumerate(["right", "holes"])]
    expected = [model(**i.kwargs, seed=4).prediction_logits.detach() for i in inputs]

    def work(index):
        for _ in range(5):
            out = model(**inputs[index].kwargs, seed=4).prediction_logits
            out.sum().backward()
            assert out.equal(expected[index])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, i % 2) for i in range(4)]:
            done.result()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [30, 50])
def test_resizing_keeps_rows_ties_and_predictions(count, tied, tiny_config, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(tie_word_embeddings=tied)
    model = bertfast.BertForMaskedLM(config).to(DTYPE).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    ids, kept = torch.randint(30, (2, 5)), min(count, 37)
    before = model(ids).logits
    table = model.resize_token_embeddings(count)
    assert table is model.get_input_embeddings()
    assert table.weight.shape == (count, 24)
    assert table.num_embeddings == model.config.vocab_size == model.bert.config.vocab_size == count
    assert config.vocab_size == 37  # another model may share it
    after = model(ids).logits
    assert after.shape == (2, 5, count)
    assert_close(after[..., :kept], before[..., :kept], rtol=1e-12, atol=1e-12)
    decoder = model.cls.predictions.decoder
    assert (decoder.weight is table.weight) == tied
    assert decoder.bias is model.cls.predictions.bias
    assert decoder.out_features == count
    if count > 37:
        for weight in (table.weight, decoder.weight, decoder.bias):
            old, new = weight.detach()[:37], weight.detach()[37:]
            off = (new - old.mean(0)) / old.std(0)
            assert 1e-5 < off.std() < 1e-4
            assert off.abs().max() < 5e-4
    model(ids, labels=ids).loss.backward()
    assert table.weight.grad.shape == (count, 24)
    model.save_pretrained(tmp_path)
    again = bertfast.BertForMaskedLM.from_pretrained(tmp_path)
    assert again(ids).logits.equal(model(ids).logits)


def test_new_rows_as_of_a_new_model(tiny_config):
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(tiny_config())
    torch.nn.init.normal_(model.cls.predictions.bias)
    table = model.resize_token_embeddings(60, mean_resizing=False)
    assert 0.3 < table.weight[37:].std() < 0.7
    assert table.weight[37].any()  # of which none is the padding's
    assert not model.cls.predictions.bias[37:].any()


def test_resizing_leaves_no_adapter_behind(tiny_config):
    model = bertfast.BertForMaskedLM(tiny_config())
    torch.nn.utils.prune.random_unstructured(model.get_input_embeddings(), "weight", 0.5)
    message = r"^resize_token_embeddings: expected a plain nn\.Embedding, got Embedding with hooks"
    with pytest.raises(TypeError, match=message):
        model.resize_token_embeddings(40)


def test_resizing_to_a_multiple(tiny_config):
    model = bertfast.BertModel(tiny_config())
    assert model.resize_token_embeddings(41, pad_to_multiple_of=16).weight.shape == (48, 24)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert not model.resize_token_embeddings(8).weight.requires_grad
    for value, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^new_num_tokens: expected"):
            model.resize_token_embeddings(value)
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings() is table
    assert model.resize_token_embeddings(pad_to_multiple_of=6).weight.shape == (12, 24)
    with pytest.raises(ValueError, match=r"^pad_to_multiple_of: expected at least 1, got 0"):
        model.resize_token_embeddings(8, pad_to_multiple_of=0)
    cut = bertfast.BertModel(tiny_config(pad_token_id=30))
    with pytest.raises(ValueError, match=r"^pad_token_id: expected an integer from 0 to 9, got 30"):
        cut.resize_token_embeddings(10)
    assert cut.get_input_embeddings().weight.shape[0] == 37


def test_fresh_weights(tiny_config):
    torch.manual_seed(0)
    model = bertfast.BertForPreTraining(tiny_config(initializer_range=0.02, hidden_size=48))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        else:
            n = parameter.numel()
            assert abs(parameter.mean()) < 5 * 0.02 / n**0.5, name
            assert abs(parameter.std() / 0.02 - 1) < 5 / (2 * n) ** 0.5 + 1 / 37, name
    assert not model.get_input_embeddings().weight[0].any()


# Where they are asked for by name, the native CPU kernels have no float16, and Triton's interpreter
# has no right bfloat16.
HALVES = {"cpu": [torch.bfloat16], "triton": [torch.float16]}.get(
    backends.current(), [torch.bfloat16, torch.float16]
)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_models_and_autocast(dtype, tiny_config, make_inputs):
    """A half model computes in its dtype, autocast in autocast's, losses in float32."""
    config = tiny_config(num_labels=3)
    inputs = make_inputs(config)
    labels = inputs.kwargs["input_ids"].masked_fill(~inputs.attended, -100)
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(config).eval()
    exact = model(**inputs.kwargs, labels=labels, output_logits=True)
    with torch.autocast("cpu", dtype=dtype):
        cast = model(**inputs.kwargs, labels=labels, output_logits=True, output_hidden_states=True)
    assert {h.dtype for h in cast.hidden_states} == {dtype}
    assert cast.logits.dtype == dtype
    cast.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.to(dtype)(**inputs.kwargs, labels=labels, output_logits=True)
    assert half.logits.dtype == dtype
    for out in (cast, half):
        assert out.loss.dtype == torch.float32
        # A few roundings of relative size eps on logits of this size.
        error = (out.logits.float() - exact.logits).abs().max() / exact.logits.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def test_compiles_in_one_graph_on_packed_input(tiny_config):
    model = bertfast.BertModel(tiny_config(**DROPPING))
    ids, cu_seqlens = torch.randint(37, (9,)), torch.tensor([0, 4, 9], dtype=torch.int32)
    kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": 5, "seed": torch.tensor([3])}
    expected = model(ids, **kwargs).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, **kwargs).last_hidden_state, expected, rtol=1e-5, atol=1e-5
    )


def test_dropout_is_what_the_model_was_built_with(model, step):
    """A config edited later changes no probability, and so leaves nothing without its seed."""
    expected = step(model, seed=1)
    for name in DROPPING:
        setattr(model.config, name, 0.0)
    assert same(expected, step(model, seed=1))
    step(model)


def test_a_part_in_training_mode_drops_out(model, step):
    clean = step(model.eval(), seed=1)
    model.bert.encoder.layer[0].train()
    dropped = step(model, seed=1)
    assert not same(clean, dropped)
    assert not same(dropped, step(model))  # a seed is drawn
    state = torch.get_rng_state()
    model.train().bert.eval()
    assert same(clean, step(model, seed=1))
    torch.set_rng_state(state)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_take_the_seed(device, tiny_config):
    model = bertfast.BertModel(tiny_config(**DROPPING))
    ids = torch.randint(37, (2, 5))
    expected = model(ids, seed=1).last_hidden_state
    with torch.device(device):
        assert model.dropout_seed(1, ids.device).item() == 1
        assert model.dropout_seed(None, ids.device).device.type == "cpu"
        got = model(ids, seed=1).last_hidden_state
    assert got.equal(expected)


def test_checkpointing_compiles(tiny_config):
    model = bertfast.BertModel(tiny_config(**DROPPING))
    ids, cu_seqlens = torch.randint(37, (9,)), torch.tensor([0, 4, 9], dtype=torch.int32)
    kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": 5, "seed": torch.tensor([3])}
    expected = []
    for compiled in (False, True):
        model.gradient_checkpointing_enable()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        model.zero_grad()
        run(ids, **kwargs).last_hidden_state.square().sum().backward()
        expected.append(model.encoder.layer[0].attention.self.query.weight.grad.clone())
    torch.testing.assert_close(*expected, rtol=1e-4, atol=1e-4)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_projections_are_called_as_modules(name, model, make_inputs):
    """So a wrapper around one, as LoRA's, and hooks on it have their say."""
    kwargs = make_inputs(model.config).kwargs
    model.eval()
    attention = model.bert.encoder.layer[0].attention.self
    plain = model(**kwargs).prediction_logits
    handle = getattr(attention, name).register_forward_hook(lambda *_: 2 * _[-1])
    hooked = model(**kwargs).prediction_logits
    handle.remove()
    wrapped = torch.nn.Sequential(getattr(attention, name), torch.nn.Tanh())
    setattr(attention, name, wrapped)
    replaced = model(**kwargs).prediction_logits
    assert not hooked.equal(plain)
    assert not replaced.equal(plain)
    assert not replaced.equal(hooked)


def test_a_parametrized_linear_is_read_as_parametrized(model, make_inputs):
    kwargs = make_inputs(model.config).kwargs
    model.eval()
    query = model.bert.encoder.layer[0].attention.self.query
    plain = model(**kwargs).prediction_logits
    torch.nn.utils.parametrize.register_parametrization(query, "weight", Doubled())
    parametrized = model(**kwargs).prediction_logits
    torch.nn.utils.parametrize.remove_parametrizations(query, "weight")
    assert not parametrized.equal(plain)
    assert parametrized.equal(model(**kwargs).prediction_logits)
