"""device_augment.py: each operation does what its name says, and a sample's result does not depend on its batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.data.device_augment import (
    OPERATIONS,
    augment_on_device,
    erased_boxes,
    rand_augment,
    random_erasing,
)

IDS = np.arange(64, dtype=np.int64)


def random_images(count: int = 64, side: int = 24) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return (levels / 255).to(memory_format=torch.channels_last)


def levels_of(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("identity", lambda x: x),
        ("autocontrast", transforms.autocontrast),
        ("equalize", transforms.equalize),
        ("solarize", lambda x: transforms.solarize(x, 255 * 0.4)),
        ("posterize", lambda x: transforms.posterize(x, 6)),
        ("brightness", lambda x: transforms.adjust_brightness(x, 1 + 0.54)),
        ("color", lambda x: transforms.adjust_saturation(x, 1 + 0.54)),
        ("contrast", lambda x: transforms.adjust_contrast(x, 1 + 0.54)),
        ("sharpness", lambda x: transforms.adjust_sharpness(x, 1 + 0.54)),
    ],
)
def test_colour_operations_agree_with_torchvision_on_grey_levels(name: str, reference: Callable) -> None:
    images = random_images(4)
    ours = levels_of(OPERATIONS[name](images, 0.6, 1.0).clamp(0, 1)).int()
    assert (ours - reference(levels_of(images)).int()).abs().max() <= 2


def test_moving_operations_move_a_mark_where_they_should() -> None:
    image = torch.zeros(1, 3, 41, 41)
    image[..., 20, 30] = 1.0  # on the centre's row, 10 to the right

    def place(name: str, strength: float, sign: float) -> list[int]:
        moved = OPERATIONS[name](image, strength, sign)[0, 0]
        return [int(moved.argmax()) // 41, int(moved.argmax()) % 41]

    assert place("translate_x", 0.5, -1.0) == [20, 30 - round(0.225 * 41)]
    assert place("translate_y", 0.5, 1.0) == [20 + round(0.225 * 41), 30]
    row, column = place("rotate", 1.0, 1.0)
    assert abs(row - 20) == 5 and abs(column - 28.66) < 1
    assert place("rotate", 1.0, -1.0)[0] == 40 - row
    assert place("shear_x", 1.0, 1.0) == [20, 30]
    assert abs(place("shear_y", 1.0, 1.0)[0] - 20) == 3


def test_a_sample_is_augmented_alike_in_any_batch_and_epoch_by_epoch_anew() -> None:
    images = random_images()
    settings = {"seed": 1, "operations": 2, "magnitude": 9}
    together = rand_augment(images, IDS, epoch=0, **settings)
    alone = torch.cat([rand_augment(images[i : i + 8], IDS[i : i + 8], epoch=0, **settings) for i in range(0, 64, 8)])
    assert torch.equal(together, alone)
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert together.min() >= 0 and together.max() <= 1
    assert not torch.equal(images, together)
    other = rand_augment(images, IDS, epoch=1, **settings)
    assert (other != together).flatten(1).any(1).float().mean() > 0.8


def test_all_operations_and_signs_are_drawn_equally_often() -> None:
    calls: dict[tuple[str, float], int] = {}

    def counting(name: str) -> Callable:
        def operation(images: torch.Tensor, _strength: float, sign: float) -> torch.Tensor:
            calls[name, sign] = calls.get((name, sign), 0) + len(images)
            return images

        return operation

    saved = dict(OPERATIONS)
    try:
        OPERATIONS.update({name: counting(name) for name in OPERATIONS})
        ids = np.arange(28_000, dtype=np.int64)
        rand_augment(torch.zeros(28_000, 1, 1, 1), ids, seed=0, epoch=0, operations=1, magnitude=9)
    finally:
        OPERATIONS.update(saved)
    assert len(calls) == 28
    assert all(850 < count < 1150 for count in calls.values())


def test_erased_boxes_have_the_asked_share_and_areas() -> None:
    ids = np.arange(20_000, dtype=np.int64)
    boxes = erased_boxes(ids, 224, seed=0, epoch=0, probability=0.25)
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = height * width > 0
    assert abs(erased.mean() - 0.25) < 0.01
    area = (height * width)[erased] / 224**2
    assert 0.019 < area.min() and area.max() < 0.34 and abs(area.mean() - 0.17) < 0.01
    assert boxes.min() >= 0 and boxes.max() <= 224


def test_random_erasing_clears_the_box_and_nothing_else() -> None:
    images = random_images() + 1
    boxes = erased_boxes(IDS, 24, seed=2, epoch=3, probability=0.5)
    erased = random_erasing(images, IDS, seed=2, epoch=3, probability=0.5)
    for image, original, (top, left, bottom, right) in zip(erased, images, boxes.tolist(), strict=True):
        expected = original.clone()
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(image, expected)


def test_nothing_asked_leaves_the_very_tensor() -> None:
    images = random_images()
    assert augment_on_device(images, IDS, DataConfig(), seed=0, epoch=0) is images


def test_loaders_apply_it_in_training_only_and_resume_bit_for_bit(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader]
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    changes = {"randaugment_operations": 2, "erasing_probability": 0.5}
    plain, augmented = build_loader(small_config(), batch=16), build_loader(small_config(**changes), batch=16)
    whole = list(augmented.iterate(0))
    different = [(a.images != b.images).flatten(1).any(1) for a, b in zip(plain.iterate(0), whole, strict=True)]
    assert torch.cat(different).float().mean() > 0.8
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in whole)
    for ours, expected in zip(augmented.iterate(0, start_sample=64), whole[4:], strict=True):
        assert torch.equal(ours.images, expected.images)
    assert augmented.fingerprint()["randaugment"] != plain.fingerprint()["randaugment"]
    for a, b in zip(
        build_loader(small_config(), training=False).iterate(0),
        build_loader(small_config(**changes), training=False).iterate(0),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)
