"""The objects that the parts of a run share."""

from dataclasses import dataclass, field
from typing import Any

from unitdist.analysis.monitor import ShiftMonitor
from unitdist.config import Config
from unitdist.data.batch import Loader
from unitdist.train.batch_split import BatchSplit
from unitdist.train.ema import WeightAverage
from unitdist.train.engine import Engine
from unitdist.train.metrics import Record, TrainSums
from unitdist.train.progress import Progress
from unitdist.train.run_folder import RunFolder
from unitdist.train.schedule import learning_rate_share, peak_learning_rate
from unitdist.train.step_graph import StepGraph
from unitdist.train.stopping import StopRequest
from unitdist.train.tensorboard import Board
from unitdist.train.watchdog import Watchdog
from unitdist.train.writer import CheckpointWriter


@dataclass(kw_only=True)
class TrainState:
    """All that a checkpoint keeps beside weights and optimizer. Random draws need no state: each is a function of
    (seed, epoch, sample) or (seed, step, rank)."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Images of the unfinished epoch already consumed, over all ranks."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """`last` validation and `best`: {"epoch", "top1", ...}; `ranking`: {"epoch", "step", "top1"} of the best few, best first."""


@dataclass(kw_only=True)
class Run:
    """Everything that one training run holds."""

    config: Config
    folder: RunFolder
    engine: Engine
    split: BatchSplit
    train_loader: Loader
    val_loader: Loader
    state: TrainState
    sums: TrainSums
    mixup: Any
    stop: StopRequest
    watchdog: Watchdog
    writer: CheckpointWriter
    num_parameters: int
    average: WeightAverage | None = None
    step_graph: StepGraph | None = None
    monitor: ShiftMonitor | None = None
    record: Record | None = None
    board: Board | None = None
    progress: Progress | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.train_loader.num_samples // self.config.data.global_batch_size

    @property
    def total_steps(self) -> int:
        all_steps = self.config.train.epochs * self.steps_per_epoch
        return min(all_steps, self.config.train.max_steps or all_steps)


def learning_rate_of_step(run: Run, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    config = run.config
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    share = learning_rate_share(
        config.schedule, step=step, steps_per_epoch=run.steps_per_epoch, epochs=config.train.epochs
    )
    return peak * share
