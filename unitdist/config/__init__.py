"""Every setting of a run: one frozen dataclass per YAML section, one field per key.

A YAML file maps one to one onto `Config`. `load_config` is strict: an unknown or duplicate key, or a value
of another type, is a ConfigError that names file, line, dotted key and the nearest valid name. Derived
values are computed where they are used and never written back.
"""

from dataclasses import dataclass, field

from unitdist.config.data import DataConfig
from unitdist.config.measures import AnalysisConfig, EvaluationConfig
from unitdist.config.model import ModelConfig
from unitdist.config.optim import OptimConfig, ScheduleConfig
from unitdist.config.run import CheckpointConfig, HealthConfig, RunConfig, TrainConfig
from unitdist.errors import ConfigError

__all__ = [
    "AnalysisConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HealthConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)

    def __post_init__(self) -> None:
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs: {self.schedule.warmup_epochs:g} >= train.epochs: {self.train.epochs}"
            )
        last_stage = max((epoch for epoch, _ in self.data.progressive_resizing), default=1)
        if last_stage > self.train.epochs:
            raise ConfigError(
                f"data.progressive_resizing: epoch {last_stage} is after the last, train.epochs: {self.train.epochs}"
            )
        if self.train.cuda_graph and self.health.on_nonfinite != "stop":
            raise ConfigError(
                f"health.on_nonfinite: {self.health.on_nonfinite} decides on the host between backward and update, which "
                "train.cuda_graph: true records as one; use stop (at log steps), or train.cuda_graph=false"
            )
        if self.train.cuda_graph and self.optim.name not in ("sgd", "adamw"):
            raise ConfigError(
                f"optim.name: {self.optim.name} reads its learning rate on the host, which train.cuda_graph: true cannot record; "
                "use sgd or adamw, or set train.cuda_graph=false"
            )
        if self.evaluation.protocols and self.data.dataset != "image_folder":
            raise ConfigError(
                f"evaluation.protocols: {', '.join(self.evaluation.protocols)} need data.dataset: image_folder, not {self.data.dataset}"
            )
