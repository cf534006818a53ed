"""The pre-training loop, and the held-out evaluation."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bertfast.data.batching import group, pack, to_device
from bertfast.data.masking import IGNORE
from bertfast.data.pretraining import Example, PretrainingData
from bertfast.training.checkpoint import read_checkpoint, restore, save_checkpoint
from bertfast.training.optim import adamw, check_adamw, linear_schedule


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Give ``steps``, ``minutes`` or both (whichever ends first); ``steps`` alone is
    reproducible bit for bit, because the schedule of a time budget follows the clock.

    steps: optimizer steps. minutes: wall-clock time.
    batch_sequences or batch_tokens: size of a batch, exactly one of them.
    lr: highest learning rate. warmup: share of the run in which it rises linearly; it then falls
    linearly to 0. weight_decay, betas, eps, bias_correction: see ``adamw``.
    clip: largest norm of the whole gradient. bf16: run under bfloat16 autocast.
    seed: of dropout, at least 0. log_every: steps between two entries of the history.
    checkpoint_every: steps between two checkpoints; None saves at the end only.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_sequences: int | None = None
    batch_tokens: int | None = None
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps, minutes: expected at least one of them, got neither")
        for name, optional in (("steps", True), ("batch_sequences", True), ("batch_tokens", True),
                               ("log_every", False), ("checkpoint_every", True),
                               ("seed", False)):  # fmt: skip
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("minutes", "clip", "lr", "warmup", "weight_decay", "eps"):
            value = getattr(self, name)
            if value is None and name == "minutes":
                continue
            if not _is_number(value):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if name in ("minutes", "clip") and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
        for name in ("bias_correction", "bf16"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not isinstance(self.betas, tuple | list) or not all(map(_is_number, self.betas)):
            raise TypeError(f"betas: expected two numbers, got {self.betas!r}")
        check_adamw(self.lr, self.betas, self.eps, self.weight_decay)
        linear_schedule(0.0, self.warmup)
        next(group([], sequences=self.batch_sequences, tokens=self.batch_tokens), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pretrain(
    model: nn.Module,
    data: PretrainingData,
    config: TrainingConfig,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Pre-train a ``BertForPreTraining`` in place on ``data``; returns the history.

    The history has an entry every ``log_every`` steps and one at the end: ``step``, ``epoch``,
    ``loss``, ``mlm_loss``, ``nsp_loss`` (means since the entry before, in nats), ``lr``,
    ``tokens`` (so far) and ``seconds`` (of training so far).

    Dropout seeds come from torch's CPU generator, which is seeded with ``config.seed`` here and
    put back into the caller's state at the end.

    Args:
        model: on the device to train on; left in the mode (train or eval) it came in.
        data: gives the examples of every epoch.
        config: see ``TrainingConfig``.
        checkpoint: file to save to every ``config.checkpoint_every`` steps and at the end.
        resume: go on from ``checkpoint`` if that file exists. With a budget in steps the outcome
            is bitwise that of a run that was never interrupted.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the checkpoint is damaged, or of another model, data set or config.
        FloatingPointError: the loss or the gradient became infinite or NaN; it is not saved.
    """
    device = next(model.parameters()).device
    optimizer = adamw(
        model,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
    )
    run = {"config": asdict(config), "data": data.fingerprint()}
    state = _State(recent=torch.zeros(4, dtype=torch.float32, device=device))
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        if resume and checkpoint is not None and os.path.exists(checkpoint):
            state = _resume(checkpoint, model, optimizer, run)
        # As if this run had begun when the interrupted one did.
        start = time.perf_counter() - state.seconds
        bar = _bar(config, disable=not progress)
        model.train()
        try:
            while _progress(config, state) < 1:
                examples = data.epoch(state.epoch)
                sizes = {"sequences": config.batch_sequences, "tokens": config.batch_tokens}
                batches = list(group(examples, **sizes))
                while state.batch < len(batches) and _progress(config, state) < 1:
                    # From the middle of the step: neither the first nor the last has rate 0.
                    factor = linear_schedule(_progress(config, state, ahead=0.5), config.warmup)
                    for parameters in optimizer.param_groups:
                        parameters["lr"] = config.lr * factor
                    batch = to_device(pack(batches[state.batch]), device)
                    state.recent += _step(model, optimizer, batch, config.clip, config.bf16)
                    state.step += 1
                    state.batch += 1
                    state.tokens += batch["input_ids"].numel()
                    state.seconds = time.perf_counter() - start
                    if state.step % config.log_every == 0:
                        _log(state, optimizer, bar)
                    done = state.seconds if config.steps is None else state.step
                    # The last step of a time budget ends a little after it.
                    bar.update(min(done, bar.total) - bar.n)
                    if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                        _save(checkpoint, model, optimizer, run, state)
                if state.batch == len(batches):
                    state.epoch, state.batch = state.epoch + 1, 0
            if state.step > (state.history[-1]["step"] if state.history else 0):
                _log(state, optimizer, bar)
            _save(checkpoint, model, optimizer, run, state)
        finally:
            bar.close()
            model.train(was_training)
    return state.history


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    clip: float = 1.0,
    bf16: bool = False,
) -> Tensor:
    """One forward, backward, clipping and update on one batch (see ``pack``), on its device.

    Returns the loss, its masked-token part and its next-sentence part: fp32 ``(3,)``, in nats,
    on the device (reading it is left to the caller, so that a GPU need not be waited for).
    """
    return _step(model, optimizer, batch, clip, bf16)[:3]


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    clip: float,
    bf16: bool,
) -> Tensor:
    """What ``training_step`` says, and as a fourth number the gradient's norm before clipping."""
    device = batch["input_ids"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = model(**batch, return_dict=True)
    optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    loss = out.loss.detach().float()
    logits = out.seq_relationship_logits.detach().float()
    nsp_loss = F.cross_entropy(logits, batch["next_sentence_label"])
    return torch.stack([loss, loss - nsp_loss, nsp_loss, norm.float()])


@dataclass
class _State:
    """Where a run is; ``batch`` counts within the epoch, ``recent`` sums the losses and the
    gradient's norms since the last entry of the history."""

    recent: Tensor
    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def _progress(config: TrainingConfig, state: _State, ahead: float = 0.0) -> float:
    by_steps = (state.step + ahead) / config.steps if config.steps is not None else 0.0
    by_time = state.seconds / (60 * config.minutes) if config.minutes is not None else 0.0
    return max(by_steps, by_time)


def _log(state: _State, optimizer: torch.optim.Optimizer, bar: "tqdm[Any]") -> None:
    steps = state.step - (state.history[-1]["step"] if state.history else 0)
    loss, mlm_loss, nsp_loss, norm = (state.recent / steps).tolist()
    for name, value in (("loss", loss), ("gradient's norm", norm)):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at step {state.step}; a lower learning rate may help"
            )
    state.history.append(
        {
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            "mlm_loss": mlm_loss,
            "nsp_loss": nsp_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens": state.tokens,
            "seconds": state.seconds,
        }
    )
    state.recent.zero_()
    bar.set_postfix_str(f"mlm {mlm_loss:.3f}, nsp {nsp_loss:.3f}", refresh=False)


def _bar(config: TrainingConfig, disable: bool) -> "tqdm[Any]":
    if config.steps is not None:
        return tqdm(total=config.steps, unit="step", disable=disable, dynamic_ncols=True)
    assert config.minutes is not None
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    total = 60 * config.minutes
    return tqdm(total=total, bar_format=layout, disable=disable, dynamic_ncols=True)


def _save(
    checkpoint: str | os.PathLike[str] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    state: _State,
) -> None:
    if checkpoint is None:
        return
    if not state.recent.isfinite().all():
        raise FloatingPointError(
            f"the loss or the gradient became infinite or NaN up to step {state.step}"
        )
    save_checkpoint(checkpoint, model, optimizer, {"run": run, "state": vars(state)})


def _resume(
    checkpoint: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> _State:
    """Compare everything first, so that a refused checkpoint leaves the model as it was."""
    content = read_checkpoint(checkpoint, model, optimizer)
    state = _saved_state(os.fspath(checkpoint), content["progress"])
    for kind, now in run.items():
        saved = content["progress"]["run"][kind]
        for name in now:
            if now[name] != saved.get(name):
                raise ValueError(
                    f"{os.fspath(checkpoint)}: expected a checkpoint of this run, got one with "
                    f"{kind} {name}={saved.get(name)!r} instead of {now[name]!r}"
                )
    restore(content, model, optimizer)
    state.recent = state.recent.to(next(model.parameters()).device)
    return state


def _saved_state(path: str, progress: Any) -> _State:
    parts = {"run": {"config", "data"}, "state": {f.name for f in fields(_State)}}
    sound = isinstance(progress, dict) and all(
        isinstance(progress.get(part), dict) and progress[part].keys() == names
        for part, names in parts.items()
    )
    if sound and all(isinstance(part, dict) for part in progress["run"].values()):
        recent = progress["state"]["recent"]
        if isinstance(recent, Tensor) and recent.shape == (4,) and recent.dtype == torch.float32:
            return _State(**progress["state"])
    raise ValueError(f"{path}: expected a checkpoint of pretrain, got one with another progress")


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], *, batch_tokens: int = 4096
) -> dict[str, float]:
    """How well a ``BertForPreTraining`` does on held-out examples, in eval mode.

    Returns ``mlm_accuracy`` (share of predicted positions whose most probable token is right) and
    ``mlm_loss`` (mean over the same, nats) over ``mlm_predictions`` positions; ``nsp_accuracy``
    and ``nsp_loss`` over ``sequences`` examples. An average over nothing is NaN.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    right = np.zeros(2)
    loss = np.zeros(2)
    count = np.zeros(2)
    try:
        for chunk in group(examples, tokens=batch_tokens):
            batch = to_device(pack(chunk), device)
            labels, is_random = batch.pop("labels"), batch.pop("next_sentence_label")
            out = model(**batch, return_dict=True)
            predicted = labels != IGNORE
            pairs = (
                (out.prediction_logits[predicted].float(), labels[predicted]),
                (out.seq_relationship_logits.float(), is_random),
            )
            for i, (logits, target) in enumerate(pairs):
                right[i] += (logits.argmax(-1) == target).sum().item()
                loss[i] += F.cross_entropy(logits, target, reduction="sum").item()
                count[i] += target.numel()
    finally:
        model.train(was_training)
    with np.errstate(invalid="ignore"):
        accuracy, mean_loss = right / count, loss / count
    return {
        "mlm_accuracy": float(accuracy[0]),
        "mlm_loss": float(mean_loss[0]),
        "mlm_predictions": int(count[0]),
        "nsp_accuracy": float(accuracy[1]),
        "nsp_loss": float(mean_loss[1]),
        "sequences": int(count[1]),
    }


def trivial_baselines(
    documents: Sequence[Sequence[np.ndarray]], examples: Sequence[Example]
) -> dict[str, float]:
    """What a model that has read nothing but counts would score on ``examples``.

    ``mlm_accuracy``: always the most frequent token of the training ``documents`` (``mlm_token``
    is its id). ``nsp_accuracy``: always the label that is more frequent in ``examples``.
    """
    tokens = np.concatenate([sentence for document in documents for sentence in document])
    most_frequent = int(np.bincount(tokens).argmax())
    labels = np.concatenate([example.labels for example in examples])
    labels = labels[labels != IGNORE]
    random_share = float(np.mean([example.next_sentence_label for example in examples]))
    return {
        "mlm_accuracy": float(np.mean(labels == most_frequent)),
        "mlm_token": most_frequent,
        "nsp_accuracy": max(random_share, 1 - random_share),
    }
