"""Optimizer and learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from unitdist.config.checks import require
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer. Norm parameters (weight, bias, alpha) and biases never decay."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """sgd and adamw are torch's, lars and lamb timm's."""
    lr: float = 0.01
    """Learning rate at reference_batch_size, > 0; scaled linearly to data.global_batch_size."""
    reference_batch_size: int | None = None
    """Batch for which optim.lr is stated (null: data.global_batch_size, no scaling)."""
    momentum: float = 0.9
    """sgd, lars: momentum in [0, 1)."""
    nesterov: bool = True
    """sgd: Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, lamb: decay of the two moments."""
    weight_decay: float = 1e-4
    """Weight decay of convolution and linear weights, >= 0."""
    clip_norm: float | None = None
    """Clip the gradient's global l2 norm to this, > 0 (null: no clipping)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "> 0", self.lr)
        require(
            self.reference_batch_size is None or self.reference_batch_size >= 1,
            "optim.reference_batch_size",
            ">= 1 or null",
            self.reference_batch_size,
        )
        require(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", "> 0 or null", self.clip_norm)
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("optim.nesterov: needs optim.momentum > 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step."""

    name: Literal["step", "cosine", "constant"] = "step"
    """step: times factor at each milestone. cosine: half a cosine to min_lr_share."""
    milestones_epochs: tuple[int, ...] = (31, 61, 91)
    """step: epochs, counted from 1, from which on the rate is multiplied by factor once more."""
    factor: float = 0.2
    """step: multiplier at each milestone, in (0, 1]."""
    warmup_epochs: float = 0.0
    """Linear warm-up from warmup_start_share to the full rate."""
    warmup_start_share: float = 0.0
    """Share of the full rate at which the warm-up starts, in [0, 1]."""
    min_lr_share: float = 0.0
    """cosine: share of the full rate at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        require(
            list(self.milestones_epochs) == sorted(set(self.milestones_epochs))
            and min(self.milestones_epochs, default=1) >= 1,
            "schedule.milestones_epochs",
            "increasing epochs >= 1",
            list(self.milestones_epochs),
        )
        require(0 < self.factor <= 1, "schedule.factor", "in (0, 1]", self.factor)
        require(self.warmup_epochs >= 0, "schedule.warmup_epochs", ">= 0", self.warmup_epochs)
        require(0 <= self.warmup_start_share <= 1, "schedule.warmup_start_share", "in [0, 1]", self.warmup_start_share)
        require(0 <= self.min_lr_share <= 1, "schedule.min_lr_share", "in [0, 1]", self.min_lr_share)
