"""One interface, one order, one resume for every source."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.sources import SOURCES, make_source
from unitdist.data.batch import Batch, Loader

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
BuildLoader = Callable[..., Loader]


def samples(batches: list[Batch]) -> list[tuple[int, int]]:
    """(sample id, label) in the order in which they came."""
    return [pair for b in batches for pair in zip(b.sample_ids.tolist(), b.labels.tolist(), strict=True)]


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "torchvision"])
def test_resume_and_world_size_change_neither_samples_nor_order_nor_pixels(
    source: str, sample_data: Path, tmp_path: Path, build_loader: BuildLoader
) -> None:
    config = make_source(source, sample_data, tmp_path)
    ranks = [build_loader(config, rank=rank, size=2, batch=6, seed=3) for rank in range(2)]
    whole = [list(loader.iterate(1)) for loader in ranks]
    steps = ranks[0].batches_per_epoch
    assert [len(batches) for batches in whole] == [steps, steps] and steps >= 4
    middle = steps // 2
    # The same ranks go on, to the bit: other loaders, as after a restart.
    for rank in range(2):
        rest = list(build_loader(config, rank=rank, size=2, batch=6, seed=3).iterate(1, start_sample=middle * 12))
        assert samples(rest) == samples(whole[rank][middle:])
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[rank][middle:], strict=True))
    # Another number of ranks goes on with the rest of the same list: each once, in the order of the undisturbed run.
    job = [whole[rank][step] for step in range(middle, steps) for rank in range(2)]
    three = [
        list(build_loader(config, rank=rank, size=3, batch=4, seed=3).iterate(1, start_sample=middle * 12))
        for rank in range(3)
    ]
    continued = [three[rank][step] for step in range(steps - middle) for rank in range(3)]
    assert samples(continued) == samples(job)
    if source != "synthetic":  # whose images are noise by rank
        assert torch.equal(torch.cat([b.images for b in continued]), torch.cat([b.images for b in job]))
        assert len(set(samples(job))) == len(job) * 6


@pytest.mark.parametrize("source", SOURCES)
def test_fingerprint_tells_the_data_and_what_makes_the_pixels(
    source: str, sample_data: Path, tmp_path: Path, build_loader: BuildLoader
) -> None:
    config = make_source(source, sample_data, tmp_path)
    one = build_loader(config, batch=6).fingerprint()
    assert one == build_loader(config, rank=1, size=2, batch=3).fingerprint()
    assert one["num_samples"] == build_loader(config).num_samples
    if source in ("folder", "torchvision", "manifest", "webdataset", "tfrecord"):
        decoder = "pillow" if source == "torchvision" else "dali on the CPU, resized by torch"
        assert one["decoder"] == decoder
        assert str(one["versions"]).startswith("unitdist ") and decoder.split()[0] in str(one["versions"])
