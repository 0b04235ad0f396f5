"""What a training would do, on any number of ranks, without a network, a GPU or a process group: train.py --dry-run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from unitdist.config import Config, DataConfig, OptimConfig
from unitdist.data.build import open_source
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.train.batch_split import BatchSplit, split_batch
from unitdist.train.deepspeed_engine import check_supported
from unitdist.train.optim import MOMENTS
from unitdist.train.schedule import learning_rate_share, peak_learning_rate
from unitdist.train.step_graph import check_ranks
from unitdist.wording import counted
from unitdist.world import World

_GIB = 2**30
_USUAL_NODE = 8
_KNOWN_SETS = {"mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank that follow from shapes. Not in it: the device's context, workspaces, fragmentation, DALI."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    images: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def simulated_world(ranks: int | None, ranks_per_node: int | None) -> World:
    """Rank 0 of the world to simulate; None: the world this process is in. A node has 8 ranks unless said otherwise."""
    if ranks is None:
        if ranks_per_node is not None:
            raise ConfigError("--simulate-local-world: needs --simulate-world")
        return World.from_environment()
    local = min(ranks, _USUAL_NODE) if ranks_per_node is None else ranks_per_node
    if ranks < 1 or local < 1 or ranks % local:
        raise ConfigError(
            f"--simulate-world: {counted(ranks, 'rank')} cannot be {local} on every node; give --simulate-local-world RANKS_PER_NODE"
        )
    return World(rank=0, local_rank=0, size=ranks, local_size=local)


def dry_run(config: Config, world: World, *, num_samples: int | None = None) -> str:
    """The report. `num_samples` stands for the training set where that is not at hand.

    Raises what the training itself would raise before its first collective: an uneven batch, impossible statistics
    groups, an unknown model, what the engine does not support, a broken data folder.
    """
    split = split_batch(config, world)
    check_ranks(config, world)
    if config.train.engine == "deepspeed":
        check_supported(config)
    samples, shards = (num_samples, None) if num_samples is not None else count_training_set(config.data)
    model, activations = build_and_measure(config)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    memory = estimate_memory(config, world, split, parameters=parameters, state=state, activations=activations)
    lines = [
        ("model", f"{config.model.name} ({config.model.norm}), {parameters:,} parameters"),
        (
            "world",
            f"{counted(world.size, 'rank')}, {counted(world.size // world.local_size, 'node')} x {world.local_size}; {_engine(config)}",
        ),
        ("batch", _batch(config, world, split)),
        ("statistics", _statistics(world, split)),
        ("data", _data(config, world, split, samples, shards)),
        ("learning rate", ", ".join(f"epoch {epoch}: {rate:g}" for epoch, rate in learning_rates(config, samples))),
        ("steps", _steps(config, samples)),
        *([("image size", _stages(config))] if config.data.progressive_resizing else []),
        ("memory per rank", _memory(memory)),
    ]
    return "\n".join(f"{name + ':':<17}{text}" for name, text in lines)


def count_training_set(config: DataConfig) -> tuple[int | None, int | None]:
    """(images, shard files) of the training split; None where nothing lies at data.path or there are no shards."""
    if config.dataset == "synthetic":
        return config.synthetic_samples, None
    if config.dataset in _KNOWN_SETS:
        return _KNOWN_SETS[config.dataset], None
    root = Path(config.path).expanduser()
    if not config.path or not root.exists():
        return None, None
    source = open_source(config, root / config.train_split)
    return len(source), len(source.shard_paths) if hasattr(source, "shard_paths") else None


def build_and_measure(config: Config) -> tuple[torch.nn.Module, int]:
    """The network on the meta device, and the bytes per image that its forward keeps for the backward, in float32.

    Counted once per storage, weights left out: what autograd saves in one forward of two images without memory.
    """
    # These two change how the same function is computed; neither can be traced without a device.
    plain = replace(config.model, overlap_sync=False, compile_norm=False)
    model = build_model(plain, image_size_px=config.data.image_size_px, sync=False).to("meta")
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    kept: list[torch.Tensor] = []  # held, so that no storage's address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    images = torch.empty(_image_shape(config, 2), device="meta").contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage()._cdata, None)
    return model, sum(sizes.values()) // 2


def estimate_memory(
    config: Config, world: World, split: BatchSplit, *, parameters: int, state: int, activations: int
) -> Memory:
    """`state`: bytes of the state dict; `activations`: bytes per image in float32, halved under autocast."""
    stage = config.train.zero_stage if config.train.engine == "deepspeed" else 0
    shares = {part: world.size if stage >= part else 1 for part in (1, 2, 3)}
    per_image = activations if config.train.precision == "fp32" else activations // 2
    image = 4 * math.prod(_image_shape(config, 1))
    return Memory(
        weights=state // shares[3],
        gradients=4 * parameters // shares[2],
        optimizer=4 * parameters * optimizer_moments(config.optim) // shares[1],
        average=state if config.train.ema_decay is not None else 0,
        activations=per_image * split.per_rank_batch_size,
        images=image * split.per_rank_batch_size * (1 + config.data.prefetch_batches),
    )


def optimizer_moments(optim: OptimConfig) -> int:
    """Numbers that the optimizer keeps for each parameter."""
    return MOMENTS[optim.name]


def learning_rates(config: Config, samples: int | None) -> Iterator[tuple[int, float]]:
    """(epoch counted from 1, rate at its first step) wherever the schedule turns, and at the last epoch."""
    schedule, epochs = config.schedule, config.train.epochs
    steps = max(1, (samples or 0) // config.data.global_batch_size)
    turns = {1, math.ceil(schedule.warmup_epochs) + 1, epochs}
    if schedule.name == "step":
        turns.update(schedule.milestones_epochs)
    elif schedule.name == "cosine":
        turns.update(1 + epochs * quarter // 4 for quarter in (1, 2, 3))
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    for epoch in sorted(turn for turn in turns if turn <= epochs):
        step = (epoch - 1) * steps
        yield epoch, peak * learning_rate_share(schedule, step=step, steps_per_epoch=steps, epochs=epochs)


def _image_shape(config: Config, batch: int) -> tuple[int, int, int, int]:
    return batch, len(config.data.mean), config.data.image_size_px, config.data.image_size_px


def _engine(config: Config) -> str:
    stage = f" (ZeRO {config.train.zero_stage})" if config.train.engine == "deepspeed" else ""
    return f"{config.train.engine}{stage}, {config.train.precision}"


def _batch(config: Config, world: World, split: BatchSplit) -> str:
    return f"{split.in_words(config, world)}; validation {counted(split.per_rank_val_batch_size, 'image')} per rank"


def _statistics(world: World, split: BatchSplit) -> str:
    size = split.sync_group_size
    groups = (
        f"{counted(world.size // size, 'group')} of {counted(size, 'rank')}"
        if size > 1
        else "each rank for itself, no exchange"
    )
    last = f" (0-{size - 1}, ..., {world.size - size}-{world.size - 1})" if 1 < size < world.size else ""
    return f"over {counted(size * split.per_rank_batch_size, 'image')}: {groups}{last}"


def _data(config: Config, world: World, split: BatchSplit, samples: int | None, shards: int | None) -> str:
    if samples is None:
        where = f"nothing at data.path ({config.data.path})" if config.data.path else "data.path is not given"
        return f"{where}; --simulate-samples N stands for it"
    steps = samples // config.data.global_batch_size
    per_rank = steps * config.train.accumulation_steps * split.per_rank_batch_size
    files = "" if shards is None else f"; {counted(shards, 'shard file')}, {shards / world.size:.4g} per rank"
    left = samples - steps * config.data.global_batch_size
    return f"{counted(samples, 'training image')}, {per_rank:,} per rank and epoch, {left} left over by turns{files}"


def _stages(config: Config) -> str:
    stages = ", ".join(f"from epoch {first} on {side} px" for first, side in config.data.progressive_resizing)
    return f"training {stages}; validation and norm divisors at {config.data.image_size_px} px"


def _steps(config: Config, samples: int | None) -> str:
    if samples is None:
        return f"unknown number per epoch, {counted(config.train.epochs, 'epoch')}"
    steps = samples // config.data.global_batch_size
    if steps == 0:
        raise ConfigError(
            f"data.global_batch_size: 0 steps per epoch: {counted(samples, 'training image')}, "
            f"batch {config.data.global_batch_size}; lower it"
        )
    total = steps * config.train.epochs
    return f"{steps:,} per epoch x {counted(config.train.epochs, 'epoch')}, {min(total, config.train.max_steps or total):,} to run"


def _memory(memory: Memory) -> str:
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in vars(memory).items() if size)
    return f"about {memory.total / _GIB:.2f} GiB ({parts}), plus the device's context and workspaces"
