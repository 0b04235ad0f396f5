"""tools/data.py pack and index: shards that hold the same images and keep every promise of the loaders."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tools.loading import columns, loader_of, small
from unitdist.config import DataConfig
from unitdist.data.build import build_val_loader, open_source
from unitdist.world import World

RunData = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(("source", "folder"), [("webdataset", "tars"), ("tfrecord", "records")])
def test_shards_hold_the_same_images_and_keep_every_promise_of_the_loaders(
    packed: Path, sample_data: Path, source: str, folder: str
) -> None:
    config = small(packed / folder, source)
    files, shards = open_source(DataConfig(), sample_data / "train"), open_source(config, packed / folder / "train")
    assert shards.class_to_idx == files.class_to_idx
    by_content = {files.read(i): int(files.labels[i]) for i in range(len(files))}
    assert {shards.read(i): int(shards.labels[i]) for i in range(len(shards))} == by_content
    ids, images = columns(list(loader_of(config).iterate(1)))
    assert len(set(ids)) == 192
    ranks = [list(loader_of(config, rank, 3, 4).iterate(1)) for rank in range(3)]
    job_ids, job_images = columns([ranks[rank][step] for step in range(16) for rank in range(3)])
    assert job_ids == ids and torch.equal(job_images, images)
    rest_ids, rest_images = columns(list(loader_of(config).iterate(1, start_sample=60)))
    assert rest_ids == ids[60:] and torch.equal(rest_images, images[60:])
    validation = [
        b
        for rank in range(3)
        for b in build_val_loader(
            config,
            World(rank=rank, local_rank=rank, size=3, local_size=3),
            per_rank_batch_size=7,
            device=torch.device("cpu"),
        ).iterate(0)
    ]
    assert sorted(i for b in validation for i in b.sample_ids[b.valid].tolist()) == list(range(80))


def test_pack_continues_gives_the_same_bytes_and_refuses_other_arguments(
    packed: Path, sample_data: Path, run_data: RunData
) -> None:
    target = packed / "tars" / "train"
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (target / "000003.tar").unlink()
    (target / "index.tsv").unlink()
    arguments = ("pack", sample_data / "train", "--output", target, "--images-per-shard", 20, "--workers", 1)
    assert run_data(*arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    code, _, error = run_data(*arguments, "--seed", 5)
    assert code == 2 and error == f"error: {target} was packed with other seed: give another --output\n"
    content = bytearray(before["000002.tar"])
    content[5000] ^= 1
    (target / "000002.tar").write_bytes(content)
    code, _, error = run_data(*arguments)
    assert code == 1 and "000002.tar" in error and "pack again" in error


def test_pack_shrinks_larger_images_to_the_asked_side(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    arguments = ("--output", tmp_path, "--resize-shorter", 64, "--workers", 1)
    assert run_data("pack", sample_data / "val", *arguments)[0] == 0
    index = open_source(DataConfig(source="webdataset"), tmp_path)
    sizes, modes = set(), set()
    for i in range(len(index)):
        with Image.open(io.BytesIO(index.read(i))) as image:
            sizes.add(min(image.size))
            modes.add(image.mode)
    assert sizes == {64} and modes == {"L", "RGB"}


def test_index_finds_in_packed_tars_what_pack_wrote(packed: Path, run_data: RunData) -> None:
    target = packed / "tars" / "train"
    before = (target / "index.tsv").read_text()
    code, _, _ = run_data("index", target, "--kind", "webdataset", "--classes", target / "classes.txt")
    assert code == 0 and (target / "index.tsv").read_text() == before
    (packed / "few.txt").write_text("a\nb\n")
    code, _, error = run_data("index", target, "--kind", "webdataset", "--classes", packed / "few.txt")
    assert code == 2 and "few.txt has 2 names, the shards have 16 classes" in error
