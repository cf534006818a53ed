"""Models of the hub: the cache's layout on disk, the client replaced where it would go online."""

from __future__ import annotations

import fnmatch
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bertfast
from bertfast.errors import CheckpointError
from bertfast.model.hub import wanted
from bertfast.model.sources import directory_of

hub = pytest.importorskip("huggingface_hub")

ID, SHA, OTHER = "some-org/tiny-bert", "0123456789" * 4, "f" * 40
FILES = Path(__file__).parent / "tensorflow"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which is the one the client looks into."""
    monkeypatch.setattr(
        importlib.import_module("huggingface_hub.constants"), "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return tmp_path / "hub"


@pytest.fixture
def model(tiny_config):
    return bertfast.BertForMaskedLM(tiny_config())


def put(cache, sha=SHA, name=ID, ref="main"):
    """The directory of a snapshot, as the client leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(sha)
    return snapshot


def same(a, b):
    return a.get_input_embeddings().weight.equal(b.get_input_embeddings().weight)


def test_the_cache_is_enough(cache, model):
    model.save_pretrained(put(cache))
    assert same(bertfast.BertForMaskedLM.from_pretrained(ID), model)
    assert directory_of(ID) == cache / "models--some-org--tiny-bert" / "snapshots" / SHA


def test_revisions(cache, model, tiny_config):
    model.save_pretrained(put(cache))
    other = bertfast.BertForMaskedLM(tiny_config())
    other.save_pretrained(put(cache, OTHER, ref="v2"))
    load = bertfast.BertForMaskedLM.from_pretrained
    assert same(load(ID), model)
    assert same(load(ID, revision="v2"), other)
    assert same(load(ID, revision=OTHER), other)
    with pytest.raises(
        CheckpointError, match=r"'some-org/tiny-bert', which is no directory here; "
    ):
        load(ID, revision="v3")
    with pytest.raises(TypeError, match=r"^revision: expected a string or None, got int"):
        load(ID, revision=3)


def test_a_tensorflow_checkpoint(cache):
    snapshot = put(cache, name="tiny")
    for file in (FILES / "pretraining").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    assert bertfast.BertModel.from_pretrained("tiny").config.hidden_act == "gelu_new"


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d-e"]
)
def test_what_is_not_there_offline(name, cache):
    with pytest.raises(
        CheckpointError,
        match=rf"^path: expected a directory or a hub id, got '{name}', which is no directory "
        r"here; the hub does not give it: .*[Oo]ffline",
    ):
        bertfast.BertModel.from_pretrained(name)


@pytest.mark.parametrize("name", ["a//b", "a/b/c", "-a", "a b", "x" * 97, "ä", ".", "..", "a/", ""])
def test_what_is_no_id_does_not_go_there(name, cache, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(hub, "HfApi", None)
    with pytest.raises(CheckpointError, match=r"which is none of them|expected one of model\.safe"):
        bertfast.BertModel.from_pretrained(name)


def test_a_cached_model_without_weights_is_said(cache, model):
    snapshot = put(cache)
    model.save_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{SHA}: expected one of .*, got config\.json$"):
        bertfast.BertModel.from_pretrained(ID)


def test_a_directory_of_that_name_comes_first(cache, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HfApi", None)
    model.save_pretrained(ID)
    assert same(bertfast.BertForMaskedLM.from_pretrained(ID), model)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"needs huggingface_hub: pip install 'bertfast\[hub\]'"
    ):
        bertfast.BertModel.from_pretrained(ID)


class Online:
    """The client as it is online, for one repository: which requests it got, and its answers."""

    def __init__(self, files, cache, model):
        self.files, self.cache, self.model, self.downloads = files, cache, model, []

    def model_info(self, repo_id, *, revision, timeout):
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.files]
        return types.SimpleNamespace(siblings=siblings, sha=SHA)

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        assert (repo_id, revision) == (ID, SHA)
        self.downloads = [
            n for n in self.files if any(fnmatch.fnmatchcase(n, p) for p in allow_patterns)
        ]
        snapshot = put(self.cache)
        self.model.save_pretrained(snapshot)
        return str(snapshot)


def test_only_what_is_needed_is_downloaded(cache, model, monkeypatch):
    files = [
        "README.md",
        "config.json",
        "flax_model.msgpack",
        "model.safetensors",
        "onnx/model.onnx",
    ]
    files += [
        "pytorch_model.bin",
        "tf_model.h5",
        "vocab.txt",
        "tokenizer.json",
        "1_Pooling/config.json",
    ]
    online = Online(files, cache, model)
    monkeypatch.setattr(hub, "HfApi", lambda: online)
    monkeypatch.setattr(hub, "snapshot_download", online.snapshot_download)
    assert same(bertfast.BertForMaskedLM.from_pretrained(ID), model)
    assert sorted(online.downloads) == [
        "1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip


def test_a_repository_without_weights(cache, model, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: Online(["config.json", "tf_model.h5"], cache, model))
    with pytest.raises(
        CheckpointError,
        match=r"on the hub it has none of model\.safetensors, .* config\.json, tf_mod",
    ):
        bertfast.BertModel.from_pretrained(ID)


def test_a_download_that_breaks_off(cache, model, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("connection lost\nat line 3")

    monkeypatch.setattr(hub, "HfApi", lambda: Online(["model.safetensors"], cache, model))
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"here; downloading failed: connection lost at line 3$"
    ):
        bertfast.BertModel.from_pretrained(ID)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json",
          "model-00002-of-00002.safetensors", "other-00001-of-00002.safetensors",
          "pytorch_model.bin"],
         ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "model.safetensors.index.json"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "x.bin"],
         ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]),
        (["pytorch_model.bin", "bert_model.ckpt.index", "bert_config.json"],
         ["bert_config.json", "pytorch_model.bin"]),
        (["bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001", "bert_model.ckpt.meta",
          "bert_config.json", "vocab.txt", "checkpoint", "sub/model.safetensors"],
         ["bert_config.json", "bert_model.ckpt.data-00000-of-00001", "bert_model.ckpt.index",
          "checkpoint", "vocab.txt"]),
        (["config.json", "sub/model.safetensors"], []),
        ([], []),
    ],
)  # fmt: skip
def test_wanted(names, expected):
    assert wanted(names) == expected


def test_the_client_s_own_settings_hold(tmp_path, model):
    model.save_pretrained(put(tmp_path / "home" / "hub"))
    code = f"import bertfast; bertfast.BertForMaskedLM.from_pretrained({ID!r})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    for home, works in ((tmp_path / "home", True), (tmp_path / "nothing", False)):
        done = subprocess.run(
            [sys.executable, "-P", "-W", "error", "-c", code], capture_output=True, text=True,
            env={**environment, "HF_HOME": str(home)}, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode == 0) == works, done.stderr
    assert "the hub does not give it" in done.stderr


def test_local_files_only(cache, model, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)  # nobody asks the hub
    with pytest.raises(CheckpointError, match=r"nor in the hub's cache \(local_files_only\)$"):
        bertfast.BertForMaskedLM.from_pretrained(ID, local_files_only=True)
    model.save_pretrained(put(cache))
    assert same(bertfast.BertForMaskedLM.from_pretrained(ID, local_files_only=True), model)


def test_a_cache_and_a_token_of_the_caller_s(cache, model, monkeypatch, tmp_path):
    model.save_pretrained(put(tmp_path / "mine"))
    load = bertfast.BertForMaskedLM.from_pretrained
    assert same(load(ID, cache_dir=tmp_path / "mine", local_files_only=True), model)
    online, given = Online(["config.json", "model.safetensors"], cache, model), []

    def api(**identity):
        given.append(identity)
        return online

    def download(repo_id, *, cache_dir, token, **options):
        given.append({"cache_dir": cache_dir, "token": token})
        return online.snapshot_download(repo_id, **options)

    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert same(load(ID, cache_dir="there", token="secret"), model)
    assert given == [{"token": "secret"}, {"cache_dir": "there", "token": "secret"}]
