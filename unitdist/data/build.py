"""From DataConfig to loaders. The only place that knows which loader reads which data set."""

from pathlib import Path

import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.data.index import class_names, require_same_classes, scan_image_folder
from unitdist.data.manifest import FILES_FORMAT, SHARDS_FORMAT, header_classes, load_manifest, load_shards
from unitdist.data.progressive import ProgressiveLoader
from unitdist.data.reading import ImageSource
from unitdist.data.split import Split
from unitdist.data.synthetic import SyntheticLoader
from unitdist.errors import ConfigError
from unitdist.wording import counted, install_extra
from unitdist.world import World


def build_train_loader(
    config: DataConfig, world: World, *, per_rank_batch_size: int, seed: int, device: torch.device
) -> Loader:
    """The training loader of this rank.

    Raises ConfigError for a missing folder and for a batch that the set cannot fill once, DataError for what is
    wrong inside the folder.
    """
    return _build(config, world, per_rank_batch_size, seed=seed, device=device, training=True)


def build_val_loader(config: DataConfig, world: World, *, per_rank_batch_size: int, device: torch.device) -> Loader:
    """The validation loader of this rank: every sample valid exactly once over all ranks."""
    return _build(config, world, per_rank_batch_size, seed=0, device=device, training=False)


def _build(
    config: DataConfig, world: World, per_rank_batch_size: int, *, seed: int, device: torch.device, training: bool
) -> Loader:
    # Listed once, whatever the number of stages of progressive resizing.
    source = _image_folder(config, training=training) if config.dataset == "image_folder" else None

    def build_stage(config: DataConfig) -> Loader:
        if config.dataset == "synthetic":
            return SyntheticLoader(
                config, world, per_rank_batch_size=per_rank_batch_size, training=training, device=device
            )
        if source is None:
            return _resident(config, world, per_rank_batch_size, seed=seed, device=device, training=training)
        split = Split(
            config=config,
            source=source,
            world=world,
            per_rank_batch_size=per_rank_batch_size,
            seed=seed,
            training=training,
        )
        return _image_loader(split, device)

    resizes = training and bool(config.progressive_resizing)
    loader = ProgressiveLoader(config, build_stage) if resizes else build_stage(config)
    if training:
        _require_one_batch(loader, world)
    return loader


def _require_path(config: DataConfig) -> Path:
    if not config.path:
        raise ConfigError("data.path: give the data set's folder, for example data.path=/data/imagenet")
    return Path(config.path).expanduser()


def _image_folder(config: DataConfig, *, training: bool) -> ImageSource:
    root = _require_path(config)
    train, val = root / config.train_split, root / config.val_split
    source = open_source(config, train if training else val)
    if not training:
        require_same_classes(_class_names(config, train), list(source.class_to_idx), train=train, val=val)
    return source


def open_source(config: DataConfig, folder: Path) -> ImageSource:
    """The images of one split, by data.source. Raises ConfigError and DataError."""
    if config.source == "folder":
        return scan_image_folder(folder)
    if config.source == "manifest":
        return load_manifest(folder.with_name(folder.name + ".tsv"), folder)
    return load_shards(folder / "index.tsv", config.source, window_samples=config.shuffle_window)


def _class_names(config: DataConfig, folder: Path) -> list[str]:
    """The classes of a split without reading all of it."""
    if config.source == "folder":
        return class_names(folder)
    if config.source == "manifest":
        return header_classes(folder.with_name(folder.name + ".tsv"), FILES_FORMAT)
    return header_classes(folder / "index.tsv", SHARDS_FORMAT)


def _image_loader(split: Split, device: torch.device) -> Loader:
    # Imported here: each of the two needs a package that the other does without.
    if split.config.loader == "dali":
        try:
            from unitdist.data.dali_loader import DaliLoader
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "nvidia":
                raise
            raise ConfigError(
                f"data.loader: dali needs NVIDIA DALI: {install_extra('dali-cuda13', 'dali-cuda12')}, "
                "or set data.loader=torchvision"
            ) from None
        return DaliLoader(split, device)
    from unitdist.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(split, device)


def _resident(
    config: DataConfig, world: World, per_rank_batch_size: int, *, seed: int, device: torch.device, training: bool
) -> Loader:
    from unitdist.data.cifar import read_cifar
    from unitdist.data.mnist import read_mnist
    from unitdist.data.resident import ResidentLoader

    root = _require_path(config)
    # The files hold two parts; val_split: train validates on the training part, as Fig. 2's measure does.
    of_training = training or config.val_split == config.train_split
    images = (
        read_mnist(root, training=of_training)
        if config.dataset == "mnist"
        else read_cifar(root, config.dataset, training=of_training)
    )
    return ResidentLoader(
        images,
        config,
        world,
        per_rank_batch_size=per_rank_batch_size,
        seed=seed,
        training=training,
        device=device,
    )


def _require_one_batch(loader: Loader, world: World) -> None:
    """Raise ConfigError when an epoch would have no step at all."""
    if loader.num_samples < world.size:
        raise ConfigError(
            f"{counted(loader.num_samples, 'training image')} cannot be split over {counted(world.size, 'rank')}"
        )
    if loader.batches_per_epoch == 0:
        raise ConfigError(
            f"data.global_batch_size: 0 steps per epoch: {counted(loader.num_samples, 'training image')}, "
            f"{counted(world.size, 'rank')} x {counted(loader.per_rank_batch_size, 'image')}; lower it"
        )
