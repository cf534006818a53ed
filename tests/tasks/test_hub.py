"""Tasks of models on the hub, and of checkpoints with more in them than the model."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertfast import tasks
from bertfast.errors import CheckpointError

pytest.importorskip("huggingface_hub")

ID, SHA = "some-org/tiny-bert", "0123456789" * 4


@pytest.mark.parametrize(
    ("name", "kind"), [("Embed", "BertModel"), ("FillMask", "BertForMaskedLM")]
)
def test_revision_cache_and_ignored_tensors(name, kind, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("huggingface_hub.constants"), "HF_HUB_CACHE", str(tmp_path / "none")
    )
    repository = tmp_path / "hub" / "models--some-org--tiny-bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text(SHA)
    snapshot = repository / "snapshots" / SHA
    shutil.copytree(make_model(kind), snapshot)
    load = getattr(tasks, name).from_pretrained
    found = {"revision": "v2", "cache_dir": tmp_path / "hub", "local_files_only": True}
    expected = load(make_model(kind))
    for key, value in load(ID, **found).model.state_dict().items():
        assert value.equal(expected.model.state_dict()[key]), key
    with pytest.raises(CheckpointError, match="some-org/tiny-bert"):
        load(ID, revision="v2")
    file = snapshot / "model.safetensors"
    save_file({**load_file(file), "species.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"species\.weight"):
        load(ID, **found)
    assert load(ID, **found, ignore=["species.*"]).model.config == expected.model.config
