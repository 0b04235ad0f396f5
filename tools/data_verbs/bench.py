"""Measure this storage and these cores: reading alone, and the training pipeline, for each source that is there.

Reads each source in an epoch's order. Repeat with a cold page cache to see the storage and not the memory.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import torch

from unitdist.config import DataConfig
from unitdist.data.build import build_train_loader, open_source
from unitdist.data.reading import ReadingPolicy, read_ahead
from unitdist.errors import ConfigError
from unitdist.world import World

BATCH = 64
POLICY = ReadingPolicy(replace=True, max_broken=10**9, max_pixels=10**9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="data.path: the folder that holds the splits")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--images", type=int, default=2048, help="images per measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of threads to try")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def present_sources(folder: Path, split: str) -> list[str]:
    """The sources that can be opened for this split."""
    found = ["folder"] if any((folder / split).glob("*/*")) and not (folder / split / "index.tsv").exists() else []
    found += ["manifest"] if (folder / f"{split}.tsv").exists() else []
    if (folder / split / "index.tsv").exists():
        kind = "webdataset" if any((folder / split).glob("*.tar")) else "tfrecord"
        found.append(kind)
    if not found:
        raise ConfigError(f"{folder}: no folder, manifest or index of split {split}")
    return found


def reading_speed(config: DataConfig, split: Path, images: int, threads: int) -> tuple[float, float]:
    """(images per second, MB per second) of reading in an epoch's order."""
    source = open_source(config, split)
    rows = source.order(0, 0)[: min(images, len(source)) // BATCH * BATCH].reshape(-1, BATCH)
    began, size = time.perf_counter(), 0
    for batch in read_ahead(source, rows, POLICY, threads=threads, batches_ahead=4, refused={}):
        size += sum(len(image) for image in batch.images)
    seconds = time.perf_counter() - began
    return rows.size / seconds, size / 1e6 / seconds


def pipeline_speed(config: DataConfig, images: int) -> tuple[float, float]:
    """(images per second, CPU milliseconds per image) of the training pipeline after its first two batches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = build_train_loader(config, World.single(), per_rank_batch_size=BATCH, seed=0, device=device)
    batches = min(images // BATCH, loader.batches_per_epoch)
    iterator = loader.iterate(0)
    for _ in range(2):
        next(iterator)
    began, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(batches - 2):
        next(iterator)
    measured = (batches - 2) * BATCH
    result = measured / (time.perf_counter() - began), 1000 * (cpu_seconds() - cpu) / measured
    loader.close()
    return result


def run(options: argparse.Namespace) -> int:
    if min(options.threads) < 1:
        raise ConfigError("--threads must be >= 1")
    sources = present_sources(options.folder, options.split)
    images = min(
        options.images, *(len(open_source(DataConfig(source=name), options.folder / options.split)) for name in sources)
    )
    if images < 4 * BATCH:
        raise ConfigError(
            f"{options.folder / options.split} and --images {options.images}: {images} images to read; at least {4 * BATCH} are needed"
        )
    print(f"{os.cpu_count()} cores; {options.images} images per line, batches of {BATCH}")
    print("| source | threads | reading img/s | reading MB/s | pipeline img/s | pipeline CPU ms/img |")
    print("| --- | --- | --- | --- | --- | --- |")
    best: tuple[float, str, int] = (0.0, "", 0)
    for name in sources:
        for threads in options.threads:
            config = DataConfig(
                path=str(options.folder),
                train_split=options.split,
                source=name,  # type: ignore[arg-type]
                num_threads=threads,
                on_broken="replace",
                max_broken_share=1.0,
            )
            read, megabytes = reading_speed(config, options.folder / options.split, options.images, threads)
            speed, cpu_ms = pipeline_speed(config, options.images)
            print(f"| {name} | {threads} | {read:,.0f} | {megabytes:,.0f} | {speed:,.0f} | {cpu_ms:.2f} |", flush=True)
            best = max(best, (speed, name, threads))
    print(f"fastest here: data.source={best[1]} data.num_threads={best[2]} ({best[0]:,.0f} images/s per process)")
    return 0
