"""In which order an epoch visits the samples, and which of them a rank gets: the same list for every world size.

The micro-batch t of the whole job takes positions [start + t * W * b, start + (t + 1) * W * b) of the epoch's order,
rank r the r-th slice of b samples (W ranks, b samples per rank).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unitdist.data import draws
from unitdist.data.draws import Ints
from unitdist.world import World


@dataclass(frozen=True, kw_only=True)
class Plan:
    """This rank's part of an epoch: sample_ids and valid, both (batches, per_rank_batch_size)."""

    sample_ids: Ints
    valid: npt.NDArray[np.bool_]


def epoch_order(num_samples: int, seed: int, epoch: int) -> Ints:
    """A permutation of range(num_samples), int64, drawn by (seed, epoch) alone."""
    keys = draws.hash64(seed, epoch, np.arange(num_samples, dtype=np.int64), draws.ORDER)
    order: Ints = np.argsort(keys, kind="stable")
    return order


def block_order(block_starts: Ints, num_samples: int, seed: int, epoch: int, *, window_samples: int) -> Ints:
    """A permutation that visits few blocks (tar files) at a time: blocks shuffled, then samples within a window.

    block_starts: (B,) int64, the first sample id of each block, increasing from 0. The blocks are put into a random
    order, their samples laid end to end, and each run of window_samples positions is permuted within itself. A
    reader thus touches about window_samples / block size blocks at any time. Drawn by (seed, epoch) alone.
    """
    block_keys = draws.hash64(seed, epoch, np.arange(len(block_starts), dtype=np.int64), draws.BLOCK_ORDER)
    block_order_b = np.argsort(block_keys, kind="stable")
    ends = np.append(block_starts[1:], num_samples)
    sizes = (ends - block_starts)[block_order_b]
    first_position = np.cumsum(sizes) - sizes
    laid_out = np.arange(num_samples, dtype=np.int64) + np.repeat(block_starts[block_order_b] - first_position, sizes)
    keys = draws.hash64(seed, epoch, laid_out, draws.ORDER)
    window = np.arange(num_samples, dtype=np.int64) // window_samples
    order: Ints = laid_out[np.lexsort((keys, window))]
    return order


def training_batches(num_samples: int, start_sample: int, world_size: int, per_rank_batch_size: int) -> int:
    """Complete micro-batches of the whole job that remain after start_sample samples."""
    return max(num_samples - start_sample, 0) // (world_size * per_rank_batch_size)


def training_plan(order: Ints, start_sample: int, world: World, per_rank_batch_size: int) -> Plan:
    """This rank's training batches from start_sample on; the last incomplete batch of the job is dropped."""
    batches = training_batches(len(order), start_sample, world.size, per_rank_batch_size)
    used = order[start_sample : start_sample + batches * world.size * per_rank_batch_size]
    sample_ids = used.reshape(batches, world.size, per_rank_batch_size)[:, world.rank]
    return Plan(sample_ids=sample_ids, valid=np.ones(sample_ids.shape, dtype=np.bool_))


def validation_plan(num_samples: int, start_sample: int, world: World, per_rank_batch_size: int) -> Plan:
    """This rank's validation batches in the data set's order: each sample valid exactly once over all ranks.

    All ranks have the same number of batches, ceil(remaining / (W * b)). Places after the last sample repeat it and
    are not valid; with fewer samples than ranks some ranks have no valid row at all.
    """
    remaining = max(num_samples - start_sample, 0)
    batches = -(-remaining // (world.size * per_rank_batch_size))
    positions = start_sample + np.arange(batches * world.size * per_rank_batch_size, dtype=np.int64)
    positions = positions.reshape(batches, world.size, per_rank_batch_size)[:, world.rank]
    return Plan(sample_ids=np.minimum(positions, num_samples - 1), valid=positions < num_samples)
