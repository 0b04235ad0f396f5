"""Fixtures of the data room's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.world import World

Build = Callable[..., Loader]


@pytest.fixture
def small_config(sample_data: Path) -> Callable[..., DataConfig]:
    """DataConfig of the sample data at 32 px, with changes."""

    def make(**changes: object) -> DataConfig:
        values: dict[str, object] = {
            "path": str(sample_data),
            "image_size_px": 32,
            "scale_range_px": (37, 68),
            "val_resize_px": 37,
            "num_threads": 1,
        }
        return DataConfig(**(values | changes))  # type: ignore[arg-type]

    return make


def world_of(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, size=size, local_size=size)


@pytest.fixture
def build_loader():
    """build(config, rank=0, size=1, batch=8, seed=0, training=True); closes what it built."""
    built: list[Loader] = []

    def build(
        config: DataConfig, *, rank: int = 0, size: int = 1, batch: int = 8, seed: int = 0, training: bool = True
    ) -> Loader:
        world, device = world_of(rank, size), torch.device("cpu")
        if training:
            loader = build_train_loader(config, world, per_rank_batch_size=batch, seed=seed, device=device)
        else:
            loader = build_val_loader(config, world, per_rank_batch_size=batch, device=device)
        built.append(loader)
        return loader

    yield build
    for loader in built:
        loader.close()
