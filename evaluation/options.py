"""Everything that an evaluation can be told, with the paper's values as defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.views import TABLE_3_SCALES_PX, Pass, crops_passes, whole_passes
from unitdist.config import EvaluationConfig
from unitdist.errors import ConfigError

PROTOCOLS = ("crops", "fully_convolutional", "single", "ten_crop")
"""All protocols."""

TABLE_3_PROTOCOLS = ("crops", "fully_convolutional")
"""Those of the paper's Table 3."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `evaluate`; every one is a flag of evaluation/multi_scale.py."""

    scales_px: tuple[int, ...] = TABLE_3_SCALES_PX
    """Shorter sides of the protocols crops and fully_convolutional, increasing."""
    crop_px: int = 224
    """Side of the crops."""
    views_per_scale: tuple[int, ...] | None = None
    """crops: views at each scale, 1, 2, 5 or 10 (None: 2 where the scale is the crop, else 10)."""
    single_scale_px: int = 256
    """Shorter side of the protocols single (centre crop) and ten_crop."""
    mirror: bool = True
    """fully_convolutional: average over the mirrored image too."""
    average: Literal["softmax", "logits"] = "softmax"
    """What is averaged over views and scales: class probabilities, or the scores before the softmax."""
    norm_divisor: Literal["fixed", "per_image"] = "fixed"
    """fixed: the n of training, as in the paper. per_image: n follows each image's own size, to see what fixing it is worth."""

    loader: Literal["dali", "torchvision"] = "dali"
    """Who decodes and resizes; torchvision is the reference, by PIL."""
    decode_device: Literal["cpu", "gpu"] = "cpu"
    """dali: where images are decoded and resized."""
    num_threads: int | None = None
    """Decoding threads per rank, and on a CPU batches scored side by side (None: the cores, shared among this machine's ranks)."""
    on_broken: Literal["error", "skip"] = "error"
    """An image that cannot be decoded: stop with its name, or leave it out, counted and named."""
    labels: Path | None = None
    """For a flat folder: a file of `image label` lines."""

    images_per_chunk: int = 32
    """Images that are decoded together; chunks, not images, are dealt to the ranks."""
    views_per_forward: int | None = None
    """Crops in one forward pass; whole images are batched up to as many pixels (None: 256 on a GPU, 16 on a CPU)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""
    channels_last: bool = True
    """Weights and images in the channels_last memory format."""
    compile: bool = False
    """torch.compile the network."""

    model: str | None = None
    """Network of a checkpoint that does not name it: timm:NAME, torchvision:NAME, or one of unitdist's own."""
    num_classes: int | None = None
    """Outputs of that network (None: read off the checkpoint)."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights of the checkpoint; auto: the averaged ones (EMA) where the file has them."""
    convert_unitization: bool = False
    """Convert the loaded network's batch normalization to Unitization (the same function as long as alpha is 0)."""
    norm_divisor_from_image_size: int | None = None
    """Training image size that fixes the norm divisors of a Unitization checkpoint without them."""
    mean: tuple[float, ...] | None = None
    """Channel means in units of [0, 1] (None: the checkpoint's, else ImageNet's)."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations in units of [0, 1] (None: as for mean)."""

    resume: bool = False
    """Keep what an interrupted evaluation into the same output folder has finished."""
    save_scores: bool = False
    """Write every image's class scores to scores_<protocol>.npz."""
    pictures: bool = True
    """Draw per-class accuracy, confusion matrix and calibration (needs matplotlib)."""
    gallery_images: int = 60
    """Most confident errors shown in the gallery."""

    def __post_init__(self) -> None:
        crops_passes(self.scales_px, self.crop_px, self.views_per_scale)
        least = {
            "images_per_chunk": self.images_per_chunk,
            "num_threads": self.num_threads,
            "views_per_forward": self.views_per_forward,
            "crop_px": self.crop_px,
            "norm_divisor_from_image_size": self.norm_divisor_from_image_size,
        }
        for name, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be >= 1, got {value}")
        if self.single_scale_px < self.crop_px:
            raise ConfigError(f"single_scale_px: {self.single_scale_px} is smaller than the crop of {self.crop_px} pixels")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std: give both or neither")
        if self.decode_device == "gpu" and self.loader != "dali":
            raise ConfigError(f"decode_device gpu needs loader dali, not {self.loader}")


def protocol_passes(protocol: str, options: EvaluationOptions) -> tuple[Pass, ...]:
    """The passes whose views a protocol averages. Raises ConfigError for an unknown protocol."""
    if protocol == "crops":
        return crops_passes(options.scales_px, options.crop_px, options.views_per_scale)
    if protocol == "fully_convolutional":
        return whole_passes(options.scales_px, options.mirror)
    if protocol == "single":
        return crops_passes((options.single_scale_px,), options.crop_px, (1,))
    if protocol == "ten_crop":
        return crops_passes((options.single_scale_px,), options.crop_px, (10,))
    raise ConfigError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}, all")


def options_from_config(config: EvaluationConfig) -> EvaluationOptions:
    """The options that the `evaluation` section of a training config states."""
    return EvaluationOptions(
        scales_px=config.scales_px, crop_px=config.crop_px, mirror=config.mirror, average=config.average,
        single_scale_px=round(config.crop_px * 256 / 224),
    )  # fmt: skip
