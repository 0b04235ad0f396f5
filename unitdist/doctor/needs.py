"""What the training that the user has in mind needs, from its config; without a config nothing is certain."""

from dataclasses import dataclass
from pathlib import Path

from unitdist.config import Config
from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Needs:
    """`dali`, `deepspeed`, `compiler`: whether the config asks for it (False without a config).

    `threads_per_rank`: decoding threads or workers. `checkpoint_bytes`: of one checkpoint, None if unknown.
    `checkpoint_files`: so many lie on the disk at once. `image_folder`: data.path is to hold images in class folders.
    """

    dali: bool = False
    deepspeed: bool = False
    compiler: bool = False
    torchvision_workers: bool = False
    threads_per_rank: int = 0
    run_folder: Path = Path("runs")
    data: Path | None = None
    train_split: str = "train"
    val_split: str = "val"
    image_folder: bool = True
    checkpoint_bytes: int | None = None
    checkpoint_files: int = 3


def needs_of(config: Config | None, *, data: Path | None, has_torch: bool = True) -> Needs:
    """`data` replaces the config's data.path. Without torch nothing is said of checkpoints.

    Raises ConfigError for a config whose network cannot be built.
    """
    if config is None:
        return Needs(data=data)
    given = config.data
    compiles = config.train.engine == "deepspeed" or config.train.compile or config.model.compile_norm
    return Needs(
        dali=given.loader == "dali",
        deepspeed=config.train.engine == "deepspeed",
        compiler=compiles,
        torchvision_workers=given.loader == "torchvision",
        threads_per_rank=given.num_threads if given.dataset == "image_folder" else 0,
        run_folder=Path(config.run.folder),
        data=data or (Path(given.path).expanduser() if given.path else None),
        train_split=given.train_split,
        val_split=given.val_split,
        image_folder=given.dataset == "image_folder" and given.source == "folder",
        checkpoint_bytes=checkpoint_bytes(config) if has_torch else None,
        checkpoint_files=checkpoint_files(config) if has_torch else 0,
    )


def checkpoint_files(config: Config) -> int:
    """Checkpoints that lie on the disk at once."""
    from unitdist.train.retention import most_files

    return most_files(config.checkpoint, epochs=config.train.epochs)


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: weights, averaged weights and the optimizer's moments in float32; headers left out."""
    from unitdist.train.dry_run import build_and_measure, optimizer_moments

    try:
        model, _ = build_and_measure(config)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"--config: the network cannot be built here: {error}") from None
    parameters: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    averaged = 2 if config.train.ema_decay is not None else 1
    return state * averaged + 4 * parameters * optimizer_moments(config.optim)
