"""Loaders at 32 px on what the verbs wrote."""

from pathlib import Path

import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.build import build_train_loader
from unitdist.world import World


def columns(batches: list[Batch]) -> tuple[list[int], torch.Tensor]:
    return torch.cat([b.sample_ids for b in batches]).tolist(), torch.cat([b.images for b in batches])


def small(root: Path, source: str, **changes: object) -> DataConfig:
    values = {"image_size_px": 32, "scale_range_px": (40, 64), "val_resize_px": 40, "num_threads": 1}
    return DataConfig(path=str(root), source=source, shuffle_window=40, **(values | changes))  # type: ignore[arg-type]


def loader_of(config: DataConfig, rank: int = 0, size: int = 1, batch: int = 12):
    world = World(rank=rank, local_rank=rank, size=size, local_size=size)
    return build_train_loader(config, world, per_rank_batch_size=batch, seed=3, device=torch.device("cpu"))
