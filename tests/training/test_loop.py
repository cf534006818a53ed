"""The loop learns, stops, logs, and resumes bit for bit."""

import math

import numpy as np
import pytest
import torch

from bertfast.data import group, pack
from bertfast.training import TrainingConfig, evaluate, loop, pretrain, trivial_baselines


def settings(**changes) -> TrainingConfig:
    plain = {"steps": 12, "batch_sequences": 8, "lr": 1e-3, "log_every": 5}
    return TrainingConfig(**{**plain, **changes})


def state(model) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_seconds(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def test_it_learns_what_counting_cannot(new_model, toy_data) -> None:
    model = new_model(dropout=0.0, layers=1)
    config = settings(steps=150, batch_sequences=16, lr=1e-2)
    history = pretrain(model, toy_data, config, progress=False)
    assert history[-1]["mlm_loss"] < 0.5 * history[0]["mlm_loss"]
    assert history[-1]["loss"] == pytest.approx(
        history[-1]["mlm_loss"] + history[-1]["nsp_loss"], rel=1e-5
    )
    held_out = toy_data.epoch(10**6)
    scores = evaluate(model, held_out)
    trivial = trivial_baselines(toy_data.documents, held_out)
    assert trivial["mlm_accuracy"] < 0.4
    assert scores["mlm_accuracy"] > trivial["mlm_accuracy"] + 0.3
    assert scores["mlm_predictions"] == sum((e.labels != -100).sum() for e in held_out)
    assert scores["sequences"] == len(held_out)


def test_history_and_generator(new_model, toy_data) -> None:
    model = new_model().eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    history = pretrain(model, toy_data, settings(), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert [entry["step"] for entry in history] == [5, 10, 12]
    batches = [len(list(group(toy_data.epoch(e), sequences=8))) for e in range(20)]
    assert history[-1]["epoch"] == np.searchsorted(np.cumsum(batches), 12)
    assert history[0]["lr"] > history[-1]["lr"] > 0
    first_five = list(group(toy_data.epoch(0), sequences=8))[:5]
    if len(first_five) == 5:
        assert history[0]["tokens"] == sum(len(e.input_ids) for g in first_five for e in g)


def test_same_seed_same_bits(new_model, toy_data) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = new_model()
        pretrain(model, toy_data, settings(seed=seed), progress=False)
        runs.append(state(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("bias_correction", [True, False])
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    new_model, toy_data, tmp_path, monkeypatch, bias_correction
) -> None:
    # Checkpoints fall inside a logging window and inside an epoch.
    config = settings(steps=23, checkpoint_every=4, bias_correction=bias_correction)
    whole = new_model()
    history = pretrain(whole, toy_data, config, progress=False)

    path = tmp_path / "checkpoint.pt"
    packed = 0

    def pack_until_interrupted(examples):
        nonlocal packed
        packed += 1
        if packed in (7, 7 + 12):
            raise Interrupted
        return pack(examples)

    monkeypatch.setattr(loop, "pack", pack_until_interrupted)
    for attempt in range(3):
        # Once there is a checkpoint, the model's weights and the generator's state do not matter.
        model = new_model(seed=attempt)
        torch.manual_seed(attempt)
        try:
            resumed = pretrain(
                model, toy_data, config, checkpoint=path, resume=True, progress=False
            )
        except Interrupted:
            assert path.exists()
    assert attempt == 2
    assert packed > 23
    assert same(state(whole), state(model))
    assert without_seconds(resumed) == without_seconds(history)
    # Resuming a finished run does nothing.
    again = new_model(seed=7)
    resumed = pretrain(again, toy_data, config, checkpoint=path, resume=True, progress=False)
    assert same(state(whole), state(again))
    assert without_seconds(resumed) == without_seconds(history)


def test_resuming_another_run_is_refused(new_model, toy_data, tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    pretrain(new_model(), toy_data, settings(steps=2), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"checkpoint of this run, got one with config lr=0.001"):
        pretrain(new_model(), toy_data, settings(steps=2, lr=1e-4), checkpoint=path, resume=True)
    other = type(toy_data)(toy_data.documents, toy_data.vocab, max_length=20, seed=2)
    with pytest.raises(ValueError, match="got one with data seed=1 instead of 2"):
        pretrain(new_model(), other, settings(steps=2), checkpoint=path, resume=True)


def test_a_refused_checkpoint_changes_nothing(new_model, toy_data, tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    pretrain(new_model(), toy_data, settings(steps=2), checkpoint=path, progress=False)
    model = new_model(seed=1)
    before = state(model)
    content = torch.load(path, weights_only=True)
    foreign = [
        content["progress"],
        {"step": 1},
        {**content["progress"], "state": {}},
        {**content["progress"], "run": {"config": {}, "data": 1}},
    ]
    for progress in foreign:
        torch.save({**content, "progress": progress}, path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: expected a checkpoint of"):
            pretrain(model, toy_data, settings(steps=3), checkpoint=path, resume=True)
        assert same(before, state(model))


def test_time_budget_ends(new_model, toy_data) -> None:
    config = settings(steps=None, minutes=0.5 / 60, log_every=1)
    history = pretrain(new_model(), toy_data, config, progress=False)
    assert history[-1]["seconds"] >= 0.5
    assert len(history) < 2 or history[-2]["seconds"] < 0.5
    assert history[0]["lr"] < config.lr


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(new_model, toy_data, tmp_path) -> None:
    model = new_model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    path = tmp_path / "checkpoint.pt"
    config = settings(checkpoint_every=2)
    with pytest.raises(FloatingPointError):
        pretrain(model, toy_data, config, checkpoint=path, progress=False)
    assert not path.exists()


def test_a_gradient_that_is_not_finite_stops_the_run_unsaved(new_model, toy_data, tmp_path) -> None:
    """In the last step, where no loss is computed from the spoilt parameters."""
    model = new_model()
    calls = 0

    def spoil(gradient):
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls == 3 else gradient

    model.cls.seq_relationship.bias.register_hook(spoil)
    path = tmp_path / "checkpoint.pt"
    for changes in ({"log_every": 1}, {"log_every": 5}, {"log_every": 5, "checkpoint_every": 3}):
        calls = 0
        with pytest.raises(FloatingPointError, match="gradient"):
            pretrain(model, toy_data, settings(steps=3, **changes), checkpoint=path, progress=False)
        assert not path.exists()
        model.load_state_dict(new_model().state_dict())


def test_bf16_autocast_trains(new_model, toy_data) -> None:
    model = new_model()
    history = pretrain(model, toy_data, settings(steps=30, bf16=True, lr=4e-3), progress=False)
    assert history[-1]["mlm_loss"] < history[0]["mlm_loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_evaluate_does_not_depend_on_batches_and_keeps_the_mode(new_model, toy_data) -> None:
    model = new_model().train()
    examples = toy_data.epoch(0)
    one = evaluate(model, examples, batch_tokens=10**6)
    many = evaluate(model, examples, batch_tokens=50)
    assert model.training
    assert one == pytest.approx(many, rel=1e-4)
    assert math.isnan(evaluate(model, [])["mlm_accuracy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps, minutes: expected at least one"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"minutes": 0.0}, "minutes: expected a finite number above 0"),
        ({"minutes": math.inf}, "minutes: expected a finite number above 0"),
        ({"clip": -1.0}, "clip: expected"),
        ({"log_every": 0}, "log_every: expected"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected"),
        ({"warmup": 1.0}, "warmup: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"batch_sequences": None}, "sequences, tokens: expected exactly one"),
        ({"batch_tokens": 5}, "sequences, tokens: expected exactly one"),
        ({"batch_sequences": 0}, "sequences: expected at least 1"),
    ],
)
def test_config_refuses(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 1.5}, TypeError, "steps: expected an integer, got 1.5"),
        ({"steps": "5"}, TypeError, "steps: expected an integer, got '5'"),
        ({"log_every": None}, TypeError, "log_every: expected an integer, got None"),
        ({"minutes": "5"}, TypeError, "minutes: expected a number, got '5'"),
        ({"lr": -1}, ValueError, "lr: expected a finite number of at least 0, got -1"),
        ({"eps": math.nan}, ValueError, "eps: expected a finite number"),
        ({"betas": (2,)}, ValueError, r"betas: expected two numbers in \[0, 1\), got \(2,\)"),
        ({"betas": 0.9}, TypeError, "betas: expected two numbers, got 0.9"),
        ({"bf16": "no"}, TypeError, "bf16: expected True or False, got 'no'"),
    ],
)
def test_config_refuses_what_only_fails_later(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        settings(**changes)
