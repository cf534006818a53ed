"""Checkpoints: whole or not at all, and no foreign file gets through."""

import pickle

import pytest
import torch

from bertfast.training import adamw, checkpoint, load_checkpoint, save_checkpoint


def model_and_optimizer(width: int = 3):
    model = torch.nn.Linear(width, 2)
    optimizer = adamw(model)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_round_trip_restores_weights_moments_and_generator(tmp_path) -> None:
    path = tmp_path / "c.pt"
    model, optimizer = model_and_optimizer()
    progress = {"step": 3, "history": [{"loss": 0.1}], "betas": (0.9, 0.99), "name": "x"}
    save_checkpoint(path, model, optimizer, progress)
    expected = torch.rand(3)
    other, other_optimizer = model_and_optimizer()
    assert load_checkpoint(path, other, other_optimizer) == progress
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(other.weight, model.weight)
    moments = [o.state_dict()["state"] for o in (optimizer, other_optimizer)]
    for key in moments[0]:
        for name in moments[0][key]:
            assert torch.equal(moments[0][key][name], moments[1][key][name])


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "c.pt"
    model, optimizer = model_and_optimizer()
    save_checkpoint(path, model, optimizer, {"step": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, model, optimizer, {"step": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert load_checkpoint(path, model, optimizer) == {"step": 1}


class Dangerous:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_and_damaged_files_are_refused_by_name(tmp_path) -> None:
    model, optimizer = model_and_optimizer()
    good = tmp_path / "good.pt"
    save_checkpoint(good, model, optimizer, {})
    whole = good.read_bytes()
    files = {
        "empty.pt": b"",
        "text.pt": b"hello",
        "cut.pt": whole[: len(whole) // 2],
        "code.pt": pickle.dumps(Dangerous()),
    }
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "other.pt", "list.pt"]:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name, model, optimizer)
    with pytest.raises(ValueError, match=r"good.pt: expected a checkpoint of this model"):
        load_checkpoint(good, *model_and_optimizer(width=4))
    with pytest.raises(FileNotFoundError, match=r"missing.pt"):
        load_checkpoint(tmp_path / "missing.pt", model, optimizer)
