"""order.py: one order for every world size, resumable anywhere, validation exactly once."""

import time

import numpy as np
import pytest

from unitdist.data.order import block_order, epoch_order, training_batches, training_plan, validation_plan
from unitdist.world import World


def world_of(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, size=size, local_size=size)


def job_order(order: np.ndarray, start: int, size: int, batch: int) -> list[int]:
    """The samples of all ranks in the order in which the job consumes them."""
    plans = [training_plan(order, start, world_of(rank, size), batch).sample_ids for rank in range(size)]
    return np.stack(plans, axis=1).reshape(-1).tolist()


def test_epoch_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4


def test_epoch_order_mixes_the_whole_set() -> None:
    first, second = epoch_order(20_000, 0, 0), epoch_order(20_000, 0, 1)
    assert abs(np.corrcoef(first, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.03


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_world_size_consumes_the_same_list(size: int) -> None:
    order = epoch_order(103, 5, 2)
    assert job_order(order, 0, size, 12 // size) == order[: 103 // 12 * 12].tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_start_continues_the_list_on_any_world_size(size: int) -> None:
    order = epoch_order(200, 5, 2)
    for start in (0, 1, 12, 60, 100, 188, 189, 200):
        remaining = (200 - start) // 12 * 12
        assert job_order(order, start, size, 12 // size) == order[start : start + remaining].tolist()
        assert training_batches(200, start, size, 12 // size) == remaining // 12


def test_validation_takes_each_sample_exactly_once_in_60_random_settings() -> None:
    random = np.random.default_rng(0)
    settings = [(1, 8, 16), (3, 8, 2), (7, 8, 1), (8, 8, 1), (129, 2, 64), (503, 4, 64), (50, 4, 64)]
    settings += [
        (int(random.integers(1, 104)), int(random.integers(1, 9)), int(random.integers(1, 17))) for _ in range(53)
    ]
    for num_samples, size, batch in settings:
        plans = [validation_plan(num_samples, 0, world_of(rank, size), batch) for rank in range(size)]
        seen = np.concatenate([plan.sample_ids[plan.valid] for plan in plans])
        assert sorted(seen.tolist()) == list(range(num_samples)), (num_samples, size, batch)
        assert len({plan.sample_ids.shape for plan in plans}) == 1
        assert all(0 <= plan.sample_ids.min() and plan.sample_ids.max() < num_samples for plan in plans)
        assert len(plans[0].sample_ids) == -(-num_samples // (size * batch))


def test_validation_continues_after_start_sample() -> None:
    plans = [validation_plan(20, 7, world_of(rank, 2), 4) for rank in range(2)]
    assert sorted(np.concatenate([plan.sample_ids[plan.valid] for plan in plans]).tolist()) == list(range(7, 20))


def test_block_order_is_a_permutation_that_stays_within_a_window_of_blocks() -> None:
    starts = np.array([0, 100, 180, 300, 410, 500, 620, 700, 810, 900])
    order = block_order(starts, 1000, 0, 3, window_samples=300)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != block_order(starts, 1000, 0, 4, window_samples=300).tolist()
    block_of = np.searchsorted(starts, order, side="right") - 1
    for window in range(0, 1000, 300):
        assert len(set(block_of[window : window + 300].tolist())) <= 5
    within = order[:300]
    assert not np.all(np.diff(within) > 0)


def test_order_of_imagenet_takes_less_than_a_second() -> None:
    began = time.process_time()
    order = epoch_order(1_281_167, 0, 0)
    assert time.process_time() - began < 1
    assert np.array_equal(np.bincount(order, minlength=1_281_167), np.ones(1_281_167))
