"""unitdist.train.batch_split: who gets how many images, and who shares statistics."""

import pytest

from unitdist.config import Config, DataConfig, ModelConfig, TrainConfig
from unitdist.errors import ConfigError
from unitdist.train.batch_split import split_batch
from unitdist.world import World


def split(*, ranks: int, local: int | None = None, batch: int = 64, accumulation: int = 1, **model: object):
    config = Config(
        model=ModelConfig(**model),
        data=DataConfig(global_batch_size=batch),
        train=TrainConfig(accumulation_steps=accumulation),
    )
    return split_batch(config, World(rank=0, local_rank=0, size=ranks, local_size=local or ranks))


def test_global_batch_is_divided_by_ranks_and_accumulation() -> None:
    assert split(ranks=4, accumulation=2).per_rank_batch_size == 8


def test_uneven_batch_names_the_nearest_even_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.global_batch_size: 256 is not a multiple of 3 ranks x 2 .*nearest: 252 or 258"
    ):
        split(ranks=3, batch=256, accumulation=2)
    with pytest.raises(ConfigError, match=r"2 is not a multiple of 4 ranks .*nearest: 4$"):
        split(ranks=4, batch=2)


def test_stats_batch_size_sets_the_sync_group() -> None:
    assert split(ranks=32, batch=256, stats_batch_size=64).sync_group_size == 8
    assert split(ranks=8, batch=64, stats_batch_size=64).sync_group_size == 8
    assert split(ranks=4, batch=256, stats_batch_size=64).sync_group_size == 1


def test_impossible_stats_batch_names_the_possible_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.stats_batch_size: 48 cannot be formed from 8 ranks with 8 images each; possible: 8, 16, 32, 64",
    ):
        split(ranks=8, stats_batch_size=48)


@pytest.mark.parametrize(("group", "size"), [("world", 16), ("node", 8), ("none", 1)])
def test_sync_group_by_name(group: str, size: int) -> None:
    assert split(ranks=16, local=8, sync_group=group).sync_group_size == size
