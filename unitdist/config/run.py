"""The run itself: its folder, its training loop, its checkpoints, its health."""

from dataclasses import dataclass
from typing import Literal

from unitdist.config.checks import require
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run writes and what makes it repeatable."""

    folder: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of this run's folder (null: the config file's name)."""
    seed: int = 0
    """Seed of weights, sample order and augmentation, >= 0."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (slower on a GPU)."""
    wandb: bool = False
    """Write scalars and config to Weights & Biases too (needs the package wandb; WANDB_MODE=offline keeps them here)."""
    wandb_project: str = "unitdist"
    """wandb: the project, not empty."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "run.seed", ">= 0", self.seed)
        require(
            self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name),
            "run.name",
            "a plain folder name",
            self.name,
        )
        require(bool(self.wandb_project.strip()), "run.wandb_project", "a name", self.wandb_project)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 120
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (null: all epochs). The schedule still spans train.epochs."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """Data-parallel engine behind Accelerate."""
    zero_stage: int = 0
    """deepspeed: ZeRO stage 0 to 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass; parameters stay fp32."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step, >= 1."""
    channels_last: bool = True
    """Keep weights in the channels_last memory format of the images (ddp; under deepspeed they stay contiguous)."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = False
    """Record the whole step as a CUDA graph after three steps and replay it (one process, ddp, one GPU): less time at small batches."""
    ema_decay: float | None = None
    """Exponential moving average of the weights, in (0, 1) (null: none); validated and saved beside them."""
    label_smoothing: float = 0.0
    """In [0, 1)."""
    mixup_alpha: float = 0.0
    """timm's mixup, 0: off."""
    cutmix_alpha: float = 0.0
    """timm's cutmix, 0: off."""
    log_every_steps: int = 50
    """Steps between log lines; the only moments at which the loss is read from the device."""
    timeout_s: int = 600
    """Seconds after which a collective that does not complete is an error."""

    def __post_init__(self) -> None:
        for key in ("epochs", "accumulation_steps", "log_every_steps", "timeout_s"):
            require(getattr(self, key) >= 1, f"train.{key}", ">= 1", getattr(self, key))
        require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", ">= 1 or null", self.max_steps)
        require(0 <= self.zero_stage <= 3, "train.zero_stage", "0, 1, 2 or 3", self.zero_stage)
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", "in (0, 1) or null", self.ema_decay
        )
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", "in [0, 1)", self.label_smoothing)
        if self.cuda_graph:
            for key, allowed, why in (
                ("engine", "ddp", "DeepSpeed steps inside its own backward"),
                ("precision", ("fp32", "bf16"), "its loss scaler is not recorded"),
                ("compile", False, "a compiled network may compile again within a recording"),
                ("accumulation_steps", 1, "a recording holds one micro-batch"),
            ):
                value = getattr(self, key)
                if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                    raise ConfigError(
                        f"train.{key}: {value} is not offered with train.cuda_graph: true ({why}); set one or the other"
                    )
        for key in ("mixup_alpha", "cutmix_alpha"):
            require(getattr(self, key) >= 0, f"train.{key}", ">= 0", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, when, and for how long. Always: last.pt and best.pt (highest validation top-1)."""

    every_epochs: int = 1
    """Save after every so many epochs, >= 1 (an epoch that enters the best keep_best is always saved)."""
    every_steps: int | None = None
    """Save after every so many optimizer steps as well, >= 1 (null: never within an epoch)."""
    asynchronous: bool = True
    """Write in a background thread while training goes on (it takes one checkpoint of host memory); false: train on when it is written."""
    keep_last: int = 2
    """Newest step_*.pt files that stay, >= 1; with 2 or more a damaged one has a predecessor to resume from."""
    keep_best: int = 1
    """step_*.pt files of the best validation top-1 that stay, >= 1; best.pt is the first of them."""
    keep_every_epochs: int | None = None
    """Keep an epoch_NNNN.pt of every so many epochs for ever, >= 1 (null: none)."""
    max_failed_saves: int = 3
    """A save that fails (disk full) is said loudly and training goes on; so many in a row end it, >= 1."""

    def __post_init__(self) -> None:
        for key in ("every_epochs", "keep_last", "keep_best", "max_failed_saves"):
            require(getattr(self, key) >= 1, f"checkpoint.{key}", ">= 1", getattr(self, key))
        for key in ("every_steps", "keep_every_epochs"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"checkpoint.{key}", ">= 1 or null", value)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """How a run that goes wrong is noticed: stuck ranks, numbers that are not finite, losses that jump, weights that differ."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is not finite: end the run, leave out the update, or go back to the last checkpoint's weights."""
    every_step: bool = True
    """Judge each step before its update (reads two numbers from the device); false, deepspeed, cuda_graph: at log steps only."""
    max_in_a_row: int = 3
    """skip: steps in a row; rollback: returns to one checkpoint; more end the run, >= 1."""
    spike_factor: float | None = None
    """Warn when a log window's loss is more than this many times the median of the 20 before, > 1 (null: never)."""
    checksum_every_steps: int | None = None
    """Compare all ranks' parameters after every so many steps, >= 1 (null: never); a difference ends the run."""
    stuck_after_s: float | None = 300
    """A rank without progress for so many seconds ends the job, named and with all stacks in the logs, > 0 (null: never)."""
    stuck_after_first_s: float = 900
    """The same for whatever is done for the first time (start, compilation, first validation, new image size), >= health.stuck_after_s."""

    def __post_init__(self) -> None:
        require(self.max_in_a_row >= 1, "health.max_in_a_row", ">= 1", self.max_in_a_row)
        require(
            self.spike_factor is None or self.spike_factor > 1, "health.spike_factor", "> 1 or null", self.spike_factor
        )
        require(
            self.checksum_every_steps is None or self.checksum_every_steps >= 1,
            "health.checksum_every_steps",
            ">= 1 or null",
            self.checksum_every_steps,
        )
        if not self.every_step and self.on_nonfinite != "stop":
            raise ConfigError(f"health.on_nonfinite: {self.on_nonfinite} needs health.every_step: true")
        if self.stuck_after_s is None:
            return
        require(self.stuck_after_s > 0, "health.stuck_after_s", "> 0 or null", self.stuck_after_s)
        require(
            self.stuck_after_first_s >= self.stuck_after_s,
            "health.stuck_after_first_s",
            f">= health.stuck_after_s: {self.stuck_after_s:g}",
            self.stuck_after_first_s,
        )
