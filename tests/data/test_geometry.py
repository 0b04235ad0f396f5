"""geometry.py: torchvision's arithmetic, the paper's ranges, and a region that holds all the kernel needs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from unitdist.config import DataConfig
from unitdist.data.geometry import (
    ResizeThenCrop,
    centre_crop,
    decode_region,
    random_resized_crop,
    resized_size,
    scale_augmentation,
    training_geometry,
)

IDS = np.arange(20_000, dtype=np.int64)


def sizes_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(30, 1500, (count, 2))


def scale_of(size_hw: np.ndarray, ids: np.ndarray, epoch: int = 0) -> ResizeThenCrop:
    return scale_augmentation(
        size_hw, 224, seed=0, epoch=epoch, sample_ids=ids, scale_range_px=(256, 480), flip_probability=0.5
    )


def test_resized_size_is_torchvisions() -> None:
    sizes = sizes_of(500)
    shorter = np.random.default_rng(1).integers(16, 640, 500)
    expected = [
        list(transforms.resize(torch.empty(1, h, w, device="meta"), [int(s)]).shape[1:])
        for (h, w), s in zip(sizes.tolist(), shorter.tolist(), strict=True)
    ]
    assert resized_size(sizes, shorter).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_centre_crop_is_torchvisions(seed: int) -> None:
    for height, width in sizes_of(60, seed).tolist():
        geometry = centre_crop(np.array([[height, width]]), 256, 224)
        resized_h, resized_w = geometry.resized_hw[0].tolist()
        rows = torch.arange(resized_h)[:, None].expand(resized_h, resized_w)
        columns = torch.arange(resized_w)[None].expand(resized_h, resized_w)
        cut = transforms.center_crop(torch.stack([rows, columns]), [224, 224])
        assert cut[:, 0, 0].tolist() == geometry.offset_yx[0].tolist()


def test_scale_augmentation_covers_its_ranges_to_the_ends() -> None:
    size_hw = np.tile([375, 500], (len(IDS), 1))
    geometry = scale_of(size_hw, IDS)
    shorter = geometry.resized_hw[:, 0]
    assert (shorter.min(), shorter.max()) == (256, 480)
    assert abs(shorter.mean() - 368) < 2
    free = geometry.resized_hw - 224
    assert np.all(geometry.offset_yx >= 0) and np.all(geometry.offset_yx <= free)
    assert np.any(geometry.offset_yx[:, 0] == 0) and np.any(geometry.offset_yx[:, 0] == free[:, 0])
    assert abs((geometry.offset_yx / free).mean() - 0.5) < 0.01
    assert abs(geometry.flip.mean() - 0.5) < 0.02


def test_augmentation_changes_with_the_epoch_and_the_sample() -> None:
    size_hw = np.tile([375, 500], (64, 1))
    first, second = scale_of(size_hw, IDS[:64]), scale_of(size_hw, IDS[:64], epoch=1)
    assert (first.resized_hw[:, 0] != second.resized_hw[:, 0]).mean() > 0.9
    assert len({tuple(row) for row in np.concatenate([first.resized_hw, first.offset_yx], axis=1).tolist()}) == 64


def test_random_resized_crop_has_torchvisions_distribution() -> None:
    size_hw = np.tile([375, 500], (len(IDS), 1))
    geometry = random_resized_crop(
        size_hw,
        seed=0,
        epoch=0,
        sample_ids=IDS,
        area_range=(0.08, 1.0),
        aspect_range=(0.75, 4 / 3),
        flip_probability=0.5,
    )
    assert np.all(geometry.corner_yx >= 0) and np.all(geometry.corner_yx + geometry.box_hw <= size_hw)
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500, device="meta")
    drawn = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [0.75, 4 / 3]) for _ in range(5000)])
    for ours, theirs in (
        (geometry.box_hw.prod(axis=1), drawn[:, 2] * drawn[:, 3]),
        (geometry.box_hw[:, 1] / geometry.box_hw[:, 0], drawn[:, 3] / drawn[:, 2]),
        (geometry.corner_yx[:, 0], drawn[:, 0]),
        (geometry.corner_yx[:, 1], drawn[:, 1]),
    ):
        levels = [0.1, 0.25, 0.5, 0.75, 0.9]
        spread = np.quantile(theirs, 0.95) - np.quantile(theirs, 0.05)
        assert abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() < 0.04 * spread


@pytest.mark.parametrize(("height", "width", "box"), [(10, 1000, (10, 13)), (1000, 10, (13, 10)), (1, 1, (1, 1))])
def test_extreme_shapes_fall_back_to_the_central_box(height: int, width: int, box: tuple[int, int]) -> None:
    geometry = random_resized_crop(
        np.array([[height, width]]),
        seed=0,
        epoch=0,
        sample_ids=IDS[:1],
        area_range=(0.5, 1.0),
        aspect_range=(0.75, 4 / 3),
        flip_probability=0.0,
    )
    assert tuple(geometry.box_hw[0]) == box
    assert tuple(geometry.corner_yx[0]) == ((height - box[0]) // 2, (width - box[1]) // 2)


def test_decode_region_holds_the_window_and_stays_inside_the_image() -> None:
    sizes = sizes_of(5000)
    region = decode_region(scale_of(sizes, IDS[:5000]), sizes, 224)
    assert np.all(region.start_yx >= 0) and np.all(region.start_yx + region.shape_hw <= sizes)
    assert np.all(region.roi_start_yx >= 0) and np.all(region.roi_end_yx <= region.shape_hw + 1e-3)
    assert np.all(region.roi_end_yx > region.roi_start_yx)


def test_training_geometry_without_augmentation_is_the_centre_crop() -> None:
    sizes = sizes_of(10)
    config = DataConfig(path=str(Path()), augmentation="none")
    geometry = training_geometry(config, seed=0, epoch=0, sample_ids=IDS[:10], size_hw=sizes)
    assert isinstance(geometry, ResizeThenCrop)
    assert np.array_equal(geometry.offset_yx, centre_crop(sizes, 256, 224).offset_yx)
    assert not geometry.flip.any()
