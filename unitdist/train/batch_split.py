"""How the global batch is divided over ranks, accumulation steps and synchronized statistics."""

from dataclasses import dataclass

from unitdist.config import Config, ModelConfig
from unitdist.errors import ConfigError
from unitdist.wording import counted
from unitdist.world import World


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """`per_rank_batch_size` images per rank and micro-batch; `sync_group_size` ranks share batch statistics."""

    per_rank_batch_size: int
    per_rank_val_batch_size: int
    sync_group_size: int

    def in_words(self, config: Config, world: World) -> str:
        """Such as 64 = 2 ranks x 4 micro-batches x 8 images."""
        micro_batches = counted(config.train.accumulation_steps, "micro-batch", "micro-batches")
        images = counted(self.per_rank_batch_size, "image")
        return f"{config.data.global_batch_size} = {counted(world.size, 'rank')} x {micro_batches} x {images}"


def split_batch(config: Config, world: World) -> BatchSplit:
    """Divide `data.global_batch_size`; the only place where it is divided. Raises ConfigError where it is uneven."""
    batch, parts = config.data.global_batch_size, world.size * config.train.accumulation_steps
    if batch % parts:
        lower, upper = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(
            f"data.global_batch_size: {batch} is not a multiple of {counted(world.size, 'rank')} x "
            f"{counted(config.train.accumulation_steps, 'accumulation step')}; nearest: {near}"
        )
    per_rank = batch // parts
    return BatchSplit(
        per_rank_batch_size=per_rank,
        per_rank_val_batch_size=-(-config.data.val_batch_size // world.size),
        sync_group_size=sync_group_size(config.model, world, per_rank_batch_size=per_rank),
    )


def sync_group_size(model: ModelConfig, world: World, *, per_rank_batch_size: int) -> int:
    """Ranks per group of synchronized statistics, from `model.stats_batch_size` or `model.sync_group`; 1: no exchange."""
    if model.stats_batch_size is None:
        size = {"world": world.size, "node": world.local_size, "none": 1}[model.sync_group]
        if world.size % size:
            raise ConfigError(
                f"model.sync_group: {model.sync_group} needs nodes of equal size; {world.size} ranks, {size} on this node"
            )
        return size
    size, rest = divmod(model.stats_batch_size, per_rank_batch_size)
    if rest or size < 1 or world.size % size:
        possible = sorted(ranks * per_rank_batch_size for ranks in range(1, world.size + 1) if world.size % ranks == 0)
        raise ConfigError(
            f"model.stats_batch_size: {model.stats_batch_size} cannot be formed from {counted(world.size, 'rank')} with "
            f"{counted(per_rank_batch_size, 'image')} each; possible: {', '.join(map(str, possible))} "
            "(or change data.global_batch_size, train.accumulation_steps)"
        )
    return size
