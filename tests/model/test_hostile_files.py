"""Files that were cut, flipped, swapped or made up: a clear error, never a crash.

Hypothesis damages real files; only bertfast's errors may come out, or a model whose weights have
the shapes of the config.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import bertfast
from bertfast.errors import CheckpointError

SETTINGS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a tiny checkpoint in each format."""
    config = bertfast.BertConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=3, max_position_embeddings=4,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("sound")
    bertfast.BertModel(config).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    contents = {
        "config.json": (directory / "config.json").read_bytes(),
        "model.safetensors": (directory / "model.safetensors").read_bytes(),
    }
    for name, zipped in (("pytorch_model.bin", True), ("legacy.bin", False)):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
        contents[name] = buffer.getvalue()
    return contents


def load(directory, contents):
    """Load the files; a :class:`CheckpointError` that names the directory counts as well."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = bertfast.BertModel.from_pretrained(directory)
        except CheckpointError as error:
            return str(error)
    for parameter in model.parameters():
        assert parameter.dtype.is_floating_point
    model(torch.zeros(1, 1, dtype=torch.long))
    return str(directory)


@st.composite
def damaged(draw, length):
    """A way to damage ``length`` bytes: a function from bytes to bytes."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "overwrite", "double"]))
    # Half of all damage goes to the first bytes, where headers are.
    at = draw(st.integers(0, min(length, 300)) | st.integers(0, length))
    piece = draw(st.binary(min_size=1, max_size=9))
    if kind == "cut":
        return lambda data: data[:at]
    if kind == "flip":

        def flip(data):
            hit = data[at : at + len(piece)]
            flipped = bytes(b ^ p for b, p in zip(hit, piece, strict=False))
            return data[:at] + flipped + data[at + len(piece) :]

        return flip
    if kind == "insert":
        return lambda data: data[:at] + piece + data[at:]
    if kind == "overwrite":
        return lambda data: data[:at] + piece + data[at + len(piece) :]
    return lambda data: data + data[:at]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
def test_damaged_weights(name, files, tmp_path):
    @SETTINGS
    @given(damaged(len(files[name])))
    def run(damage):
        file = "pytorch_model.bin" if name == "legacy.bin" else name
        contents = {"config.json": files["config.json"], file: damage(files[name])}
        assert str(tmp_path) in load(tmp_path / "model", contents)

    run()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_foreign_weights(name, files, tmp_path):
    @SETTINGS
    @given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
    def run(content):
        contents = {"config.json": files["config.json"], name: content}
        assert f"{name}: expected a" in load(tmp_path / "model", contents)

    run()


HEADER = st.dictionaries(
    st.sampled_from(["__metadata__", "embeddings.LayerNorm.bias", "pooler.dense.bias", "x"]),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "U16", "C64", "Q9"]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**63, 2**64]), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40) | st.just(2**62), min_size=1, max_size=3),
    }),
    max_size=3,
)  # fmt: skip


def test_made_up_safetensors_headers(files, tmp_path):
    @SETTINGS
    @given(HEADER, st.binary(max_size=64), st.integers(-3, 3))
    def run(header, data, wrong):
        text = json.dumps(header).encode()
        content = max(len(text) + wrong, 0).to_bytes(8, "little") + text + data
        contents = {"config.json": files["config.json"], "model.safetensors": content}
        assert "model.safetensors: " in load(tmp_path / "model", contents)

    run()


def test_headers_that_promise_too_much(files, tmp_path):
    for length in (2**63, 2**64 - 1, 2**32, 100_000_001):
        content = length.to_bytes(8, "little") + b"{}"
        contents = {"config.json": files["config.json"], "model.safetensors": content}
        message = load(tmp_path / "model", contents)
        assert "model.safetensors: expected a safetensors file, got 10 bytes starting b'" in message


VALUES = (
    st.sampled_from(["", "bert", None, True, -1, 0, 1, 10**12, 10**30, 0.5, 1e308, [], {}])
    | st.integers(-2, 50)
    | st.just(float("nan"))
)


def test_mutated_configs(files, tmp_path):
    sound = json.loads(files["config.json"])

    @SETTINGS
    @given(st.dictionaries(st.sampled_from([*sound, "num_labels"]), VALUES, min_size=1, max_size=3))
    def run(changes):
        config = json.dumps({**sound, **changes}).encode()
        contents = {"config.json": config, "model.safetensors": files["model.safetensors"]}
        assert str(tmp_path) in load(tmp_path / "model", contents)

    run()


def test_damaged_configs(files, tmp_path):
    @SETTINGS
    @given(damaged(len(files["config.json"])))
    def run(damage):
        contents = {**files, "config.json": damage(files["config.json"])}
        assert str(tmp_path) in load(tmp_path / "model", contents)

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


def test_made_up_indices(files, tmp_path):
    @SETTINGS
    @given(st.fixed_dictionaries({"weight_map": JSON}) | JSON)
    def run(index):
        contents = {
            "config.json": files["config.json"],
            "model.safetensors.index.json": json.dumps(index).encode(),
        }
        assert "model.safetensors.index.json: " in load(tmp_path / "model", contents)

    run()
