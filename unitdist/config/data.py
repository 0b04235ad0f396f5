"""The data, their order and their augmentation."""

from dataclasses import dataclass
from typing import Literal

from unitdist.config.checks import require
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, batches and augmentation."""

    path: str = ""
    """Data set folder: holds train_split and val_split (image_folder), or torchvision's layout (mnist, cifar)."""
    dataset: Literal["image_folder", "mnist", "cifar10", "cifar100", "synthetic"] = "image_folder"
    """What lies at data.path."""
    loader: Literal["dali", "torchvision", "resident", "synthetic"] = "dali"
    """Who decodes and augments: dali and torchvision for image_folder, resident for mnist and cifar, synthetic for none."""
    source: Literal["folder", "manifest", "webdataset", "tfrecord"] = "folder"
    """image_folder: class folders, the list SPLIT.tsv of a scan, or tars or TFRecords with SPLIT/index.tsv."""
    train_split: str = "train"
    """Sub-folder with one folder of training images per class."""
    val_split: str = "val"
    """Sub-folder with one folder of validation images per class."""
    image_size_px: int = 224
    """Side of the square training and validation images."""
    progressive_resizing: tuple[tuple[int, int], ...] = ()
    """[first epoch, counted from 1; side of the training images in px] pairs, sides at most image_size_px (empty: that one)."""
    global_batch_size: int = 64
    """Images per optimizer step over all ranks and accumulation steps."""
    val_batch_size: int = 64
    """Images per validation step over all ranks (rounded up to a multiple of the ranks)."""
    augmentation: Literal["scale", "random_resized_crop", "pad_crop_flip", "none"] = "scale"
    """scale: shorter side random, random crop, flip (paper). pad_crop_flip: pad 4, crop, flip (CIFAR)."""
    scale_range_px: tuple[int, int] = (256, 480)
    """scale: the shorter side is a uniform integer in this closed range."""
    area_range: tuple[float, float] = (0.08, 1.0)
    """random_resized_crop: share of the image's area."""
    aspect_range: tuple[float, float] = (0.75, 4 / 3)
    """random_resized_crop: width over height, drawn log-uniformly."""
    flip_probability: float = 0.5
    """Probability of the horizontal flip."""
    randaugment_operations: int = 0
    """RandAugment operations after crop and flip, on the device, 0 to 10 (0: none)."""
    randaugment_magnitude: int = 9
    """Strength of the RandAugment operations, 0 to 10."""
    erasing_probability: float = 0.0
    """Probability that a random box is set to the mean colour, on the device."""
    val_resize_px: int = 256
    """Validation: shorter side before the centre crop of image_size_px."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Channel means subtracted, in units of the full range [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Channel standard deviations divided by, in units of the full range [0, 1]."""
    num_threads: int = 4
    """Decoding threads (dali) or worker processes (torchvision) per rank."""
    shuffle_window: int = 8192
    """webdataset, tfrecord: samples that are shuffled among each other; a rank reads about this many / 1000 shards."""
    prefetch_batches: int = 2
    """Batches prepared ahead."""
    on_broken: Literal["error", "replace"] = "error"
    """An image that cannot be decoded: stop with its name, or replace it by one of its class, counted."""
    max_broken_share: float = 0.0001
    """on_broken: replace stops above this share of the training set, counted over all ranks."""
    accept_other_decoder: bool = False
    """A resume within an epoch may go on with another loader, decoder or version: its pixels differ by a grey level or so."""
    max_image_megapixels: int = 64
    """A larger image counts as broken: a small file can otherwise unpack to gigabytes."""
    roi_decode: bool = True
    """dali: decode only the part of the image that the crop needs (cheaper; the same pixels)."""
    gpu_decode: bool = True
    """dali on a GPU: decode and resample there; false: on the CPU, and the uint8 crops are sent."""
    hw_decoder_load: float = 0.65
    """dali on a GPU: share of the images given to the hardware JPEG decoder where there is one, in [0, 1]."""
    set_affinity: bool = False
    """dali on a GPU: bind its threads to the CPU cores near the GPU (or to those in DALI_AFFINITY_MASK)."""
    synthetic_samples: int = 1_281_167
    """synthetic: samples per epoch."""
    synthetic_classes: int = 1000
    """synthetic: classes."""

    def __post_init__(self) -> None:
        for key in (
            "image_size_px",
            "global_batch_size",
            "val_batch_size",
            "val_resize_px",
            "num_threads",
            "prefetch_batches",
            "max_image_megapixels",
            "shuffle_window",
            "synthetic_samples",
            "synthetic_classes",
        ):
            require(getattr(self, key) >= 1, f"data.{key}", ">= 1", getattr(self, key))
        for key in ("scale_range_px", "area_range", "aspect_range"):
            low, high = getattr(self, key)
            require(0 < low <= high, f"data.{key}", "two numbers, 0 < first <= second", [low, high])
        require(self.area_range[1] <= 1, "data.area_range", "at most 1", self.area_range[1])
        require(0 <= self.flip_probability <= 1, "data.flip_probability", "in [0, 1]", self.flip_probability)
        for key in ("randaugment_operations", "randaugment_magnitude"):
            require(0 <= getattr(self, key) <= 10, f"data.{key}", "in 0..10", getattr(self, key))
        require(0 <= self.erasing_probability <= 1, "data.erasing_probability", "in [0, 1]", self.erasing_probability)
        if self.dataset != "image_folder" and self.source != "folder":
            raise ConfigError(f"data.source: {self.source} is for data.dataset: image_folder, not {self.dataset}")
        if self.dataset != "image_folder" and (self.randaugment_operations or self.erasing_probability):
            raise ConfigError(
                f"data.randaugment_operations and data.erasing_probability are not for data.dataset: {self.dataset}"
            )
        require(0 <= self.max_broken_share <= 1, "data.max_broken_share", "in [0, 1]", self.max_broken_share)
        require(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", "in [0, 1]", self.hw_decoder_load)
        require(
            len(self.mean) == len(self.std) and min(self.std, default=0) > 0,
            "data.std",
            "as long as data.mean, all > 0",
            list(self.std),
        )
        if (
            self.augmentation == "scale"
            and self.scale_range_px[0] < self.image_size_px
            and self.dataset == "image_folder"
        ):
            raise ConfigError(
                f"data.scale_range_px: {self.scale_range_px[0]} is smaller than the crop data.image_size_px: {self.image_size_px}"
            )
        if self.dataset == "image_folder" and self.val_resize_px < self.image_size_px:
            raise ConfigError(
                f"data.val_resize_px: {self.val_resize_px} is smaller than the crop data.image_size_px: {self.image_size_px}"
            )
        self._check_progressive_resizing()
        ours = (
            ("pad_crop_flip", "none")
            if self.dataset in ("mnist", "cifar10", "cifar100")
            else ("scale", "random_resized_crop", "none")
        )
        if self.augmentation not in ours and self.dataset != "synthetic":
            raise ConfigError(
                f"data.augmentation: {self.augmentation} is not for data.dataset: {self.dataset}; allowed: {', '.join(ours)}"
            )
        allowed = {"image_folder": ("dali", "torchvision"), "synthetic": ("synthetic",)}.get(
            self.dataset, ("resident",)
        )
        if self.loader not in allowed:
            raise ConfigError(
                f"data.loader: {self.loader} cannot read data.dataset: {self.dataset}; allowed: {', '.join(allowed)}"
            )

    def _check_progressive_resizing(self) -> None:
        if not self.progressive_resizing:
            return
        if self.dataset not in ("image_folder", "synthetic"):
            raise ConfigError(f"data.progressive_resizing: the images of data.dataset: {self.dataset} have one size")
        epochs = [epoch for epoch, _ in self.progressive_resizing]
        shown = [list(stage) for stage in self.progressive_resizing]
        require(
            epochs[0] == 1 and epochs == sorted(set(epochs)),
            "data.progressive_resizing",
            "pairs whose epochs begin with 1 and increase",
            shown,
        )
        require(
            all(1 <= side <= self.image_size_px for _, side in self.progressive_resizing),
            "data.progressive_resizing",
            f"pairs whose sides are in 1..data.image_size_px ({self.image_size_px})",
            shown,
        )
