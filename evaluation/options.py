"""Everything that an evaluation can be told, with the paper's values as defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.views import TABLE_3_SCALES_PX, Pass, crops_passes, whole_passes
from unitdist.config import Config, EvaluationConfig
from unitdist.errors import ConfigError

PROTOCOLS = ("crops", "fully_convolutional", "single", "ten_crop")
"""All protocols."""

TABLE_3_PROTOCOLS = ("crops", "fully_convolutional")
"""Those of the paper's Table 3."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `evaluate`; every one is a flag of evaluation/multi_scale.py (`views_per_scale` is --crops-per-scale)."""

    scales_px: tuple[int, ...] | None = None
    """Shorter sides of the protocols crops and fully_convolutional, increasing (None: evaluation.scales_px of the training's
    config, else 224,256,384,480,640)."""
    crop_px: int | None = None
    """Side of the crops (None: evaluation.crop_px of the training's config, else 224)."""
    views_per_scale: tuple[int, ...] | None = None
    """crops: views at each scale, 1, 2, 5 or 10 (None: 2 where the scale is the crop, else 10)."""
    single_scale_px: int | None = None
    """Shorter side of the protocols single (centre crop) and ten_crop (None: data.val_resize_px of the training's config, else
    8/7 of the crop, 256 for 224)."""
    mirror: bool | None = None
    """fully_convolutional: average over the mirrored image too (None: evaluation.mirror of the training's config, else yes)."""
    average: Literal["softmax", "logits"] | None = None
    """What is averaged over views and scales: class probabilities, or the scores before the softmax (None: evaluation.average
    of the training's config, else softmax)."""
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
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std: give both or neither")
        if self.decode_device == "gpu" and self.loader != "dali":
            raise ConfigError(f"decode_device gpu needs loader dali, not {self.loader}")


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What is seen of every image, and how it is averaged; the fields are those of EvaluationOptions, settled."""

    scales_px: tuple[int, ...] = TABLE_3_SCALES_PX
    crop_px: int = 224
    views_per_scale: tuple[int, ...] | None = None
    single_scale_px: int = 256
    mirror: bool = True
    average: Literal["softmax", "logits"] = "softmax"

    def __post_init__(self) -> None:
        crops_passes(self.scales_px, self.crop_px, self.views_per_scale)
        if self.single_scale_px < self.crop_px:
            raise ConfigError(f"single_scale_px: {self.single_scale_px} is smaller than the crop of {self.crop_px} pixels")


def settle_views(options: EvaluationOptions, training: Config | None) -> ViewSettings:
    """The options where they are given, else what the training's config says, else Table 3's values.

    Raises ConfigError for scales below the crop, or in another order than increasing.
    """
    section = EvaluationConfig() if training is None else training.evaluation
    crop_px = options.crop_px or section.crop_px
    single_px = round(crop_px * 8 / 7) if training is None or options.crop_px is not None else training.data.val_resize_px
    return ViewSettings(
        scales_px=options.scales_px or section.scales_px,
        crop_px=crop_px,
        views_per_scale=options.views_per_scale,
        single_scale_px=options.single_scale_px or max(single_px, crop_px),
        mirror=section.mirror if options.mirror is None else options.mirror,
        average=options.average or section.average,
    )


def protocol_passes(protocol: str, views: ViewSettings) -> tuple[Pass, ...]:
    """The passes whose views a protocol averages."""
    if protocol == "crops":
        return crops_passes(views.scales_px, views.crop_px, views.views_per_scale)
    if protocol == "fully_convolutional":
        return whole_passes(views.scales_px, views.mirror)
    assert protocol in ("single", "ten_crop"), protocol
    return crops_passes((views.single_scale_px,), views.crop_px, (1 if protocol == "single" else 10,))


def protocol_names(protocols: str | Sequence[str]) -> tuple[str, ...]:
    """One name, several, or "all", as a tuple without repetition. Raises ConfigError for an unknown one, or none."""
    names = (protocols,) if isinstance(protocols, str) else tuple(dict.fromkeys(protocols))
    unknown = [name for name in names if name not in (*PROTOCOLS, "all")]
    if unknown or not names:
        problem = f"unknown protocol {unknown[0]!r}" if unknown else "no protocol was given"
        raise ConfigError(f"{problem}; known: {', '.join(PROTOCOLS)}, all")
    return PROTOCOLS if "all" in names else names
