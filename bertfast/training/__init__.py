"""Pre-training: optimizer, schedule, loop, resumable checkpoints, held-out evaluation."""

from bertfast.training.checkpoint import load_checkpoint, save_checkpoint
from bertfast.training.loop import (
    TrainingConfig,
    evaluate,
    pretrain,
    training_step,
    trivial_baselines,
)
from bertfast.training.optim import (
    AdamWithoutBiasCorrection,
    adamw,
    linear_schedule,
    parameter_groups,
)

__all__ = [
    "AdamWithoutBiasCorrection",
    "TrainingConfig",
    "adamw",
    "evaluate",
    "linear_schedule",
    "load_checkpoint",
    "parameter_groups",
    "pretrain",
    "save_checkpoint",
    "training_step",
    "trivial_baselines",
]
