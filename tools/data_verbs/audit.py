"""Simulate the ranks of a job and prove that each image is read exactly once per epoch, in one order for all.

Nothing is decoded: the plans of all ranks are compared, the very ones that training uses.
"""

import argparse
from pathlib import Path

import numpy as np

from unitdist.config import DataConfig
from unitdist.data.build import open_source
from unitdist.data.order import training_plan, validation_plan
from unitdist.data.reading import ImageSource
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted
from unitdist.world import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="data.path: the folder that holds the splits")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--source", choices=("folder", "manifest", "webdataset", "tfrecord"), default="folder")
    parser.add_argument("--world", type=int, default=8, help="ranks to simulate")
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)


def audit_training(source: ImageSource, world: int, batch: int, seed: int, epoch: int) -> int:
    """Images of the epoch left out because they fill no whole step. Raises DataError when anything is wrong."""
    order = source.order(seed, epoch)
    ranks = [World(rank=rank, local_rank=rank, size=world, local_size=world) for rank in range(world)]
    plans = [training_plan(order, 0, rank, batch).sample_ids for rank in ranks]
    job = np.stack(plans, axis=1).reshape(-1)
    counts = np.bincount(job, minlength=len(source))
    left_out = len(source) % (world * batch)
    if counts.max() > 1 or (counts == 0).sum() != left_out or not np.array_equal(job, order[: len(job)]):
        raise DataError(f"epoch {epoch}: {(counts > 1).sum()} images twice, {(counts == 0).sum()} never")
    # Continuing in mid-epoch on half as many ranks must go on with the very next image of the same list.
    half = max(world // 2, 1)
    start = len(job) // (2 * world * batch) * world * batch
    continued = [
        training_plan(order, start, World(rank=r, local_rank=r, size=half, local_size=half), batch).sample_ids
        for r in range(half)
    ]
    rest = np.stack(continued, axis=1).reshape(-1)
    if not np.array_equal(rest, order[start : start + len(rest)]):
        raise DataError(f"epoch {epoch}: {half} ranks continue with other images than {world}")
    return left_out


def audit_validation(source: ImageSource, world: int, batch: int) -> None:
    """Raises DataError unless each image is valid exactly once and all ranks have the same number of batches."""
    ranks = [World(rank=rank, local_rank=rank, size=world, local_size=world) for rank in range(world)]
    plans = [validation_plan(len(source), 0, rank, batch) for rank in ranks]
    seen = np.concatenate([plan.sample_ids[plan.valid] for plan in plans])
    if not np.array_equal(np.sort(seen), np.arange(len(source))) or len({plan.valid.shape for plan in plans}) != 1:
        raise DataError("validation does not see each image exactly once")


def run(options: argparse.Namespace) -> int:
    if min(options.world, options.batch, options.epochs) < 1:
        raise ConfigError("--world, --batch and --epochs must be >= 1")
    source = open_source(DataConfig(source=options.source), options.folder / options.split)
    if len(source) < options.world * options.batch:
        raise ConfigError(
            f"{options.folder / options.split} has {counted(len(source), 'image')}, a step of "
            f"{counted(options.world, 'rank')} x {options.batch} takes "
            f"{options.world * options.batch:,}: no step to look at; lower --world or --batch"
        )
    for epoch in range(options.epochs):
        left_out = audit_training(source, options.world, options.batch, options.seed, epoch)
        steps = len(source) // (options.world * options.batch)
        print(
            f"epoch {epoch}: {counted(steps, 'step')} x {counted(options.world, 'rank')} x "
            f"{counted(options.batch, 'image')}, none twice, {left_out} left out"
        )
    audit_validation(source, options.world, options.batch)
    print(f"read as for validation: each of {len(source):,} images exactly once on {counted(options.world, 'rank')}")
    return 0
