"""``attn_implementation="bertfast"`` in encoders, decoders and models that have both."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

from bertfast.integrations import _attention
from bertfast.integrations.transformers import attention, mask
from bertfast.masks import attention_keep_mask, dropout_scale, dropout_threshold
from bertfast.model.base import draw_seed
from bertfast.testing import assert_no_worse

from .conftest import FAMILIES, MASKS, double, make_inputs, tiny

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")

SMALL = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4}


def with_bertfast(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("bertfast")
    return model


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_give_the_same_everywhere(family, kind):
    """On padding, too: its queries are computed, as transformers computes them."""
    model = tiny(family, "ForTokenClassification")
    inputs = make_inputs(family, kind)
    with torch.no_grad():
        reference = double(model)(**inputs.kwargs).logits
        baseline, out = model(**inputs.kwargs).logits, with_bertfast(model)(**inputs.kwargs).logits
    assert out.isfinite().all()
    rows = inputs.attended.any(1)  # a row that is all padding has nothing to attend to
    assert_no_worse(out[rows], reference[rows], baseline[rows], kind="model", name=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    model = tiny(family, "ForTokenClassification")
    inputs = make_inputs(family)
    labels = (inputs.kwargs["input_ids"] % 2).masked_fill(~inputs.attended, -100)
    gradients = []
    for m in (double(model), with_bertfast(double(model))):
        m(**inputs.kwargs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


def test_the_mask_is_packed_once_per_forward(monkeypatch):
    model = with_bertfast(tiny("Bert"))
    calls = []
    pack = _attention._pack
    monkeypatch.setattr(_attention, "_pack", lambda *a: calls.append(a) or pack(*a))
    model(**make_inputs("Bert").kwargs)
    assert len(calls) == 1


def test_a_model_is_loaded_with_it(tmp_path):
    tiny("Bert").save_pretrained(tmp_path)
    kwargs = make_inputs("Bert").kwargs
    load = transformers.AutoModel.from_pretrained
    model = load(tmp_path, attn_implementation="bertfast").eval()
    assert model.config._attn_implementation == "bertfast"
    expected = load(tmp_path).eval()
    with torch.no_grad():
        out, expected = model(**kwargs)[0], expected(**kwargs)[0]
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# Decoders: causal, with a cache, with groups of heads


def llama(**changes):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 53}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**{**sizes, **heads, **changes}, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", MASKS)
def test_decoders(kind):
    model = llama()
    inputs = make_inputs("Bert", kind)
    kwargs = {k: v for k, v in inputs.kwargs.items() if k != "token_type_ids"}
    fast = with_bertfast(model)
    with torch.no_grad():
        # Eager attention in float64 gives NaN where a query sees no key.
        reference = copy.deepcopy(model).double()(**kwargs).logits[inputs.attended]
        baseline, out = model(**kwargs).logits, fast(**kwargs).logits
    assert out.isfinite().all()
    attended = inputs.attended
    assert_no_worse(
        out[attended], reference, baseline[attended], kind="model", name=f"causal {kind}"
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(cache):
    model = llama()
    ids = make_inputs("Bert", "left").kwargs
    kwargs = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": cache, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**kwargs, **options)
    out = with_bertfast(model).generate(**kwargs, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-4)


def test_cross_attention_of_equal_lengths():
    """As many queries as keys do not make them the same tokens: padded keys leave no hole in the
    queries."""
    torch.manual_seed(1)
    config = transformers.BartConfig(
        vocab_size=53, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=20, init_std=0.3,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    inputs = make_inputs("Bert")
    for length in (9, 5):
        kwargs = {k: inputs.kwargs[k] for k in ("input_ids", "attention_mask")}
        kwargs["decoder_input_ids"] = torch.randint(3, 53, (4, length))
        with torch.no_grad():
            reference = double(model)(**kwargs).last_hidden_state
            baseline, out = model(**kwargs)[0], with_bertfast(model)(**kwargs)[0]
        assert_no_worse(out, reference, baseline, kind="model", name=f"cross {length}")


# Models with an attention of their own


def refused_models():
    """Models that ask for a mask and compute with it, without the attention interface."""
    sizes = SMALL | {"max_position_embeddings": 20, "initializer_range": 0.3}
    bloom = {"vocab_size": 53, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    return {
        "MPNet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**sizes)),
        "MegatronBert": lambda: transformers.MegatronBertModel(
            transformers.MegatronBertConfig(**sizes)
        ),
        "RoFormer": lambda: transformers.RoFormerModel(transformers.RoFormerConfig(**sizes)),
        "ConvBert": lambda: transformers.ConvBertModel(transformers.ConvBertConfig(**sizes)),
        "BigBird": lambda: transformers.BigBirdModel(
            transformers.BigBirdConfig(**sizes, attention_type="original_full")
        ),
        "Bloom": lambda: transformers.BloomModel(transformers.BloomConfig(**bloom)),
        "Mpt": lambda: transformers.MptModel(
            transformers.MptConfig(vocab_size=53, d_model=32, n_layers=1, n_heads=4)
        ),
    }


@pytest.mark.parametrize("name", refused_models())
def test_models_that_compute_attention_themselves_are_refused(name):
    """With one sequence a mask ``(1, S)`` fits their scores, and was added to them silently."""
    model = refused_models()[name]().eval()
    ids = torch.randint(3, 53, (1, 9))
    padding = (torch.arange(9) < 5).long().unsqueeze(0)
    model(ids, attention_mask=padding)
    model.config._attn_implementation = "bertfast"
    with pytest.raises(
        (ValueError, AttributeError),
        match=rf"attention_mask: expected the model of a {name}Config .*use attn_implementation=",
    ):
        model(ids, attention_mask=padding)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: x + m,
        lambda m, x: m + x,
        lambda m, x: 1 - m,
        lambda m, x: ~m,
        lambda m, x: m == 0,
        lambda m, x: m[:, None, None, :],
        lambda m, x: x.masked_fill(m, 0.0),
        lambda m, x: torch.where(m, x, 0.0),
        lambda m, x: torch.cat([m, m]),
        lambda m, x: m.float(),
        lambda m, x: m.expand(3, 6),
        lambda m, x: bool(m),
    ],
)
def test_a_mask_is_not_computed_with(use):
    made = mask(3, 6, 6, attention_mask=torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises((ValueError, AttributeError), match="attention_mask: expected a model to"):
        use(made, torch.ones(3, 6))
    assert made.shape == (3, 6) and made.size(1) == 6 and made.dim() == made.ndim == 2


# The function itself


def eager(query, key, value, attended, causal, scale, keep=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    seen = attended[:, None, None, :].expand(scores.shape)
    if causal:
        seen = seen & torch.ones(scores.shape[2:], dtype=torch.bool).tril(
            scores.shape[3] - scores.shape[2]
        )
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    weights = weights if keep is None else weights * keep
    return (weights @ value).transpose(1, 2)


def qkv(batch=3, heads=4, key_heads=4, queries=6, keys=6, d=8):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(batch, n, length, d, generator=generator, dtype=torch.float64)
        for n, length in ((heads, queries), (key_heads, keys), (key_heads, keys))
    )


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (2, 6), (6, 2), (1, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_formula(causal, queries, keys, key_heads):
    q, k, v = qkv(key_heads=key_heads, queries=queries, keys=keys)
    attended = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0] * 6]).bool()[:, :keys]
    module = nn.Identity()
    module.is_causal = causal
    if causal and queries > keys:
        with pytest.raises(ValueError, match="expected queries among the 2 keys"):
            attention(module, q, k, v, attended)
        return
    out, weights = attention(module, q, k, v, attended, scaling=0.3)
    assert weights is None
    expected = eager(q, k, v, attended, causal, 0.3)
    if causal:  # there, queries are keys, and those on padding are zeros
        expected *= attended[:, keys - queries :, None, None]
    torch.testing.assert_close(out, expected)


def test_a_mask_of_no_padding_is_no_mask():
    q, k, v = qkv()
    module = nn.Identity()
    ones = torch.ones(3, 6, dtype=torch.bool)
    for causal in (False, True):
        expected = eager(q, k, v, ones, causal, 8**-0.5)
        for given in (None, ones, ones.long()):
            out = attention(module, q, k, v, given, is_causal=causal)[0]
            torch.testing.assert_close(out, expected)
    # As in transformers' own functions, a module that does not say is causal.
    torch.testing.assert_close(attention(module, q, k, v, None)[0], expected)


def test_dropout_is_the_one_mask_and_a_seed_repeats_it():
    q, k, v = qkv()
    module = nn.Identity()
    module.is_causal, module.layer_idx = False, 2
    everything = torch.ones(3, 6, dtype=torch.bool)
    torch.manual_seed(9)
    first, second = (attention(module, q, k, v, None, dropout=0.4)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(attention(module, q, k, v, None, dropout=0.4)[0], first)
    torch.manual_seed(9)
    threshold = dropout_threshold(0.4)
    keep = attention_keep_mask(draw_seed(), 1 + 3 * 2, torch.arange(3 * 6 * 4), 6, threshold)
    keep = keep.view(3, 6, 4, 6).transpose(1, 2) * dropout_scale(threshold)
    torch.testing.assert_close(first, eager(q, k, v, everything, False, 8**-0.5, keep))
    state = torch.get_rng_state()
    attention(module, q, k, v, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mask_that_was_copied_is_packed_again():
    """accelerate moves it between devices, and its packing does not go along."""
    q, k, v = qkv()
    module = nn.Identity()
    module.is_causal = False
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    made = mask(3, 6, 6, mask_function=masking.bidirectional_mask_function, attention_mask=padding)
    expected = attention(module, q, k, v, made)[0]
    assert made.to("cpu", dtype=torch.bool) is made
    assert torch.equal(attention(module, q, k, v, copy.deepcopy(made))[0], expected)
    moved = made.to(torch.uint8)
    assert moved is not made
    assert torch.equal(attention(module, q, k, v, moved)[0], expected)
    # The pattern is the mask's, and a module need not say it.
    assert torch.equal(attention(nn.Identity(), q, k, v, moved)[0], expected)
    # And one that was made for other queries.
    q = q[:, :, :2]
    assert torch.equal(attention(nn.Identity(), q, k, v, made)[0], expected[:, :2])


def test_a_mask_of_other_keys_is_refused():
    q, k, v = qkv(keys=6)
    made = mask(3, 6, 4, mask_function=masking.bidirectional_mask_function)
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(3, 6\), got \(3, 4\)"):
        attention(nn.Identity(), q, k, v, made)


def test_a_static_caches_free_places_are_not_seen():
    q, k, v = qkv(queries=2)
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("nan")
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    made = mask(3, 2, 6, q_offset=2, attention_mask=padding)
    expected = eager(q, k[:, :, :4], v[:, :, :4], padding, True, 8**-0.5)
    for given in (made, made.to(torch.int64)):
        out = attention(nn.Identity(), q, k, v, given)[0]
        torch.testing.assert_close(out, expected * padding[:, 2:, None, None])


# Bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 4),
        ("softcap", 30.0),
        ("s_aux", torch.zeros(4)),
        ("position_bias", torch.zeros(1, 4, 6, 6)),
        ("head_mask", torch.ones(4)),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("output_attentions", True),
    ],
)
def test_other_attentions_are_refused_by_name(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name}: expected None, .*attn_implementation=\"sdpa\""
    ):
        attention(nn.Identity(), *qkv(), None, **{name: value})
    attention(nn.Identity(), *qkv(), None, **{name: None})


def test_masks_that_are_no_padding_are_refused_by_name():
    q, k, v = qkv()
    for shape in ((3, 1, 6, 6), (3, 6, 6)):
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, S\).*per query"):
            attention(nn.Identity(), q, k, v, torch.ones(shape))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(3, 6\), got \(2, 6\)"):
        attention(nn.Identity(), q, k, v, torch.ones(2, 6))
    window = masking.sliding_window_causal_mask_function(3)
    with pytest.raises(ValueError, match=r"mask_function: expected a causal or a bidirectional"):
        mask(3, 6, 6, mask_function=window)
    with pytest.raises(ValueError, match=r"attention_mask: .*got \(3, 6, 6\)"):
        mask(3, 6, 6, attention_mask=torch.ones(3, 6, 6))
    with pytest.raises(ValueError, match="q_offset: expected queries among the 6 keys"):
        mask(3, 2, 6, q_offset=5)


def test_heads_and_dtypes_that_do_not_fit_are_refused_by_name():
    q, k, v = qkv(key_heads=3)
    with pytest.raises(ValueError, match="key: expected a number of heads that divides query's 4"):
        attention(nn.Identity(), q, k, v, None)
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"k: expected torch\.float64 as q"):
        attention(nn.Identity(), q, k.float(), v, None)
    with pytest.raises(TypeError, match="query: expected a floating-point tensor"):
        attention(nn.Identity(), q.long(), k, v, None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: transformers.MistralModel(
                transformers.MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=3)
            ),
            "mask_function: expected a causal or a bidirectional mask",
        ),
        (
            lambda: transformers.T5EncoderModel(
                transformers.T5Config(
                    vocab_size=53, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
                )
            ),
            "position_bias: expected None, got a bias on the scores",
        ),
    ],
)
def test_models_that_need_more_say_so(build, message):
    model = build()
    model.set_attn_implementation("bertfast")
    with pytest.raises(ValueError, match=message):
        model(torch.full((2, 9), 5))


def test_attentions_are_refused_and_not_silently_left_out():
    model = with_bertfast(tiny("Bert"))
    with pytest.raises(ValueError, match="output_attentions: expected None"):
        model(**make_inputs("Bert").kwargs, output_attentions=True)


def test_too_old_a_transformers_is_refused(monkeypatch):
    module = sys.modules["bertfast.integrations.transformers"]
    monkeypatch.setattr(transformers, "__version__", "5.3.9")
    with pytest.raises(ImportError, match=r"expected transformers >= 5\.4, got 5\.3\.9"):
        importlib.reload(module)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_for_one_mask_only_is_refused():
    model = with_bertfast(tiny("Bert")).eval()
    model.config.return_dict = False
    inputs = make_inputs("Bert").kwargs
    example = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), pytest.raises(NotImplementedError, match='attn_implementation="sdpa"'):
        torch.jit.trace(model, example)
