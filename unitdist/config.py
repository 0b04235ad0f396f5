"""Every setting of a run: one frozen dataclass per YAML section, one field per key.

A YAML file maps one to one onto `Config`. `load_config` is strict: an unknown or duplicate key, or a value
of another type, is a ConfigError that names file, line, dotted key and the nearest valid name. Derived
values are computed where they are used and never written back.
"""

from dataclasses import dataclass, field
from typing import Literal

from unitdist.errors import ConfigError


def _require(condition: bool, key: str, requirement: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: must be {requirement}, got {value!r}")


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
        _require(self.seed >= 0, "run.seed", ">= 0", self.seed)
        _require(
            self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name),
            "run.name",
            "a plain folder name",
            self.name,
        )
        _require(bool(self.wandb_project.strip()), "run.wandb_project", "a name", self.wandb_project)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its normalization."""

    name: str = "preact_resnet101"
    """preact_resnet{18,34,50,101,152} | cifar_resnet{20,110,164} | mnist_mlp | mnist_resnet8 | timm:NAME (converted)."""
    num_classes: int = 1000
    """Outputs of the classifier, >= 2."""
    norm: Literal["unitization", "batchnorm", "groupnorm"] = "unitization"
    """Normalization layer."""
    norm_divisor: int | None = None
    """Fixed norm divisor n of every Unitization layer (null: each layer's own H*W at data.image_size_px)."""
    norm_scope: Literal["image", "pixel"] = "image"
    """One norm per image (Alg. 2, Fig. 1c) or per pixel over channels (Fig. 1b)."""
    norm_eps: float = 1e-5
    """eps of the normalization, > 0."""
    norm_momentum: float = 0.1
    """Momentum of the running statistics, PyTorch's convention, in (0, 1]."""
    group_norm_groups: int | None = None
    """groupnorm: number of groups (give this or group_norm_channels)."""
    group_norm_channels: int | None = None
    """groupnorm: channels per group (give this or group_norm_groups)."""
    sync_group: Literal["world", "node", "none"] = "world"
    """Ranks over which batch statistics are synchronized."""
    stats_batch_size: int | None = None
    """Images per batch statistic; sets the size of the sync groups and replaces sync_group (paper: 64)."""
    stride_in_first_conv: bool = True
    """Bottleneck blocks: stride in the first 1x1 convolution (paper) instead of in the 3x3."""
    raw_projection: bool = True
    """Projection shortcuts read the block's raw input (paper) instead of the pre-activated one."""
    stem_norm: bool | None = None
    """Norm and ReLU right after the stem convolution (null: CIFAR yes, ImageNet no)."""
    final_norm: bool | None = None
    """Norm after the last block (null: CIFAR yes, ImageNet no, as in the paper)."""
    fold_residual: bool = False
    """unitization: a block's first norm adds shortcut and branch while it takes its moments. The same gradients."""
    overlap_sync: bool = False
    """unitization: norm and convolution as one node, which hides the backward collective. The same gradients."""
    compile_norm: bool = False
    """unitization: the layers run as torch.compile's pieces (needs a compiler; on CUDA Triton kernels are the default)."""
    init_from: str | None = None
    """File of weights to start from: ours, timm's or torchvision's, .pt, .pth or .safetensors (null: random weights)."""
    init_head: bool = True
    """init_from: take the classifier too; false: start it anew, for a data set with other classes."""

    def __post_init__(self) -> None:
        _require(self.num_classes >= 2, "model.num_classes", ">= 2", self.num_classes)
        _require(
            self.norm_divisor is None or self.norm_divisor >= 1, "model.norm_divisor", ">= 1 or null", self.norm_divisor
        )
        _require(self.norm_eps > 0, "model.norm_eps", "> 0", self.norm_eps)
        _require(0 < self.norm_momentum <= 1, "model.norm_momentum", "in (0, 1]", self.norm_momentum)
        for key in ("group_norm_groups", "group_norm_channels", "stats_batch_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"model.{key}", ">= 1 or null", value)
        for key in ("fold_residual", "overlap_sync", "compile_norm"):
            _require(
                self.norm == "unitization" or not getattr(self, key),
                f"model.{key}",
                "false for another norm than unitization",
                True,
            )
        _require(
            self.init_head or self.init_from is not None,
            "model.init_head",
            "true where model.init_from is not given",
            False,
        )
        given = (self.group_norm_groups is not None) + (self.group_norm_channels is not None)
        if self.norm == "groupnorm" and given != 1:
            raise ConfigError(
                "model.norm: groupnorm needs exactly one of model.group_norm_groups and model.group_norm_channels"
            )
        if self.norm != "groupnorm" and given:
            raise ConfigError(
                f"model.group_norm_groups and model.group_norm_channels are for norm: groupnorm, not {self.norm}"
            )


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
            _require(getattr(self, key) >= 1, f"data.{key}", ">= 1", getattr(self, key))
        for key in ("scale_range_px", "area_range", "aspect_range"):
            low, high = getattr(self, key)
            _require(0 < low <= high, f"data.{key}", "two numbers, 0 < first <= second", [low, high])
        _require(self.area_range[1] <= 1, "data.area_range", "at most 1", self.area_range[1])
        _require(0 <= self.flip_probability <= 1, "data.flip_probability", "in [0, 1]", self.flip_probability)
        for key in ("randaugment_operations", "randaugment_magnitude"):
            _require(0 <= getattr(self, key) <= 10, f"data.{key}", "in 0..10", getattr(self, key))
        _require(0 <= self.erasing_probability <= 1, "data.erasing_probability", "in [0, 1]", self.erasing_probability)
        if self.dataset != "image_folder" and self.source != "folder":
            raise ConfigError(f"data.source: {self.source} is for data.dataset: image_folder, not {self.dataset}")
        if self.dataset != "image_folder" and (self.randaugment_operations or self.erasing_probability):
            raise ConfigError(
                f"data.randaugment_operations and data.erasing_probability are not for data.dataset: {self.dataset}"
            )
        _require(0 <= self.max_broken_share <= 1, "data.max_broken_share", "in [0, 1]", self.max_broken_share)
        _require(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", "in [0, 1]", self.hw_decoder_load)
        _require(
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
        _require(
            epochs[0] == 1 and epochs == sorted(set(epochs)),
            "data.progressive_resizing",
            "pairs whose epochs begin with 1 and increase",
            shown,
        )
        _require(
            all(1 <= side <= self.image_size_px for _, side in self.progressive_resizing),
            "data.progressive_resizing",
            f"pairs whose sides are in 1..data.image_size_px ({self.image_size_px})",
            shown,
        )


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
        _require(self.lr > 0, "optim.lr", "> 0", self.lr)
        _require(
            self.reference_batch_size is None or self.reference_batch_size >= 1,
            "optim.reference_batch_size",
            ">= 1 or null",
            self.reference_batch_size,
        )
        _require(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", "> 0 or null", self.clip_norm)
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
        _require(
            list(self.milestones_epochs) == sorted(set(self.milestones_epochs))
            and min(self.milestones_epochs, default=1) >= 1,
            "schedule.milestones_epochs",
            "increasing epochs >= 1",
            list(self.milestones_epochs),
        )
        _require(0 < self.factor <= 1, "schedule.factor", "in (0, 1]", self.factor)
        _require(self.warmup_epochs >= 0, "schedule.warmup_epochs", ">= 0", self.warmup_epochs)
        _require(0 <= self.warmup_start_share <= 1, "schedule.warmup_start_share", "in [0, 1]", self.warmup_start_share)
        _require(0 <= self.min_lr_share <= 1, "schedule.min_lr_share", "in [0, 1]", self.min_lr_share)


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
            _require(getattr(self, key) >= 1, f"train.{key}", ">= 1", getattr(self, key))
        _require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", ">= 1 or null", self.max_steps)
        _require(0 <= self.zero_stage <= 3, "train.zero_stage", "0, 1, 2 or 3", self.zero_stage)
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", "in (0, 1) or null", self.ema_decay
        )
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", "in [0, 1)", self.label_smoothing)
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
            _require(getattr(self, key) >= 0, f"train.{key}", ">= 0", getattr(self, key))


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
            _require(getattr(self, key) >= 1, f"checkpoint.{key}", ">= 1", getattr(self, key))
        for key in ("every_steps", "keep_every_epochs"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"checkpoint.{key}", ">= 1 or null", value)


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
    """The same for whatever is done for the first time (start, compilation, first validation), >= health.stuck_after_s."""

    def __post_init__(self) -> None:
        _require(self.max_in_a_row >= 1, "health.max_in_a_row", ">= 1", self.max_in_a_row)
        _require(
            self.spike_factor is None or self.spike_factor > 1, "health.spike_factor", "> 1 or null", self.spike_factor
        )
        _require(
            self.checksum_every_steps is None or self.checksum_every_steps >= 1,
            "health.checksum_every_steps",
            ">= 1 or null",
            self.checksum_every_steps,
        )
        if not self.every_step and self.on_nonfinite != "stop":
            raise ConfigError(f"health.on_nonfinite: {self.on_nonfinite} needs health.every_step: true")
        if self.stuck_after_s is None:
            return
        _require(self.stuck_after_s > 0, "health.stuck_after_s", "> 0 or null", self.stuck_after_s)
        _require(
            self.stuck_after_first_s >= self.stuck_after_s,
            "health.stuck_after_first_s",
            f">= health.stuck_after_s: {self.stuck_after_s:g}",
            self.stuck_after_first_s,
        )


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
        _require(self.every_epochs >= 1, "evaluation.every_epochs", ">= 1", self.every_epochs)
        known = ("crops", "fully_convolutional", "single", "ten_crop")
        for protocol in self.protocols:
            _require(protocol in known, "evaluation.protocols", f"among {', '.join(known)}", protocol)
        _require(
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
        _require(self.every_epochs >= 0, "analysis.every_epochs", ">= 0", self.every_epochs)
        _require(
            self.num_samples is None or self.num_samples >= 2, "analysis.num_samples", ">= 2 or null", self.num_samples
        )
        _require(self.em_distance_steps >= 1, "analysis.em_distance_steps", ">= 1", self.em_distance_steps)


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
