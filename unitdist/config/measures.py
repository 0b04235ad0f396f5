"""What is measured of the network: accuracy and covariate shift."""

from dataclasses import dataclass
from typing import Literal

from unitdist.config.checks import require
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation in the loop, and the protocols of Table 3 at the end of training."""

    every_epochs: int = 1
    """Single-crop validation after every so many epochs, >= 1."""
    protocols: tuple[str, ...] = ()
    """Run on best.pt at the end: any of crops, fully_convolutional, single, ten_crop."""
    scales_px: tuple[int, ...] = (224, 256, 384, 480, 640)
    """Shorter sides of the multi-scale protocols."""
    crop_px: int = 224
    """Side of the crops."""
    mirror: bool = True
    """fully_convolutional: average over the mirrored image too."""
    average: Literal["softmax", "logits"] = "softmax"
    """What is averaged over views and scales."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, "evaluation.every_epochs", ">= 1", self.every_epochs)
        known = ("crops", "fully_convolutional", "single", "ten_crop")
        for protocol in self.protocols:
            require(protocol in known, "evaluation.protocols", f"among {', '.join(known)}", protocol)
        require(
            bool(self.scales_px) and list(self.scales_px) == sorted(set(self.scales_px)),
            "evaluation.scales_px",
            "increasing sides",
            list(self.scales_px),
        )
        if self.scales_px[0] < self.crop_px:
            raise ConfigError(
                f"evaluation.scales_px: {self.scales_px[0]} is smaller than evaluation.crop_px: {self.crop_px}"
            )


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """Live measures of covariate shift."""

    every_epochs: int = 1
    """Write every layer's alpha, p, bound and moments to TensorBoard and metrics.jsonl after so many epochs, 0: never."""
    layers: tuple[str, ...] = ()
    """Module names of the layers to measure (empty: every normalization layer)."""
    split: Literal["train", "val"] = "val"
    """Images to measure on, never augmented."""
    num_samples: int | None = 512
    """Measure on this many images of the split, >= 2 (null: all of them)."""
    per_unit: bool = False
    """Write each unit's moments to metrics.jsonl too, not only their average over the layer's units."""
    em_distance_layers: tuple[str, ...] = ()
    """Layers whose EM distance since the last measure is estimated by Alg. 3 (each costs em_distance_steps passes of two nets)."""
    em_distance_steps: int = 1500
    """Alg. 3: training steps of the critics on batches of 128 images, >= 1."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 0, "analysis.every_epochs", ">= 0", self.every_epochs)
        require(
            self.num_samples is None or self.num_samples >= 2, "analysis.num_samples", ">= 2 or null", self.num_samples
        )
        require(self.em_distance_steps >= 1, "analysis.em_distance_steps", ">= 1", self.em_distance_steps)
