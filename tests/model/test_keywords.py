"""What transformers' users pass: to ``from_pretrained``, in ``config.json``, as a config; and
checkpoints with tensors beyond the model."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.errors import CheckpointError
from bertfast.tasks import Classify, Embed

transformers = pytest.importorskip("transformers")

IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.fixture
def saved(tiny_config, tmp_path):
    torch.manual_seed(0)
    bertfast.BertForMaskedLM(tiny_config()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_tensors(directory, **tensors):
    file = directory / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def same(a, b):
    b = dict(b.named_parameters())
    return all(p.equal(b[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_the_config_says_what_is_returned(name, tiny_config):
    config = tiny_config(output_hidden_states=True, output_attentions=True)
    model = getattr(bertfast, name)(config).eval()
    out = model(IDS)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert list(model(IDS, output_hidden_states=None, return_dict=None)) == list(out)
    assert "hidden_states" not in model(IDS, output_hidden_states=False)
    model.config.output_attentions = False
    assert "attentions" not in model(IDS)
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert isinstance(model(IDS, return_dict=None), tuple)
    assert model(IDS, return_dict=True)[0].equal(model(IDS)[0])


def test_config_json_says_what_is_returned(saved):
    change_config(saved, output_hidden_states=True, return_dict=False, hidden_act="gelu_python")
    model = bertfast.BertForMaskedLM.from_pretrained(saved)
    logits, hidden_states = model(IDS)
    theirs = transformers.BertForMaskedLM.from_pretrained(saved)(IDS)
    torch.testing.assert_close(logits, theirs[0])
    assert len(hidden_states) == 3
    model.save_pretrained(saved)
    values = json.loads((saved / "config.json").read_text())
    assert (values["output_hidden_states"], values["return_dict"]) == (True, False)


def test_tasks_and_training_need_names_whatever_the_config_says(tiny_config):
    from bertfast.data import builtin_documents, train_vocab
    from bertfast.tasks import FillMask, NextSentence, Tag

    tokenizer = train_vocab(builtin_documents()[:2], 120)
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), return_dict=False)
    Embed(bertfast.BertModel(config), tokenizer)("a")
    Classify(bertfast.BertForSequenceClassification(config), tokenizer)("a")
    FillMask(bertfast.BertForMaskedLM(config), tokenizer)("a [MASK]")
    NextSentence(bertfast.BertForPreTraining(config), tokenizer)("a", "b")
    Tag(bertfast.BertForTokenClassification(config), tokenizer)("a")


def test_keywords_with_a_meaning(saved):
    load = bertfast.BertForMaskedLM.from_pretrained
    plain = load(saved)
    model = load(
        saved, output_hidden_states=True, output_attentions=None, torch_dtype=torch.float32,
        ignore_mismatched_sizes=False, local_files_only=True, revision="main",
        attn_implementation="bertfast", low_cpu_mem_usage=True, device_map="cpu",
        trust_remote_code=False, token=None, cache_dir=None, subfolder="", use_safetensors=True,
        weights_only=True, is_decoder=False, quantization_config=None,
    )  # fmt: skip
    assert same(model, plain)
    assert "hidden_states" in model(IDS)
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert load(saved, dtype=dtype).dtype == load(saved, torch_dtype=dtype).dtype
        assert load(saved, dtype=dtype).dtype == torch.bfloat16
    assert load(saved, dtype="auto").dtype == torch.float32
    assert same(load(pretrained_model_name_or_path=saved), plain)
    assert load(saved, device_map={"": "cpu"}).device.type == "cpu"
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    with pytest.warns(UserWarning, match="has no classifier"):
        tagger = bertfast.BertForTokenClassification.from_pretrained(saved, num_labels=3, **names)
    assert tagger.config.id2label == names["id2label"]
    assert tagger(IDS).logits.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"attn_implementation": "sdpa"}, ValueError,
         "attn_implementation: expected None or 'bertfast', got str 'sdpa'"),
        ({"trust_remote_code": True}, ValueError, "trust_remote_code: expected None or False"),
        ({"subfolder": "x"}, ValueError, "subfolder: expected None or ''"),
        ({"from_tf": True}, ValueError, "from_tf: expected None or False"),
        ({"load_in_8bit": True}, ValueError, "load_in_8bit: expected None or False"),
        ({"is_decoder": True}, ValueError, "is_decoder: expected False or None, got bool True"),
        ({"output_loading_info": True}, ValueError, "output_loading_info: expected None or False"),
        ({"hiden_size": 3}, TypeError,
         "hiden_size: expected a keyword of BertForMaskedLM.from_pretrained or a field of "
         "BertConfig, got int 3"),
        ({"add_pooling_layer": True}, TypeError, "add_pooling_layer: expected a keyword of"),
        ({"output_hidden_states": [0]}, TypeError, "output_hidden_states: expected true or false"),
        ({"dtype": "float8"}, ValueError, "dtype: expected one of torch.float32"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, ValueError,
         "torch_dtype: expected dtype, str 'float16', or nothing, got str 'bfloat16'"),
        ({"device_map": "auto"}, ValueError, "device_map: expected one device for all of the"),
        ({"device_map": {"bert": 0, "cls": 1}}, ValueError, "device_map: expected one device"),
        ({"ignore_mismatched_sizes": "yes"}, TypeError, "ignore_mismatched_sizes: expected True"),
        ({"fresh_heads": 0}, TypeError, "fresh_heads: expected True, False or None, got int 0"),
        ({"use_safetensors": 0}, TypeError, "use_safetensors: expected True, False or None"),
        ({"use_cache": True}, ValueError, "use_cache: expected None or False, got bool True"),
        ({"gradient_checkpointing": True}, ValueError, "gradient_checkpointing: expected None or"),
        ({"chunk_size_feed_forward": 8}, ValueError, "chunk_size_feed_forward: expected None or 0"),
        ({"sliding_window": 8}, ValueError, "sliding_window: expected None, got int 8"),
        ({"pretrained_model_name_or_path": "other"}, ValueError,
         "pretrained_model_name_or_path: expected path, "),
        ({"ignore": "cls.*"}, TypeError, "ignore: expected a list of patterns, got str"),
        ({"ignore": [b"x"]}, TypeError, "ignore: expected strings, got bytes"),
    ],
)  # fmt: skip
def test_keywords_that_ask_for_something_else(keywords, error, message, saved):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        bertfast.BertForMaskedLM.from_pretrained(saved, **keywords)


def test_a_path_is_needed():
    with pytest.raises(TypeError, match=r"^path: expected a path or a hub id, got NoneType"):
        bertfast.BertForMaskedLM.from_pretrained()


def test_keywords_that_change_nothing(saved):
    change_config(saved, use_cache=True)
    load = bertfast.BertForMaskedLM.from_pretrained
    model = load(
        saved, use_cache=False, gradient_checkpointing=False, chunk_size_feed_forward=0,
        finetuning_task="x", architectures=["BertModel"], _from_auto=True, _fast_init=False,
        force_download=True, resume_download=True, use_safetensors=False, is_causal=False,
    )  # fmt: skip
    assert same(model, load(saved))
    assert model.config.extra["finetuning_task"] == "x"
    model.save_pretrained(saved)
    values = json.loads((saved / "config.json").read_text())
    assert values["architectures"] == ["BertForMaskedLM"]
    assert values["finetuning_task"] == "x"


def test_no_safetensors_where_there_are_pickles(saved):
    state = load_file(saved / "model.safetensors")
    torch.save({name: value + 1 for name, value in state.items()}, saved / "pytorch_model.bin")
    load = bertfast.BertForMaskedLM.from_pretrained
    for wish, shift in ((None, 0), (True, 0), (False, 1)):
        table = load(saved, use_safetensors=wish).get_input_embeddings().weight
        assert table.equal(state["bert.embeddings.word_embeddings.weight"] + shift)


def test_safetensors_or_nothing(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    plain = bertfast.BertForMaskedLM.from_pretrained(saved)
    assert plain.dtype == torch.float32
    message = r"expected model\.safetensors, as use_safetensors says, got pytorch_model\.bin"
    with pytest.raises(CheckpointError, match=message):
        bertfast.BertForMaskedLM.from_pretrained(saved, use_safetensors=True)


def test_other_shapes_are_drawn_anew_where_that_is_asked_for(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = bertfast.BertForTokenClassification(tiny_config(num_labels=3))
    model.save_pretrained(tmp_path)
    load = bertfast.BertForTokenClassification.from_pretrained
    with pytest.raises(CheckpointError, match=r"shapes: classifier\.bias is \(3,\) where the conf"):
        load(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"has no classifier.*draws anew"):
        other = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (5, 24)
    assert same(other.bert, model.bert)
    with pytest.warns(UserWarning, match=r"word_embeddings\.weight of shape \(40, 24\), which"):
        other = load(tmp_path, vocab_size=40, ignore_mismatched_sizes=True)
    assert same(other.bert.encoder, model.bert.encoder)
    with pytest.raises(CheckpointError, match=r"expected the weights of a trained .* got none for"):
        load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, fresh_heads=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(tmp_path, ignore_mismatched_sizes=True), model)


BEYOND = {
    "cls.species.weight": torch.ones(4, 24),
    "cls.species.bias": torch.ones(4),
    "bert.embeddings.chains": torch.arange(3),
}


def test_tensors_beyond_the_model(saved):
    plain = bertfast.BertForMaskedLM.from_pretrained(saved)
    add_tensors(saved, **BEYOND)
    load = bertfast.BertForMaskedLM.from_pretrained
    with pytest.raises(
        CheckpointError,
        match=r"unexpected: bert\.embeddings\.chains of torch\.int64, cls\.species\.bias, "
        r"cls\.species\.weight \(ignore= in from_pretrained",
    ):
        load(saved)
    with pytest.raises(
        CheckpointError,
        match=r"unexpected: cls\.species\.bias, cls\.species\.weight \(ignore= in from_pretrained",
    ):
        load(saved, ignore=["*chains"])
    assert same(load(saved, ignore=["cls.species.*", "*.chain[s]"]), plain)
    with pytest.raises(TypeError, match=r"^ignore: expected a list of patterns, got dict"):
        load(saved, ignore=BEYOND)
    for pattern in ("cls.*", "*LayerNorm.weight", "*.predictions.bias", "*"):
        with pytest.raises(
            ValueError, match=r"^ignore: expected patterns of tensors that BertForMaskedLM does not"
        ):
            load(saved, ignore=["cls.species.*", "*.chains", pattern])
    with pytest.raises(ValueError, match=r"^ignore: .*got 'cls\.specie', which none of its"):
        load(saved, ignore=["cls.specie"])


def test_integers_are_no_weights_under_any_name(saved):
    plain = bertfast.BertModel.from_pretrained(saved, dtype="float16", add_pooling_layer=False)
    plain.save_pretrained(saved)
    add_tensors(saved, **{"cls.predictions.bias": torch.arange(37)})
    again = bertfast.BertModel.from_pretrained(saved, add_pooling_layer=False)
    assert again.dtype == torch.float16
    for name in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        plain.save_pretrained(saved)
        add_tensors(saved, **{name: torch.arange(37)})
        message = rf"expected {re.escape(name)} in one of .*, got torch\.int64$"
        with pytest.raises(CheckpointError, match=message):
            bertfast.BertForMaskedLM.from_pretrained(saved)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_configs_of_transformers_are_converted(model_type, tmp_path):
    names = {"distilbert": {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40}}
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
             "intermediate_size": 40}  # fmt: skip
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=37, max_position_embeddings=16, num_labels=4,
        output_hidden_states=True, **names.get(model_type, sizes),
    )  # fmt: skip
    model = bertfast.BertForTokenClassification(config).eval()
    assert isinstance(model.config, bertfast.BertConfig)
    assert isinstance(model.bert.config, bertfast.BertConfig)
    assert model.config.hidden_size == 24
    assert model(IDS).logits.shape == (2, 5, 4)
    assert "hidden_states" in model(IDS)
    theirs = transformers.AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = bertfast.BertModel.from_pretrained(tmp_path, config=config).eval()
    got, expected = ours(IDS * 5), theirs(IDS * 5)
    torch.testing.assert_close(
        got.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4
    )


def test_configs_that_are_no_bert(tmp_path):
    with pytest.raises(ValueError, match=r"^model_type: expected one of .*, got 'gpt2': it reads"):
        bertfast.BertModel(transformers.GPT2Config())
    with pytest.raises(ValueError, match=r"^is_decoder: expected False"):
        bertfast.BertModel(transformers.BertConfig(is_decoder=True))


def test_outputs_are_what_libraries_expect():
    """They take outputs apart and make them anew: accelerate, DataParallel, pytrees."""
    from torch.utils import _pytree as pytree

    from bertfast.model.outputs import LogitsOutput

    out = LogitsOutput(torch.ones(()), torch.ones(2, 3))
    for again in (
        type(out)({name: value.bfloat16() for name, value in out.items()}),
        type(out)((name, value.bfloat16()) for name, value in out.items()),
        pytree.tree_map(lambda x: x.bfloat16(), out),
    ):
        assert list(again) == ["loss", "logits"]
        assert {x.dtype for x in again.to_tuple()} == {torch.bfloat16}
        assert again.loss is again["loss"] is again[0]
    out.logits = None
    assert list(out) == ["loss"]
    out["logits"] = torch.zeros(1)
    assert out.logits is out[1]
    with pytest.raises(KeyError, match="LogitsOutput has no field 'score'"):
        out["score"] = torch.zeros(1)
    for change in (lambda: out.pop("loss"), lambda: out.update(loss=None),
                   lambda: out.setdefault("loss"), lambda: out.__delitem__("loss")):  # fmt: skip
        with pytest.raises(TypeError, match="its fields cannot be removed"):
            change()
    nothing = LogitsOutput()
    assert nothing.to_tuple() == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.encoder, "layer", m.encoder.layer[:1]),
         r"missing: encoder\.layer\.1\.attention"),
        (lambda m: m.register_buffer("seen", torch.zeros(1)), "unexpected: seen$"),
        (lambda m: setattr(m.get_input_embeddings(), "weight",
                           torch.nn.Parameter(torch.zeros(40, 24))),
         r"shapes: embeddings\.word_embeddings\.weight is torch\.float32 \(40, 24\) where the c"),
        (lambda m: torch.ao.quantization.quantize_dynamic(m, inplace=True),
         r"missing: encoder\.layer\.0\.attention"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_not_saved(change, message, tiny_config, tmp_path):
    model = bertfast.BertModel(tiny_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantization is deprecated
        change(model)
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=rf"^save_pretrained: expected the weights of a .*{message}"
    ):
        model.save_pretrained(tmp_path / "out")
    assert state.equal(torch.get_rng_state())
    assert not (tmp_path / "out").exists()


def test_keywords_of_saving(saved):
    model = bertfast.BertForMaskedLM.from_pretrained(saved)
    model.save_pretrained(saved, safe_serialization=True, is_main_process=True, state_dict=None)
    with pytest.raises(ValueError, match=r"^safe_serialization: expected None or True, got bool F"):
        model.save_pretrained(saved, safe_serialization=False)
    with pytest.raises(ValueError, match=r"^state_dict: expected None, got Ord"):
        model.save_pretrained(saved, state_dict=model.state_dict())
    with pytest.raises(TypeError, match=r"^where: expected a keyword of BertForMaskedLM\.save_pre"):
        model.save_pretrained(saved, where=saved)


@pytest.mark.parametrize("frozen", [False, True])
def test_numbers_of_parameters(frozen, saved):
    ours = bertfast.BertForMaskedLM.from_pretrained(saved)
    theirs = transformers.BertForMaskedLM.from_pretrained(saved)
    for model in (ours, theirs):
        model.get_input_embeddings().weight.requires_grad_(not frozen)
    for only_trainable in (False, True):
        for exclude_embeddings in (False, True):
            keywords = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
            assert ours.num_parameters(**keywords) == theirs.num_parameters(**keywords)


def test_a_decoder_of_its_own_is_said(tiny_config, tmp_path):
    model = bertfast.BertForMaskedLM(tiny_config())
    decoder = torch.nn.Linear(24, 37)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    with pytest.raises(ValueError, match=r"decoder's weight is not the word table, which config"):
        model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert same(bertfast.BertForMaskedLM.from_pretrained(tmp_path), model)


def test_adapters_of_peft(tiny_config, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = bertfast.BertForSequenceClassification(tiny_config())
    targets = ["query", "intermediate.dense", "output.dense", "word_embeddings",
               "position_embeddings"]  # fmt: skip
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=targets, lora_dropout=0.1, init_lora_weights=False
    )
    plain = model.eval()(IDS).logits
    adapted = peft.get_peft_model(model, config)
    adapted.gradient_checkpointing_enable()
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        adapted.train()(input_ids=IDS, attention_mask=IDS, labels=labels).loss.backward()
        optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name, p in adapted.named_parameters() if p.requires_grad}
    logits = adapted.eval()(input_ids=IDS).logits
    assert not torch.allclose(logits, plain, rtol=1e-3)
    with pytest.raises(ValueError, match=r"lora_A.*peft's merge_and_unload\(\)"):
        model.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2, 2), "Tensor of shape (2, 2)"),
        (torch.ones(3).numpy(), "ndarray of shape (3,)"),
        (torch.tensor(1.0), "Tensor tensor(1.)"),
        ([torch.ones(2, 2)], "list [tensor([[1., 1.], [1., 1.]])]"),
        ("a  b\n", r"str 'a  b\n'"),
        (list(range(50)), "list [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, "
         "19, 20, 21..."),
    ],
)  # fmt: skip
def test_a_refused_value_is_shown_in_one_line(value, text, tiny_config):
    model = bertfast.BertModel(tiny_config())
    with pytest.raises(ValueError, match=rf"^head_mask: expected None, got {re.escape(text)}; b"):
        model(IDS, head_mask=value)
