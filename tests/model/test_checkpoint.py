"""Checkpoints in and out: names, shards, heads, dtypes, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.errors import CheckpointError
from bertfast.model import checkpoint


@pytest.fixture
def saved(tiny_config, tmp_path):
    """A saved ``BertForPreTraining`` with random weights everywhere: model and directory."""
    torch.manual_seed(0)
    model = bertfast.BertForPreTraining(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def weights_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


def assert_loaded(got, expected):
    expected = weights_of(expected)
    for name, parameter in weights_of(got).items():
        assert parameter.equal(expected[name] if name in expected else expected[f"bert.{name}"])


def rewrite(directory, change):
    """Apply ``change`` to the dict of tensors in the directory's safetensors file."""
    file = directory / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def old_names(tensors):
    def rename(name):
        return re.sub(r"Norm\.weight$", "Norm.gamma", re.sub(r"Norm\.bias$", "Norm.beta", name))

    return {rename(name): t for name, t in tensors.items()}


def bare(tensors):
    return {n.removeprefix("bert."): t for n, t in tensors.items()}


def with_buffers(tensors):
    return {
        **tensors,
        "bert.embeddings.position_ids": torch.arange(16).unsqueeze(0),
        "bert.embeddings.token_type_ids": torch.zeros(1, 16, dtype=torch.long),
    }


def with_decoder(tensors):
    table = tensors["bert.embeddings.word_embeddings.weight"].clone()
    bias = tensors["cls.predictions.bias"].clone()
    return {
        **tensors,
        "cls.predictions.decoder.weight": table,
        "cls.predictions.decoder.bias": bias,
    }


def only_decoder_bias(tensors):
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    return tensors


@pytest.mark.parametrize(
    "change", [dict, old_names, bare, with_buffers, with_decoder, only_decoder_bias,
               lambda t: bare(with_buffers(old_names(t)))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertModel"])
def test_every_way_to_name_the_same_weights(change, name, saved):
    model, directory = saved
    rewrite(directory, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = getattr(bertfast, name).from_pretrained(directory)
    assert_loaded(loaded, model)
    if name == "BertForPreTraining":
        predictions = loaded.cls.predictions
        assert predictions.decoder.weight is loaded.get_input_embeddings().weight
        assert predictions.bias is predictions.decoder.bias
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("change", [dict, lambda t: old_names(with_decoder(t))])
def test_legacy_pickles(sharded, change, saved):
    model, directory = saved
    tensors = change(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        weight_map = {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({name: tensors[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_loaded(bertfast.BertForPreTraining.from_pretrained(directory), model)


@pytest.mark.parametrize("size", [1, 5000, "10KB", "1GB"])
def test_shards_round_trip_and_replace_each_other(size, saved):
    model, directory = saved
    model.save_pretrained(directory, max_shard_size=size)
    files = sorted(p.name for p in directory.iterdir())
    shards = [f for f in files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", f)]
    if size == "1GB":
        assert files == ["config.json", "model.safetensors"]
    else:
        assert files == ["config.json", *shards, "model.safetensors.index.json"]
        limit = {1: 1, 5000: 5000, "10KB": 10_000}[size]
        for shard in shards:
            tensors = load_file(directory / shard)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        assert len(shards) > 1
    assert_loaded(bertfast.BertForPreTraining.from_pretrained(directory), model)
    model.save_pretrained(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("size", [0, -1, True, "5", "5 TB", "0GB", "GB", 1.5, None])
def test_bad_shard_sizes(size, saved):
    model, directory = saved
    with pytest.raises(ValueError, match=r"^max_shard_size: expected bytes >= 1, or a text like"):
        model.save_pretrained(directory, max_shard_size=size)


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    model, directory = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    calls = []

    def fail(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(directory, max_shard_size=5000)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


@pytest.mark.parametrize("old_size", [5000, "1GB"])
@pytest.mark.parametrize("new_size", [5000, "1GB"])
@pytest.mark.parametrize("same_config", [False, True])
def test_an_interrupted_save_mixes_nothing(old_size, new_size, same_config, saved, monkeypatch):
    """Stopped before each of its renames and removals: the old weights, the new, or a refusal."""
    model, directory = saved
    old = copy.deepcopy(model)
    new = copy.deepcopy(model)
    if not same_config:
        new.config.hidden_act = "relu"
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    replace, unlink = os.replace, pathlib.Path.unlink
    left = 0

    def counted(act):
        def run(path, *more, **options):
            nonlocal left
            if not pathlib.Path(path).name.endswith(".tmp") or act is replace:
                if left == 0 and pathlib.Path(path).parent == directory:
                    raise OSError("killed")
                left -= 1
            return act(path, *more, **options)

        return run

    outcomes = set()
    for steps in range(200):
        left = -1
        old.save_pretrained(directory, max_shard_size=old_size)
        left = steps
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(pathlib.Path, "unlink", counted(unlink))
            try:
                new.save_pretrained(directory, max_shard_size=new_size)
                done = True
            except OSError:
                done = False
        try:
            loaded = bertfast.BertForPreTraining.from_pretrained(directory)
        except CheckpointError:
            outcomes.add("refused")
        else:
            is_new = loaded.bert.pooler.dense.bias.equal(new.bert.pooler.dense.bias)
            outcomes.add("new" if is_new else "old")
            assert_loaded(loaded, new if is_new else old)
            assert loaded.config.hidden_act == (new if is_new else old).config.hidden_act
        if done:
            break
    assert done
    assert {"old", "new"} <= outcomes
    assert ("refused" in outcomes) == (not same_config or new_size == 5000)


def test_saving_says_what_it_saved(saved):
    model, directory = saved
    model.bfloat16().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]
    assert config["dtype"] == "bfloat16"
    assert config["model_type"] == "bert"
    assert "architectures" not in model.config.extra


def test_dtype_and_device(saved):
    model, directory = saved
    load = bertfast.BertModel.from_pretrained
    assert load(directory).dtype == torch.float32
    assert load(directory, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(directory, device="meta").device.type == "meta"
    model.bfloat16().save_pretrained(directory)
    assert load(directory).dtype == torch.bfloat16
    rewrite(directory, lambda t: {n: w.float() if "Norm" in n else w for n, w in t.items()})
    assert {p.dtype for p in load(directory).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"^dtype: expected one of .*, got torch.int64"):
        load(directory, dtype=torch.int64)
    for device in ("toaster", 1.5, "cpu:x"):
        with pytest.raises(ValueError, match=r"^device: expected one that is here, got "):
            load(directory, device=device)


def test_loading_does_not_hold_on_to_the_file(saved):
    model, directory = saved
    loaded = bertfast.BertModel.from_pretrained(directory)
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * (os.path.getsize(directory / "model.safetensors") - 2000))
    assert_loaded(loaded, model)


def test_a_new_head_is_announced_and_drawn(saved):
    model, directory = saved
    with pytest.warns(
        UserWarning, match=r"model\.safetensors: has no classifier, which BertForSeq"
    ):
        loaded = bertfast.BertForSequenceClassification.from_pretrained(directory, num_labels=5)
    assert loaded.classifier.weight.shape == (5, 24)
    assert loaded.classifier.weight.std() > 0.1
    assert not loaded.classifier.bias.any()
    assert loaded.config.id2label[4] == "LABEL_4"
    assert_loaded(loaded.bert, model.bert)
    loaded.bert.pooler = None
    torch.manual_seed(1)
    loaded.save_pretrained(directory)
    with pytest.warns(UserWarning, match=r"has no bert\.pooler, which BertModel"):
        pooled = bertfast.BertModel.from_pretrained(directory)
    assert pooled.pooler.dense.weight.std() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = bertfast.BertModel.from_pretrained(directory, add_pooling_layer=False)
    assert bare.pooler is None
    with pytest.warns(UserWarning, match=r"has no bert\.pooler, cls\.predictions, cls\.seq_rel"):
        fresh = bertfast.BertForPreTraining.from_pretrained(directory)
    assert fresh.cls.predictions.decoder.weight is fresh.get_input_embeddings().weight
    assert fresh.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


def test_overrides_and_own_config(saved, tiny_config):
    _, directory = saved
    load = bertfast.BertModel.from_pretrained
    assert load(directory, hidden_dropout_prob=0.0).config.hidden_dropout_prob == 0.0
    (directory / "config.json").unlink()
    config = tiny_config(hidden_act="relu")
    assert load(directory, config=config).config is config
    with pytest.raises(TypeError, match=r"^config: expected a BertConfig, got dict"):
        load(directory, config={})
    with pytest.raises(TypeError, match="hidden_dropout"):
        load(directory, config=config, hidden_dropout=0.0)
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON file, but: No such"):
        load(directory)


def without(name):
    return lambda t: {n: w for n, w in t.items() if n != name}


def plus(name, tensor=None):
    return lambda t: {**t, name: torch.ones(2) if tensor is None else tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("bert.encoder.layer.1.output.dense.bias"),
         "missing: bert.encoder.layer.1.output.dense.bias"),
        (without("cls.predictions.transform.dense.bias"),
         "missing: cls.predictions.transform.dense.bias"),
        (without("bert.pooler.dense.bias"), "missing: bert.pooler.dense.bias"),
        (plus("bert.encoder.layer.2.output.dense.bias"),
         "unexpected: bert.encoder.layer.2.output.dense.bias"),
        (plus("cls.predictions.extra"), "unexpected: cls.predictions.extra"),
        (plus("lm_head.weight"), "unexpected: lm_head.weight"),
        (plus("bert.pooler.dense.bias"),
         "shapes: bert.pooler.dense.bias is (2,) where the config makes it (24,)"),
        (plus("pooler.dense.bias"),
         "expected one bert.pooler.dense.bias, got bert.pooler.dense.bias and pooler.dense.bias"),
        (plus("embeddings.LayerNorm.gamma"), "expected one bert.embeddings.LayerNorm.weight, got"),
        (plus("cls.predictions.decoder.weight", torch.ones(37, 24)),
         "expected cls.predictions.decoder.weight to equal bert.embeddings.word_embeddings.weight"),
        (plus("cls.predictions.decoder.bias", torch.ones(37)),
         "expected cls.predictions.decoder.bias to equal cls.predictions.bias"),
        (plus("bert.pooler.dense.bias", torch.ones(24, dtype=torch.int32)),
         "expected bert.pooler.dense.bias in one of torch.float32, torch.float16, torch.bfloat16, "
         "torch.float64, got torch.int32"),
        (lambda t: {"h.0.attn.weight": torch.ones(2)},
         "does not fit BertForPreTraining with its config; missing: bert.embeddings.LayerNorm."),
        (lambda t: {}, "missing: bert.embeddings.LayerNorm.bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed(change, message, saved):
    _, directory = saved
    rewrite(directory, change)
    with pytest.raises(CheckpointError) as caught:
        bertfast.BertForPreTraining.from_pretrained(directory)
    assert message in str(caught.value)
    assert str(directory / "model.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_long_lists_are_cut_short(saved):
    _, directory = saved
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more$"):
        bertfast.BertModel.from_pretrained(directory, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"unexpected: .* and 4 more \(ignore= in"):
        bertfast.BertModel.from_pretrained(directory, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"shapes: .*is \(37, 24\) where the config makes it"):
        bertfast.BertModel.from_pretrained(directory, vocab_size=38)


def test_huge_sizes_do_not_reach_memory(saved):
    """20 GB of parameters by the config, refused for their shapes before any exists."""
    _, directory = saved
    with pytest.raises(CheckpointError, match=r"shapes: bert\.embeddings\.word_embeddings"):
        bertfast.BertModel.from_pretrained(directory, vocab_size=2 * 10**8)


def test_untied_decoder_keeps_its_own_bias(saved):
    """Hugging Face stores two biases for an untied model and computes with the decoder's."""
    _, directory = saved
    rewrite(directory, lambda t: {
        **t, "cls.predictions.decoder.weight": torch.ones(37, 24),
        "cls.predictions.decoder.bias": torch.full((37,), 2.0),
    })  # fmt: skip
    model = bertfast.BertForPreTraining.from_pretrained(directory, tie_word_embeddings=False)
    assert (model.cls.predictions.decoder.weight == 1).all()
    assert (model.cls.predictions.bias == 2).all()
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], 'expected an object whose "weight_map"'),
        ({"weight_map": {"a": 1}}, 'expected an object whose "weight_map"'),
        ({"weight_map": {"a": "../model.safetensors"}}, "expected names of files beside it, got"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected names of files beside it, got"),
        ({"weight_map": {"a": "sub\\x.safetensors"}}, "expected names of files beside it, got"),
        ({"weight_map": {"a": ".."}}, "expected names of files beside it, got '..'"),
        ({"weight_map": {"a": ""}}, "expected names of files beside it, got ''"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "expected names of files beside it, got"),
        ({"weight_map": {"a": "gone.safetensors"}}, "expected the file gone.safetensors beside it"),
        ({"weight_map": {"a": "part.safetensors"}}, "has no a, according to model.safetensors.ind"),
        (
            {"weight_map": {"cls.predictions.bias": "part.safetensors"}},
            "has, unknown to the index,",
        ),
        ({"weight_map": {}}, "missing: bert.embeddings.LayerNorm.bias"),
    ],
)
def test_bad_indices(index, message, saved):
    _, directory = saved
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        bertfast.BertForPreTraining.from_pretrained(directory)
    assert message in str(caught.value)
    assert str(directory) in str(caught.value)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict of tensors, got [1, 2]"),
        ({"a": 1}, "expected a dict of names and dense tensors, got 'a' with 1"),
        ({1: torch.ones(2)}, "expected a dict of names and dense tensors, got 1 with Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "expected a dict of names and dense tensors"),
        (
            {"encoder.layer.0.output.dense.bias": torch.ones(2, dtype=torch.complex64)},
            "expected encoder.layer.0.output.dense.bias in one of torch.float32",
        ),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "does not fit BertModel"),
        ({"a": Evil()}, "expected a file of torch weights, got "),
        (Evil(), "expected a file of torch weights, got "),
    ],
)
def test_pickles_hold_tensors_and_nothing_else(content, message, saved, monkeypatch):
    _, directory = saved
    monkeypatch.chdir(directory)
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        bertfast.BertModel.from_pretrained(directory)
    assert f"pytorch_model.bin: {message}" in str(caught.value)
    assert not (directory / "pwned").exists()


def test_paths(saved):
    _, directory = saved
    load = bertfast.BertModel.from_pretrained
    for path in ("no/such/directory", "/no/such", "../no-such", directory / "no-such"):
        with pytest.raises(CheckpointError, match=r"^path: .*, got '.*', which is none of them$"):
            load(path)
    with pytest.raises(CheckpointError, match=r"^path: expected a dir.*json', which is a file$"):
        load(directory / "config.json")
    with pytest.raises(CheckpointError, match=r"^path: expected a directory, the prefix"):
        load("nul\0byte")
    with pytest.raises(TypeError, match=r"^path: expected a path or a hub id, got int"):
        load(3)
    (directory / "model.safetensors").rename(directory / "tf_model.h5")
    with pytest.raises(
        CheckpointError, match=r"expected one of model\.safetensors, .*, got config"
    ):
        load(directory)
    (directory / "tf_model.h5").rename(directory / "model.safetensors")
    assert load(str(directory)).config == load(directory).config


def test_the_shapes_of_tied_names_come_before_their_values(saved):
    """Views of 2**40 elements in a file of 1 KB must not be compared element by element."""
    _, directory = saved
    (directory / "model.safetensors").unlink()
    huge = torch.zeros(1).expand(2**40)
    names = ("cls.predictions.decoder.bias", "cls.predictions.bias")
    torch.save(dict.fromkeys(names, huge), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"shapes: cls\.predictions\.decoder\.bias is \(109"):
        bertfast.BertForPreTraining.from_pretrained(directory)


def test_tied_names_of_other_dtypes_and_nans(saved):
    _, directory = saved
    alias, bias = "cls.predictions.decoder.bias", "cls.predictions.bias"
    rewrite(directory, lambda t: {**t, bias: t[bias].fill_(torch.nan), alias: t[bias].clone()})
    model = bertfast.BertForPreTraining.from_pretrained(directory)
    assert model.cls.predictions.bias.isnan().all()
    rewrite(directory, lambda t: {**t, alias: t[bias].half()})
    with pytest.raises(CheckpointError, match=r"decoder\.bias in torch\.float32 as cls\.pred"):
        bertfast.BertForPreTraining.from_pretrained(directory)
