"""BertConfig: what it accepts, refuses and keeps."""

from __future__ import annotations

import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertfast import BertConfig
from bertfast.errors import CheckpointError

INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)
NUMBERS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["768", True, 12.0, float("nan"), [8], {}])
def test_sizes_of_the_wrong_type(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected an integer .*, got "):
        BertConfig(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [-1, 10**12, 10**400, -(10**400)])
def test_sizes_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^({name}: expected|config: its sizes make)"):
        BertConfig(**{name: value, "num_attention_heads": value if "heads" in name else 1})


@pytest.mark.parametrize("name", set(INTEGERS) - {"num_hidden_layers"})
def test_zero_sizes(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer .*, got 0"):
        BertConfig(**{name: 0})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.1", True, [0.1], {}])
def test_numbers_of_the_wrong_type(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a .*, got {type(value).__name__}"):
        BertConfig(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 10**400])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a .*number .*, got "):
        BertConfig(**{name: value})


@pytest.mark.parametrize("name", NUMBERS[:3])
def test_probabilities_above_one(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected a number from 0.0 to 1.0, got "):
        BertConfig(**{name: 1.5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size: expected a multiple of num_"),
        ({"hidden_size": 1024, "num_attention_heads": 2}, "num_attention_heads: expected heads at"),
        ({"hidden_act": "swish"}, "hidden_act: expected one of gelu, .*, got str 'swish'"),
        ({"hidden_act": ["gelu"]}, "hidden_act: expected one of"),
        ({"problem_type": "ranking"}, "problem_type: expected one of regression, "),
        ({"pad_token_id": 30522}, "pad_token_id: expected an integer from 0 to 30521, got 30522"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"output_attentions": 1}, "output_attentions: expected true or false, got int 1"),
        ({"return_dict": "no"}, "return_dict: expected true or false, got str 'no'"),
        ({"torchscript": True}, "torchscript: expected False"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: expected the keys 0 to 1"),
        ({"id2label": {"0": "a", "00": "b"}}, "id2label: expected the keys 0 to 1"),
        ({"id2label": {"zero": "a"}}, "id2label: expected integers as keys, got str 'zero'"),
        ({"id2label": ["a"]}, "id2label: expected an object of label names"),
        ({"id2label": {}}, "id2label: expected an object of label names"),
        ({"label2id": [0]}, "label2id: expected an object"),
        ({"model_type": "roberta"}, "model_type: expected 'bert', got str 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absol"),
        ({"is_decoder": True}, "is_decoder: expected False"),
        ({"add_cross_attention": True}, "add_cross_attention: expected False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected {}"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"hidden_size": 2**16, "num_attention_heads": 2**10}, "config: its sizes make "),
        (
            {"auto_map": {"AutoConfig": "c.C", "AutoModelForMaskedLM": "m.M"}},
            "auto_map: expected {} or None, got dict {'AutoModelForMaskedLM': 'm.M'}",
        ),
        ({"auto_map": "m.M"}, "auto_map: expected {} or None, got str"),
        ({"is_causal": True}, "is_causal: expected False or None, got bool True"),
        ({"sliding_window": 128}, "sliding_window: expected None, got int 128"),
        ({"rope_theta": 10000.0}, "rope_theta: expected None, got float"),
        ({"rotary_emb_fraction": 1.0}, "rotary_emb_fraction: expected 0 or None, got float 1.0"),
        ({"norm_type": "rms_norm"}, "norm_type: expected 'layer_norm' or .*, got str 'rms_norm'"),
        ({"qkv_proj_bias": False}, "qkv_proj_bias: expected True or None, got bool False"),
        ({"prenorm": True}, "prenorm: expected False"),
        ({"parallel_attn": True}, "parallel_attn: expected False"),
        ({"activation_function": "swiglu"}, "activation_function: expected 'gelu' or None"),
        ({"embedding_size": 128}, "embedding_size: expected 768 as hidden_size, got int 128"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected 12 as num_attention_heads"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: expected 1e-12 as layer_norm_eps"),
    ],
)
def test_refusals_name_the_field(fields, message):
    if "id2label" in fields:
        fields = {"label2id": None, **fields}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        BertConfig.from_dict(fields)


@pytest.mark.parametrize(
    "notes",
    [
        {"gradient_checkpointing": False, "use_cache": True, "transformers_version": "4.6.0"},
        {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
         "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
         "pooler_type": "first_token_transform"},
        {"_name_or_path": "x", "_num_labels": 2, "task_specific_params": {"a": {"b": 1}},
         "output_past": True, "finetuning_task": "mrpc", "torch_dtype": "float16",
         "chunk_size_feed_forward": 0, "bos_token_id": 0, "tokenizer_class": "BertTokenizer"},
        {"summary_activation": "gelu", "summary_type": "first", "embedding_size": 768},
        {"sinusoidal_pos_embds": False, "tie_weights_": True, "qa_dropout": 0.1},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"is_causal": False, "sliding_window": None, "norm_type": "layer_norm", "auto_map": {},
         "head_dim": 64, "emb_size": 312, "use_flash_attn": False},
        {"auto_map": {"AutoTokenizer": ["t.T", None], "AutoConfig": "c.C"}},
    ],
)  # fmt: skip
def test_notes_of_published_models_are_kept(notes):
    config = BertConfig.from_dict(notes)
    assert config.replace(extra={}) == BertConfig()
    assert notes.items() <= config.to_dict().items()


def test_a_typing_error_in_a_keyword_is_an_error():
    with pytest.raises(TypeError, match="hiden_size"):
        BertConfig(hiden_size=8)
    with pytest.raises(TypeError, match=r"^hiden_size: expected the name of a config field"):
        BertConfig().replace(hiden_size=8)


def test_unknown_keys_and_labels_round_trip(tmp_path):
    values = {
        "architectures": ["BertForMaskedLM"],
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
        "custom": {"nested": [1, None, "\ud800 é"]},
        "id2label": {"1": "yes", "0": "no"},
        "label2id": {"yes": 1, "no": 0},
        "hidden_size": 24,
        "num_attention_heads": 3,
    }
    config = BertConfig.from_dict(values)
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.num_labels == 2
    config.save(tmp_path / "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    again = BertConfig.from_json_file(tmp_path / "config.json")
    assert again == config == pickle.loads(pickle.dumps(config))
    for name, value in values.items():
        assert again.to_dict()[name] == value


def test_number_of_labels_makes_their_names():
    config = BertConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert config.replace(num_labels=1).id2label == {0: "LABEL_0"}
    assert config.replace(hidden_dropout_prob=0.0).num_labels == 3


def test_a_number_of_labels_is_stronger_than_older_names():
    config = BertConfig.from_dict({"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 3})
    for _ in range(2):
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
        config = BertConfig.from_dict(config.to_dict())
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert BertConfig(num_labels=2, **named).id2label == {0: "no", 1: "yes"}


def test_assigned_labels_and_numbers_go_along():
    config = BertConfig(id2label={0: "no", 1: "yes"})
    config.num_labels = 2
    assert config.id2label == {0: "no", 1: "yes"}
    config.num_labels = 3
    assert config == BertConfig(num_labels=3)
    config.id2label = {"0": "a"}
    assert (config.num_labels, config.id2label, config.label2id) == (1, {0: "a"}, {"a": 0})
    with pytest.raises(TypeError, match=r"^num_labels: expected an integer from 1 to .*, got str"):
        config.num_labels = "3"


def test_names_and_ids_of_labels_are_inverse():
    made_up = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert BertConfig(num_labels=3, label2id={"a": 0, "b": 1}).to_dict()["label2id"] == made_up
    config = BertConfig(label2id={"b": 1, "a": 0})
    assert (config.num_labels, config.id2label) == (2, {0: "a", 1: "b"})
    for stale in ({"x": 0}, {"a": 1, "b": 0}, {}, made_up):
        assert BertConfig(id2label={0: "a", 1: "b"}, label2id=stale) == config
    config.label2id = {"a": 0, "b": "2", "c": 1}
    assert (config.num_labels, config.id2label) == (3, {0: "a", 1: "c", 2: "b"})
    assert config.label2id == {"a": 0, "c": 1, "b": 2}
    assert BertConfig(num_labels=5).replace(label2id={"a": 0}).id2label == {0: "a"}
    same = BertConfig(id2label={0: "a", 1: "a"})
    assert BertConfig.from_dict(same.to_dict()) == same
    for ids in ({"a": 0, "b": 0}, {"a": 0, "b": 2}, {"a": 0.0}, {"a": None}):
        with pytest.raises(ValueError, match=r"^label2id: expected (the v|integers as v)"):
            BertConfig(label2id=ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in INTEGERS for value in (-1, "3", None)),
        *((name, value) for name in NUMBERS for value in (-0.5, "0.1")),
        ("id2label", {0: "a", 2: "b"}), ("id2label", None), ("id2label", [0]),
        ("label2id", {"a": 0, "b": 0}), ("label2id", None), ("label2id", {}),
        ("hidden_act", "swish"), ("problem_type", "ranking"), ("pad_token_id", -1),
        ("tie_word_embeddings", None), ("output_hidden_states", "no"), ("return_dict", 1),
        ("extra", []), ("extra", {"is_decoder": True}), ("is_decoder", True),
    ],
)  # fmt: skip
def test_what_is_refused_is_not_assigned(name, value):
    config = BertConfig(num_labels=3)
    with pytest.raises((TypeError, ValueError), match=f"^{name if name != 'extra' else ''}"):
        setattr(config, name, value)
    assert config == BertConfig(num_labels=3)
    assert not hasattr(config, "is_decoder")
    config.validate()


def test_an_assigned_value_is_as_a_given_one():
    config = BertConfig(output_attentions=True)
    config.output_attentions = None
    config.hidden_dropout_prob = 0
    config.classifier_dropout = config.pad_token_id = None
    assert repr(config) == repr(BertConfig(hidden_dropout_prob=0.0, pad_token_id=None))


def test_an_assigned_feature_is_refused_as_a_given_one():
    config = BertConfig()
    config.is_decoder = False
    with pytest.raises(
        ValueError, match=r"^is_decoder: expected False or None, got bool True; bert"
    ):
        config.is_decoder = True
    with pytest.raises(ValueError, match=r"^position_embedding_type: expected 'absolute' or None"):
        config.position_embedding_type = "relative_key"
    assert BertConfig.from_dict(config.to_dict()) == BertConfig()


def test_what_a_model_returns_is_written_where_it_was_chosen():
    assert not {"output_hidden_states", "output_attentions", "return_dict"} & {
        *BertConfig().to_dict()
    }
    values = {"output_hidden_states": True, "output_attentions": None, "return_dict": False}
    config = BertConfig.from_dict(values)
    assert (config.output_hidden_states, config.output_attentions, config.return_dict) == (
        True, False, False,
    )  # fmt: skip
    assert BertConfig.from_dict(config.to_dict()) == config
    assert not BertConfig.from_dict({"use_return_dict": False}).return_dict


def test_whole_numbers_become_floats():
    config = BertConfig(hidden_dropout_prob=0, layer_norm_eps=1, initializer_range=10**30)
    assert repr(config.hidden_dropout_prob) == "0.0"
    assert type(config.layer_norm_eps) is type(config.initializer_range) is float
    assert config.classifier_dropout is None


def test_parameter_estimate_is_the_count():
    import bertfast

    config = BertConfig(
        vocab_size=11, hidden_size=6, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=7, max_position_embeddings=5, tie_word_embeddings=False,
    )  # fmt: skip
    count = sum(p.numel() for p in bertfast.BertForPreTraining(config).parameters())
    classifier, relationship = (6 + 1) * 2, (6 + 1) * 2
    assert config.num_parameters() == count - relationship + classifier


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON, got 0 bytes"),
        (b"{", "expected JSON, got 1 bytes starting '{'"),
        (b"\xff\xfe\x00", "expected JSON, got 3 bytes"),
        (b"[" * 100_000, "expected JSON, got 100000 bytes"),
        (b"[1]", "config: expected an object of names and values, got list"),
        (b'{"hidden_size": 1e400}', "hidden_size: expected an integer"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"layer_norm_eps": NaN}', "layer_norm_eps: expected a number from 0.0 to 1.0, got "),
        (b'{"initializer_range": 1e999}', "initializer_range: expected a finite number >= 0.0"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: {re.escape(message)}"):
        BertConfig.from_json_file(file)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.json: expected a JSON file, but: No such"):
        BertConfig.from_json_file(tmp_path / "nothing.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
FIELDS = [*BertConfig().to_dict(), "num_labels", "is_decoder", "pruned_heads", "dtype", "extra"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_json_makes_a_config_or_a_clear_error(values):
    values = json.loads(json.dumps(values))
    try:
        config = BertConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        message = "config: expected to survive a round trip"
        again = BertConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert repr(again) == repr(config)  # by text, since NaN may sit in an unknown key
    assert re.match(r"\w+: expected|config: its sizes", message)
