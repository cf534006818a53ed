"""Google's checkpoints, written by TensorFlow (make_tensorflow_checkpoints.py), read without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bertfast
from bertfast.errors import CheckpointError
from bertfast.model import tensorflow
from bertfast.model.crc32c import masked_crc32c
from bertfast.model.tensorflow import Checkpoint

from . import tables
from .tensorflow_values import CONFIG, LABELS, body, heads, values
from .test_hostile_files import damaged

FILES = Path(__file__).parent / "tensorflow"
DATA = "bert_model.ckpt.data-00000-of-00001"
SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def pretraining(tmp_path):
    """A copy of the checkpoint in one shard, to damage."""
    return Path(shutil.copytree(FILES / "pretraining", tmp_path / "pretraining"))


@pytest.fixture
def compressed(pretraining):
    shutil.copy(FILES / "compressed.index", pretraining / "bert_model.ckpt.index")
    return pretraining


PREFIXES = {
    "pretraining": ("bert_model.ckpt", torch.float32),
    "sharded": ("bert_model.ckpt", torch.float32),
    "classifier": ("model.ckpt-1000", torch.bfloat16),
    "squad": ("model.ckpt", torch.float16),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_every_variable_is_what_tensorflow_wrote(name):
    prefix, dtype = PREFIXES[name]
    checkpoint = Checkpoint(FILES / name / prefix)
    expected = {**body(), **heads()[name if name in heads() else "pretraining"]}
    slots = {v for v in checkpoint.variables if v.endswith(("adam_m", "adam_v", "global_step"))}
    assert checkpoint.variables.keys() - slots == expected.keys()
    assert len(slots) == {"pretraining": 2 * len(expected) + 1, "classifier": 1}.get(name, 0)
    assert len(checkpoint.shards) == (3 if name == "sharded" else 1)
    for variable, shape in expected.items():
        value = checkpoint.read(variable)
        assert value.dtype == dtype
        assert (value.float().numpy() == values(variable, shape)).all(), variable


def test_a_compressed_index_says_the_same(compressed):
    plain = Checkpoint(FILES / "pretraining" / "bert_model.ckpt")
    assert Checkpoint(compressed / "bert_model.ckpt").variables == plain.variables


def norm(x, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    gamma, beta = (values(f"{name}/LayerNorm/{part}", x.shape[-1:]) for part in ("gamma", "beta"))
    return (x - mean) / np.sqrt(variance + 1e-12) * gamma + beta


def dense(x, name, out):
    return x @ values(f"{name}/kernel", (x.shape[-1], out)) + values(f"{name}/bias", (out,))


def gelu(x):
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def google_forward(ids, types):
    """BERT as Google's code computes it, in NumPy: every token's vector, and the pooled one."""
    hidden, heads_ = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    tables_ = {
        kind: values(
            f"bert/embeddings/{kind}_embeddings", body()[f"bert/embeddings/{kind}_embeddings"]
        )
        for kind in ("word", "position", "token_type")
    }
    x = tables_["word"][ids] + tables_["position"][: len(ids)] + tables_["token_type"][types]
    x = norm(x.astype(np.float64), "bert/embeddings")
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"bert/encoder/layer_{layer}"
        q, k, v = (
            dense(x, f"{name}/attention/self/{part}", hidden)
            .reshape(len(ids), heads_, -1)
            .swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(hidden // heads_))
        context = (scores / scores.sum(-1, keepdims=True)) @ v
        context = context.swapaxes(0, 1).reshape(len(ids), hidden)
        x = norm(x + dense(context, f"{name}/attention/output/dense", hidden),
                 f"{name}/attention/output")  # fmt: skip
        wide = gelu(dense(x, f"{name}/intermediate/dense", CONFIG["intermediate_size"]))
        x = norm(x + dense(wide, f"{name}/output/dense", hidden), f"{name}/output")
    return x, np.tanh(dense(x[0], "bert/pooler/dense", hidden))


IDS, TYPES = [2, 5, 7, 9, 3, 6, 8, 3], [0, 0, 0, 0, 0, 1, 1, 1]


def run(model, dtype=torch.float64):
    inputs = {"input_ids": torch.tensor([IDS]), "token_type_ids": torch.tensor([TYPES])}
    with torch.no_grad():
        return model.to(dtype)(**inputs)


def same(got, expected):
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(expected)), rtol=1e-6, atol=1e-7)


@pytest.fixture(autouse=True)
def reference():
    """float64 has no kernels but the reference's."""
    with bertfast.backend("reference"):
        yield


@pytest.mark.parametrize(
    "path",
    [
        "pretraining",
        "pretraining/bert_model.ckpt",
        "pretraining/bert_model.ckpt.index",
        "sharded",
        "sharded/bert_model.ckpt.data-00001-of-00003",
    ],
)
def test_pretraining_computes_what_google_s_code_computes(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bertfast.BertForPreTraining.from_pretrained(FILES / path)
    assert model.dtype == torch.float32
    assert all(p.is_contiguous() for p in model.parameters())
    x, pooled = google_forward(IDS, TYPES)
    encoded = run(model.bert)
    same(encoded.last_hidden_state[0], x)
    same(encoded.pooler_output[0], pooled)
    out = run(model)
    h = norm(gelu(dense(x, "cls/predictions/transform/dense", 8)), "cls/predictions/transform")
    words = values("bert/embeddings/word_embeddings", (24, 8))
    same(out.prediction_logits[0], h @ words.T + values("cls/predictions/output_bias", (24,)))
    weights = values("cls/seq_relationship/output_weights", (2, 8))
    bias = values("cls/seq_relationship/output_bias", (2,))
    same(out.seq_relationship_logits[0], pooled @ weights.T + bias)


def test_a_compressed_index_loads(compressed):
    x, _ = google_forward(IDS, TYPES)
    same(run(bertfast.BertModel.from_pretrained(compressed)).last_hidden_state[0], x)


def test_run_classifier(tmp_path):
    model = bertfast.BertForSequenceClassification.from_pretrained(FILES / "classifier")
    assert model.config.num_labels == LABELS
    assert model.dtype == torch.bfloat16
    _, pooled = google_forward(IDS, TYPES)
    expected = pooled @ values("output_weights", (LABELS, 8)).T + values("output_bias", (LABELS,))
    same(run(model).logits[0], expected)
    other = bertfast.BertForSequenceClassification.from_pretrained
    with pytest.raises(CheckpointError, match=r"shapes: classifier\.bias is \(3,\) where"):
        other(FILES / "classifier", num_labels=2)


def test_run_squad():
    model = bertfast.BertForQuestionAnswering.from_pretrained(FILES / "squad", dtype=torch.float32)
    x, _ = google_forward(IDS, TYPES)
    weights, bias = (
        values("cls/squad/output_weights", (2, 8)),
        values("cls/squad/output_bias", (2,)),
    )
    expected = x @ weights.T + bias
    out = run(model)
    same(out.start_logits[0], expected[:, 0])
    same(out.end_logits[0], expected[:, 1])


def test_what_gelu_means(pretraining):
    """In Google's file tanh's, in Hugging Face's erf's; an argument has the last word."""
    load = bertfast.BertModel.from_pretrained
    assert load(pretraining).config.hidden_act == "gelu_new"
    assert load(pretraining, hidden_act="gelu").config.hidden_act == "gelu"
    config = json.loads((pretraining / "bert_config.json").read_text())
    (pretraining / "bert_config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load(pretraining).config.hidden_act == "relu"
    (pretraining / "bert_config.json").unlink()
    (pretraining / "config.json").write_text(json.dumps(config))
    assert load(pretraining).config.hidden_act == "gelu"
    (pretraining / "config.json").unlink()
    given = bertfast.BertConfig.from_dict(config)
    assert load(pretraining, config=given).config is given
    with pytest.raises(
        CheckpointError, match=r"expected bert_config\.json beside bert_model\.ckpt, which"
    ):
        load(pretraining)


@pytest.mark.parametrize("length", [1, 7, 10])
def test_fewer_positions_are_the_first(length):
    load = bertfast.BertModel.from_pretrained
    model = load(FILES / "sharded", max_position_embeddings=length)
    table = model.embeddings.position_embeddings.weight
    assert (
        table.detach().numpy() == values("bert/embeddings/position_embeddings", (10, 8))[:length]
    ).all()
    with pytest.raises(
        CheckpointError, match=r"expected max_position_embeddings of at most 10, .* got 11: nothing"
    ):
        load(FILES / "sharded", max_position_embeddings=11)


def test_the_latest_of_several(pretraining):
    for step in (3, 20):
        for file in FILES.glob("pretraining/bert_model.ckpt.*"):
            suffix = file.name.removeprefix("bert_model.ckpt")
            shutil.copy(file, pretraining / f"model.ckpt-{step}{suffix}")
    load = bertfast.BertModel.from_pretrained
    with pytest.raises(
        CheckpointError,
        match=r"expected one TensorFlow checkpoint, got bert_model\.ckpt, model\.ckpt-20, model",
    ):
        load(pretraining)
    latest = pretraining / "checkpoint"
    latest.write_text('model_checkpoint_path: "gs://bucket/run/model.ckpt-20"\nall_model')
    (pretraining / "model.ckpt-3.index").write_bytes(b"")
    (pretraining / "bert_model.ckpt.index").write_bytes(b"")
    load(pretraining)
    for note in ("../model.ckpt-4", "", "\0", "x" * 99):
        latest.write_text(f'model_checkpoint_path: "{note}"')
        with pytest.raises(CheckpointError, match="expected one TensorFlow checkpoint, got"):
            load(pretraining)
    latest.unlink()
    latest.mkdir()
    with pytest.raises(CheckpointError, match="expected one TensorFlow checkpoint, got"):
        load(pretraining)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet.ckpt",
            r"bert/embeddings/\.\.\.\), got 2 others: resnet/conv1/bias, resnet/conv1/k",
        ),
        (
            "objects.ckpt",
            r"got 2 others: _CHECKPOINTABLE_OBJECT_GRAPH, .*; tf\.train\.Checkpoint wr",
        ),
        (
            "version_1.ckpt",
            r"^path: .* which is a file, in TensorFlow's old V1 format, which is not",
        ),
        ("partitioned.ckpt", r"expected bert/embeddings/word_embeddings in one piece"),
        ("resnet", r"^path: expected a directory, the prefix of a TensorFlow checkpoint or a hub"),
    ],
)
def test_other_checkpoints_are_named(name, message):
    with pytest.raises(CheckpointError, match=message):
        bertfast.BertModel.from_pretrained(
            FILES / "other" / name, config=bertfast.BertConfig(**CONFIG)
        )


def rebuild(directory, change):
    """Write the index anew with changed entries, all CRCs in order."""
    file = directory / "bert_model.ckpt.index"
    entries = dict(tensorflow.read_table(file))
    change(entries)
    file.write_bytes(tables.table([sorted(entries.items())]))


def entry(dtype=1, shape=(24, 8), shard=0, offset=0, size=768, crc=0, slices=b""):
    """A BundleEntryProto."""

    def field(number, value):
        return tables.varint(number << 3) + tables.varint(value % 2**64)

    def message(number, content):
        return tables.varint(number << 3 | 2) + tables.varint(len(content)) + content

    dimensions = b"".join(message(2, field(1, length)) for length in shape)
    out = field(1, dtype) + message(2, dimensions) + field(3, shard) + field(4, offset)
    return out + field(5, size) + b"\x35" + crc.to_bytes(4, "little") + slices


WORDS = b"bert/embeddings/word_embeddings"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (entry(shape=(2**40, 8)), f"expected {2**45} bytes for bert/emb.*, got 768"),
        (entry(shape=(-1, 8)), r"expected \d{20,} bytes for bert/embeddings/word_embeddings of"),
        (entry(shape=(1,) * 9), r"word_embeddings of at most 8 dimensions"),
        (entry(shape=(24, 8, 1)), r"shapes: .*word_embeddings\.weight is \(24, 8, 1\) where"),
        (entry(shape=(192,)), r"word_embeddings\.weight is \(192,\) where the config"),
        (entry(shape=(8, 24)), r"word_embeddings\.weight is \(8, 24\) where the config"),
        (entry(shape=(0, 8), size=0), r"expected bert/embeddings/word_embeddings with values, got"),
        (entry(shape=(0, 2**62, 2**62), size=0), "word_embeddings with values, got the shape"),
        (entry(dtype=2), "expected 1536 bytes for bert/embeddings/word_embeddings"),
        (entry(dtype=3), "expected bert/embeddings/word_embeddings in one of torch.float32, "),
        (entry(dtype=99), "expected bert/embeddings/word_embeddings in one of torch.float32, "),
        (entry(size=2**62), f"got {2**62}"),
        (entry(shard=1), "word_embeddings in one of 1 shards, got 1"),
        (entry(shard=2**63), "word_embeddings in one of 1 shards, got 9"),
        (entry(offset=-1), r"expected at least \d{20} bytes, which bert/embeddings/word_emb.* got"),
        (entry(offset=18_500), r"expected at least 19268 bytes, .*, got 18848: the file is cut"),
        (entry(crc=1), r"expected bert/embeddings/word_embeddings with the CRC-32C 00000001, got"),
        (entry(slices=b"\x3a\x00"), r"expected bert/embeddings/word_embeddings in one piece"),
        (b"", r"missing: bert\.embeddings\.word_embeddings\.weight"),
        (b"\x08", "expected numbers of 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "expected numbers of 64 bits"),
        (b"\x12\xff\xff\x03", "expected an entry for bert/embeddings/word_embeddings"),
        (b"\x0b", "expected an entry for bert/embeddings/word_embeddings"),
        (b"\x10\x01", "expected an entry for bert/embeddings/word_embeddings"),
    ],
)  # fmt: skip
def test_hostile_entries(value, message, pretraining):
    rebuild(pretraining, lambda entries: entries.update({WORDS: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        bertfast.BertModel.from_pretrained(pretraining)
    assert str(pretraining) in str(caught.value)


HEADER = b"\x08\x01\x1a\x02\x08\x01"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop(b""), "expected a header under the empty key"),
        (lambda e: e.update({b"": b""}), "expected a header under the empty key"),
        (lambda e: e.update({b"": b"\x08\x00"}), "expected 1 to 99999 shards, got 0"),
        (lambda e: e.update({b"": b"\x08" + tables.varint(2**40)}), "99999 shards, got 1099511"),
        (lambda e: e.update({b"": b"\x08\x01\x10\x01"}), "a little-endian machine"),
        (lambda e: e.update({b"": b"\x08\x02"}), "expected the file bert_model.ckpt.data-00000-of"),
        (lambda e: e.update({b"bert/x\xff": entry()}), "expected names of variables"),
        (lambda e: e.update({b"bert/x\n": entry()}), "expected names of variables"),
        (lambda e: e.update({b"bert/encoder/x/kernel": entry()}),
         "unexpected: bert.encoder.x.weight"),
        (lambda e: e.update({b"bert/pooler/dense/gamma": entry(shape=(8, 8), size=256)}),
         "expected one bert.pooler.dense.weight, got bert/pooler/dense/gamma and bert/pooler/dens"),
        (lambda e: e.update({b"bert/pooler/dense/kernel": entry(shape=(2, 4, 8), size=256)}),
         "shapes: bert.pooler.dense.weight is (2, 4, 8) where the config makes it (8, 8)"),
        (lambda e: e.update({b"bert/pooler/dense/kernel": entry(shape=(64,), size=256)}),
         "shapes: bert.pooler.dense.weight is (64,) where the config makes it (8, 8)"),
        (lambda e: e.pop(WORDS), "missing: bert.embeddings.word_embeddings.weight"),
    ],
)  # fmt: skip
def test_hostile_headers_and_names(change, message, pretraining):
    rebuild(pretraining, change)
    with pytest.raises(CheckpointError, match=re.escape(message).replace(r"\.\*", ".*")):
        bertfast.BertModel.from_pretrained(pretraining)


def test_parts_of_partitioned_variables_are_no_variables(pretraining):
    rebuild(pretraining, lambda entries: entries.update({b"\0bert/x\0\1": entry(offset=2**50)}))
    bertfast.BertModel.from_pretrained(pretraining)


def test_sizes_are_compared_before_anything_is_allocated(pretraining):
    """A file that seems to hold 1 TB, with an index that agrees."""
    os.truncate(pretraining / DATA, 2**40)
    huge = entry(shape=(2**35, 8), size=2**40)
    rebuild(pretraining, lambda entries: entries.update({WORDS: huge}))
    with pytest.raises(
        CheckpointError, match=r"shapes: .*word_embeddings\.weight is \(34359738368"
    ):
        bertfast.BertModel.from_pretrained(pretraining)


def test_the_optimizer_s_slots_are_not_read(pretraining):
    """They are a multiple of the weights, and nobody misses a bit of them."""
    variables = Checkpoint(pretraining / "bert_model.ckpt").variables
    data = bytearray((pretraining / DATA).read_bytes())
    for name, variable in variables.items():
        if name.endswith(("adam_m", "adam_v")):
            data[variable.offset] ^= 1
    (pretraining / DATA).write_bytes(data)
    bertfast.BertForPreTraining.from_pretrained(pretraining)
    data[variables["bert/pooler/dense/bias"].offset + 3] ^= 128
    (pretraining / DATA).write_bytes(data)
    with pytest.raises(
        CheckpointError,
        match=rf"{DATA}: expected bert/pooler/dense/bias with the CRC-32C .*: the file is damaged$",
    ):
        bertfast.BertForPreTraining.from_pretrained(pretraining)
    bertfast.BertModel.from_pretrained(pretraining, add_pooling_layer=False)


def test_missing_and_shortened_files(pretraining):
    load = bertfast.BertModel.from_pretrained
    data = (pretraining / DATA).read_bytes()
    (pretraining / DATA).write_bytes(data[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{DATA}: expected at least 18848 bytes, which .*got"
    ):
        load(pretraining)
    (pretraining / DATA).unlink()
    with pytest.raises(
        CheckpointError, match=rf"expected the file {DATA} beside it, which is miss"
    ):
        load(pretraining)
    (pretraining / DATA).mkdir()
    with pytest.raises(
        CheckpointError, match=rf"expected the file {DATA} beside it, which is miss"
    ):
        load(pretraining)
    index = pretraining / "bert_model.ckpt.index"
    for content in (b"", b"x" * 47, index.read_bytes()[:-1]):
        index.write_bytes(content)
        with pytest.raises(
            CheckpointError,
            match=rf"index: expected the index of .*, got {len(content)} bytes start",
        ):
            load(pretraining)
    with open(index, "r+b") as opened:
        opened.truncate(2**24 + 1)
    with pytest.raises(CheckpointError, match=r"index: expected at most 16777216 bytes, got more"):
        load(pretraining)


def test_any_byte_of_the_index_counts_or_does_not_matter(tmp_path):
    """One bit of every third of its 1,840 bytes: the same variables, or an error."""
    directory = Path(shutil.copytree(FILES / "sharded", tmp_path / "sharded"))
    file, prefix = directory / "bert_model.ckpt.index", directory / "bert_model.ckpt"
    data, whole = file.read_bytes(), Checkpoint(prefix).variables
    unseen = 0
    for place in range(0, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            found = Checkpoint(prefix).variables
        except CheckpointError:
            continue
        assert found == whole
        unseen += 1
    # The block of filters is not read, nor what fills the footer up.
    assert unseen < 20


def outcome(directory):
    """Load: the weights' bytes, or None for an error, which names the directory."""
    message = str(directory)
    try:
        model = bertfast.BertModel.from_pretrained(directory)
    except CheckpointError as error:
        model, message = None, str(error)
    assert str(directory) in message
    return model and [p.detach().numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize("name", ["bert_model.ckpt.index", "compressed.index", DATA])
def test_damaged_files(name, pretraining):
    source = FILES / name if name.startswith("comp") else FILES / "pretraining" / name
    target = pretraining / ("bert_model.ckpt.index" if name.endswith(".index") else name)
    sound, whole = source.read_bytes(), outcome(pretraining)

    @SETTINGS
    @given(damaged(len(sound)))
    def check(damage):
        target.write_bytes(damage(sound))
        assert outcome(pretraining) in (None, whole)

    check()


def test_damaged_blocks_with_sound_crcs(pretraining):
    """What a stranger wrote on purpose: anything in a block, and its CRC."""
    file = pretraining / "bert_model.ckpt.index"
    entries = list(tensorflow.read_table(file))[::3]
    plain = tables.block(entries)

    @SETTINGS
    @given(damaged(len(plain)), st.booleans())
    def check(damage, index_too):
        content = damage(plain)
        index = tables.block([(b"z", tables.varint(0) + tables.varint(len(content)))])
        file.write_bytes(one_block(content, damage(index) if index_too else index))
        outcome(pretraining)

    check()


FIELD = st.integers(0, 9).flatmap(
    lambda number: st.one_of(
        st.integers(0, 2**64 - 1).map(lambda v: tables.varint(number << 3) + tables.varint(v)),
        st.binary(max_size=12).map(
            lambda v: tables.varint(number << 3 | 2) + tables.varint(len(v)) + v
        ),
        st.binary(min_size=8, max_size=8).map(lambda v: tables.varint(number << 3 | 1) + v),
        st.binary(min_size=4, max_size=4).map(lambda v: tables.varint(number << 3 | 5) + v),
        st.binary(max_size=3),
    )
)


def test_made_up_entries(pretraining):
    sound = (FILES / "pretraining" / "bert_model.ckpt.index").read_bytes()
    whole = outcome(pretraining)

    @SETTINGS
    @given(
        st.sampled_from([b"", WORDS, b"global_step"]), st.lists(FIELD, max_size=6), st.booleans()
    )
    def check(key, fields, after):
        (pretraining / "bert_model.ckpt.index").write_bytes(sound)
        made_up = b"".join(fields)
        rebuild(pretraining, lambda e: e.update({key: e[key] + made_up if after else made_up}))
        assert outcome(pretraining) in (None, whole)

    check()


def test_an_index_that_unpacks_to_much_more(pretraining):
    """Each in a file of some kB or MB, refused at once and not after hours."""
    file, load = pretraining / "bert_model.ckpt.index", bertfast.BertModel.from_pretrained
    # A block of 1 GB, and a key that grows by one byte with each entry.
    bomb = tables.varint(2**30) + b"\0x" + b"\xfe\1\0" * 1000
    file.write_bytes(tables.table([[(b"a", b"")]], lambda _: bomb))
    with pytest.raises(
        CheckpointError, match="expected an index of at most 16777216 bytes unpacked"
    ):
        load(pretraining)
    growing = b"\0\0" + tables.varint(len(HEADER)) + HEADER
    growing += b"".join(tables.varint(i) + b"\1\0k" for i in range(6000)) + bytes(4)
    file.write_bytes(one_block(growing))
    with pytest.raises(
        CheckpointError, match="expected an index of at most 16777216 bytes unpacked"
    ):
        load(pretraining)
    # One block named over and over.
    block = tables.block([])
    again = [(b"z", tables.varint(0) + tables.varint(len(block)))] * 70_000
    file.write_bytes(one_block(block, tables.block(again)))
    with pytest.raises(
        CheckpointError, match="expected an index of at most 16777216 bytes unpacked"
    ):
        load(pretraining)


def raw(*entries):
    """A block of (shared, key, value) as they are."""
    out = b""
    for shared, key, value in entries:
        out += bytes([shared, len(key), len(value)]) + key + value
    return out + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw((0, b"", HEADER), (0, b"b", b""), (0, b"a", b"")), "expected keys in order, got b'a'"),
        (raw((0, b"", HEADER), (0, b"b", b""), (1, b"", b"")), "expected keys in order, got b'b'"),
        (
            raw((0, b"", HEADER), (1, b"a", b"")),
            "expected entries within their block, got 1, 1, 0 ",
        ),
        (
            raw((0, b"", HEADER))[:-5] + bytes(4),
            "expected entries within their block, got 0, 0, 6 b",
        ),
        (
            raw((0, b"", HEADER))[:-4] + b"\5\0\0\0",
            "expected a block with 5 restarts, got 13 bytes",
        ),
        (b"\0\0\0", "expected a block of 4 bytes or more, got 3"),
    ],
)
def test_malformed_blocks(content, message, pretraining):
    (pretraining / "bert_model.ckpt.index").write_bytes(one_block(content))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        bertfast.BertModel.from_pretrained(pretraining)


def test_a_block_beyond_the_file(pretraining):
    for place in (0, 10, 2**63):
        index = tables.block([(b"z", tables.varint(place) + tables.varint(2**40))])
        (pretraining / "bert_model.ckpt.index").write_bytes(one_block(raw((0, b"", HEADER)), index))
        with pytest.raises(
            CheckpointError, match=r"expected blocks within its \d+ bytes, got one th"
        ):
            bertfast.BertModel.from_pretrained(pretraining)


def one_block(content, index=None):
    """A table of a block and an index block of any content, with their CRCs."""

    def closed(block):
        return block + b"\0" + masked_crc32c(block + b"\0").to_bytes(4, "little")

    index = index or tables.block([(b"z", tables.varint(0) + tables.varint(len(content)))])
    start = len(content) + 5
    footer = b"\0\0" + tables.varint(start) + tables.varint(len(index))
    return closed(content) + closed(index) + footer.ljust(40, b"\0") + tables.MAGIC


def unsnap(data):
    return tensorflow._unsnap(Path("x"), data, tensorflow._Budget(Path("x")))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x00", b""),
        (b"\x03\x08abc", b"abc"),
        (b"\x46\xf0\x45" + b"x" * 70, b"x" * 70),
        (b"\xac\x02\xf4\x2b\x01" + b"y" * 300, b"y" * 300),
        (b"\x03\xf8\x02\x00\x00abc", b"abc"),
        (b"\x03\xfc\x02\x00\x00\x00abc", b"abc"),
        (b"\x07\x08abc\x01\x03", b"abcabca"),
        (b"\x08\x08abc\x12\x03\x00", b"abcabcab"),
        (b"\x08\x08abc\x13\x02\x00\x00\x00", b"abcbcbcb"),
        (b"\x43\x08abc\xfe\x01\x00", b"abc" + b"c" * 64),
    ],
)
def test_snappy(data, expected):
    """Literals with lengths of 0 to 4 bytes; copies of each kind, into themselves too."""
    assert unsnap(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80", b"\x03\x08ab", b"\x04\x08abc", b"\x02\x08abc", b"\x03\xf0", b"\x03\xf4\x02",
        b"\x04\x01\x01", b"\x07\x08abc\x01\x04", b"\x07\x08abc\x01\x00", b"\x07\x08abc\x01",
        b"\x07\x08abc\x02\x01", b"\x06\x08abc\x01\x03", b"\x03\x08abc\x00",
    ],
)  # fmt: skip
def test_bad_snappy(data):
    with pytest.raises(CheckpointError, match="x: expected"):
        unsnap(data)


@given(st.binary(max_size=40))
def test_any_snappy(data):
    message = "x: expected"
    try:
        unsnap(data)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith("x: expected")


def test_nothing_of_tensorflow_is_imported():
    code = (
        "import sys, bertfast\n"
        "for name in ('tensorflow', 'google.protobuf', 'snappy', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        f"bertfast.BertModel.from_pretrained({str(FILES / 'sharded')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
