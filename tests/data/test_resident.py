"""resident.py: pad-4 crop and flip on the device, the same order and draws rules as the image loaders."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unitdist.config import DataConfig
from unitdist.data import draws
from unitdist.data.batch import Batch
from unitdist.data.order import epoch_order
from unitdist.data.resident import ImageArrays, ResidentLoader
from unitdist.errors import ConfigError
from unitdist.world import World


def arrays_of(channels: int = 3, side: int = 12, count: int = 50) -> ImageArrays:
    pixels = np.random.default_rng(0).integers(1, 256, (count, side, side, channels), dtype=np.uint8)
    return ImageArrays(
        kind="cifar10", images_nhwc=pixels, labels=np.arange(count) % 10, class_to_idx={str(i): i for i in range(10)}
    )


def config_of(**changes: object) -> DataConfig:
    values: dict[str, object] = {
        "path": str(Path()),
        "dataset": "cifar10",
        "loader": "resident",
        "augmentation": "pad_crop_flip",
        "image_size_px": 12,
        "mean": (0.5, 0.25, 0.125),
        "std": (0.5, 0.25, 0.2),
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def loader_of(rank: int = 0, size: int = 1, batch: int = 10, training: bool = True, **changes: object):
    arrays = arrays_of()
    world = World(rank=rank, local_rank=rank, size=size, local_size=size)
    return ResidentLoader(
        arrays,
        config_of(**changes),
        world,
        per_rank_batch_size=batch,
        seed=4,
        training=training,
        device=torch.device("cpu"),
    )


def normalized(pixels_hwc: np.ndarray) -> torch.Tensor:
    values = (pixels_hwc / 255 - np.array([0.5, 0.25, 0.125])) / np.array([0.5, 0.25, 0.2])
    return torch.from_numpy(values).permute(2, 0, 1).float()


def same_batch(first: Batch, second: Batch) -> bool:
    return first.sample_ids.tolist() == second.sample_ids.tolist() and torch.equal(first.images, second.images)


def test_images_are_the_padded_cropped_mirrored_and_normalized_pixels() -> None:
    arrays = arrays_of()
    seen_flips = set()
    for batch in loader_of().iterate(3):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, sample_id in zip(batch.images, batch.sample_ids.tolist(), strict=True):
            one = np.array([sample_id])
            y, x = (int(draws.integer(4, 3, one, purpose, 9)[0]) for purpose in (draws.CROP_Y, draws.CROP_X))
            flip = bool(draws.uniform(4, 3, one, draws.FLIP)[0] < 0.5)
            padded = np.pad(arrays.images_nhwc[sample_id], ((4, 4), (4, 4), (0, 0)))[y : y + 12, x : x + 12]
            expected = normalized(padded[:, ::-1].copy() if flip else padded)
            torch.testing.assert_close(image, expected, atol=1e-6, rtol=1e-6)
            seen_flips.add(flip)
    assert seen_flips == {True, False}


def test_order_is_the_common_permutation_on_every_world_size() -> None:
    expected = epoch_order(50, 4, 1)[:48].tolist()
    for size in (1, 2, 3):
        ranks = [list(loader_of(rank, size, 12 // size).iterate(1)) for rank in range(size)]
        ids = torch.cat([ranks[rank][step].sample_ids for step in range(4) for rank in range(size)])
        assert ids.tolist() == expected


def test_resume_continues_bit_for_bit() -> None:
    whole = list(loader_of().iterate(2))
    for start in (0, 2, 5):
        rest = list(loader_of().iterate(2, start_sample=10 * start))
        assert len(rest) == 5 - start
        assert all(same_batch(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_validation_shows_each_plain_image_once() -> None:
    arrays, seen = arrays_of(), []
    for rank in range(3):
        loader = loader_of(rank, 3, 8, training=False)
        batches = list(loader.iterate(0))
        assert len(batches) == loader.batches_per_epoch == 3
        for batch in batches:
            for image, sample_id in zip(batch.images[batch.valid], batch.sample_ids[batch.valid].tolist(), strict=True):
                expected = normalized(arrays.images_nhwc[sample_id])
                torch.testing.assert_close(image, expected, atol=1e-6, rtol=1e-6)
                seen.append(sample_id)
    assert sorted(seen) == list(range(50))


def test_gray_images_get_as_many_channels_as_the_mean_has_numbers() -> None:
    for mean in ((0.5,), (0.5, 0.5, 0.5)):
        config = config_of(mean=mean, std=mean, augmentation="none")
        loader = ResidentLoader(
            arrays_of(channels=1),
            config,
            World.single(),
            per_rank_batch_size=5,
            seed=0,
            training=True,
            device=torch.device("cpu"),
        )
        images = next(loader.iterate(0)).images
        assert images.shape == (5, len(mean), 12, 12)
        assert torch.equal(images, images[:, :1].expand_as(images))


def test_wrong_side_or_channels_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match="data.image_size_px: cifar10 has 12 x 12 images, got 32"):
        loader_of(image_size_px=32)
    with pytest.raises(ConfigError, match="data.mean: cifar10 has 3 channels, got 1 numbers"):
        loader_of(mean=(0.5,), std=(0.5,))


def test_fingerprint_tells_seed_augmentation_and_content_apart() -> None:
    fingerprint = loader_of().fingerprint()
    assert fingerprint == loader_of(rank=1, size=2).fingerprint()
    assert fingerprint["seed"] == 4 and fingerprint["num_samples"] == 50
    assert fingerprint != loader_of(flip_probability=0.0).fingerprint()
