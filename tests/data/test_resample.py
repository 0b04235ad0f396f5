"""resample.py: Pillow's pixels, with any number of threads, in memory that nobody else writes to."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data import resample
from unitdist.data.batch import Loader
from unitdist.data.geometry import CropThenResize, ResizeThenCrop, centre_crop, corner_region, scale_augmentation
from unitdist.data.resample import Buffers, Regions, Resampler, cut_square
from unitdist.data.transfer import uint8_normalization

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def made_up_regions(batches: int, count: int) -> list[Regions]:
    """Whole images as regions, resized to 32 px and mirrored at random."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(batches):
        size_hw = random.integers(1, 90, (count, 2))
        images = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in size_hw]
        box = CropThenResize(corner_yx=np.zeros((count, 2), int), box_hw=size_hw, flip=random.random(count) < 0.5)
        made.append(Regions(images=images, region=corner_region(box, size_hw, 32)))
    return made


def resampler(*, threads: int = 2, count: int = 6, device: torch.device = CPU) -> Resampler:
    return Resampler(batch_size=count, side_px=32, mean=MEAN, std=STD, device=device, threads=threads)


def squares_of(images: list[np.ndarray], geometry: ResizeThenCrop | CropThenResize, side_px: int) -> list[np.ndarray]:
    """Each window of whole images, by way of its region alone."""
    size_hw = np.array([image.shape[:2] for image in images])
    region = corner_region(geometry, size_hw, side_px)
    squares = []
    for row, image in enumerate(images):
        (top, left), (height, width) = region.start_yx[row], region.shape_hw[row]
        assert top >= 0 and left >= 0 and top + height <= size_hw[row, 0] and left + width <= size_hw[row, 1]
        decoded = np.ascontiguousarray(image[top : top + height, left : left + width])
        squares.append(cut_square(decoded, region, row, side_px).numpy())
    return squares


def noise(sizes_hw: list[tuple[int, int]]) -> list[np.ndarray]:
    """The hardest images for a resize: neighbours have nothing in common."""
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in sizes_hw]


def test_whole_regions_are_pillows_within_one_grey_level_to_the_rim() -> None:
    images = noise([(1, 1), (1, 40), (32, 32), (31, 33), (300, 17), (200, 321)])
    box_hw = np.array([image.shape[:2] for image in images])
    flip = np.arange(len(images)) % 2 == 0
    box = CropThenResize(corner_yx=np.zeros_like(box_hw), box_hw=box_hw, flip=flip)
    for row, square in enumerate(squares_of(images, box, 32)):
        expected = np.array(Image.fromarray(images[row]).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert square.shape == (32, 32, 3) and square.dtype == np.uint8
        assert np.abs(square - (expected[:, ::-1] if flip[row] else expected)).max() <= 1


@pytest.mark.parametrize("kind", ["scale", "validation", "same size"])
def test_windows_between_pixels_are_pillows_within_one_grey_level_to_the_rim(kind: str) -> None:
    """Each drawn scale on images of odd shapes, among them those where the grid has the region's size by chance."""
    images = noise([(75, 100), (100, 75), (60, 61), (33, 200), (97, 64), (300, 301)] * 16)
    size_hw = np.array([image.shape[:2] for image in images])
    ids = np.arange(len(images))
    if kind == "validation":
        geometry = centre_crop(size_hw, 37, 32)
    else:
        shorter = (32, 96) if kind == "scale" else (75, 75)
        geometry = scale_augmentation(
            size_hw, 32, seed=0, epoch=0, sample_ids=ids, scale_range_px=shorter, flip_probability=0.5
        )
    for row, square in enumerate(squares_of(images, geometry, 32)):
        height, width = geometry.resized_hw[row].tolist()
        y, x = geometry.offset_yx[row].tolist()
        resized = Image.fromarray(images[row]).resize((width, height), Image.Resampling.BILINEAR)
        expected = np.array(resized.crop((x, y, x + 32, y + 32))).astype(int)
        assert np.abs(square - (expected[:, ::-1] if geometry.flip[row] else expected)).max() <= 1, row


def test_a_grid_of_the_regions_size_is_resized_all_the_same() -> None:
    """torch leaves an axis alone whose size does not change: 100 columns of an image of 101 that becomes 102 wide."""
    images, size_hw = noise([(101, 101)]), np.array([[101, 101]])
    square = {"offset_yx": np.array([[5, 5]]), "flip": np.array([False])}
    found = 0
    for side in range(60, 97):
        geometry = ResizeThenCrop(resized_hw=np.array([[104, 104]]), **square)
        found += (5 + side == corner_region(geometry, size_hw, side).shape_hw[0, 0]).sum()
        expected = np.array(Image.fromarray(images[0]).resize((104, 104), Image.Resampling.BILINEAR)).astype(int)
        difference = squares_of(images, geometry, side)[0] - expected[5 : 5 + side, 5 : 5 + side]
        assert np.abs(difference).max() <= 1
    assert found > 5


@pytest.mark.parametrize("threads", [1, 2, 5, 9])
def test_batches_are_mirrored_normalized_and_in_order_with_any_number_of_threads(threads: int) -> None:
    made = made_up_regions(5, 6)
    batches = list(resampler(threads=threads).run(iter(made)))
    scale, shift = uint8_normalization(MEAN, STD, CPU)
    assert len(batches) == 5
    for regions, images_nchw in zip(made, batches, strict=True):
        assert images_nchw.shape == (6, 3, 32, 32) and images_nchw.dtype == torch.float32
        assert images_nchw.is_contiguous(memory_format=torch.channels_last)
        for row, image in enumerate(regions.images):
            square_chw = cut_square(image, regions.region, row, 32).permute(2, 0, 1)
            assert torch.equal(images_nchw[row], (square_chw * scale + shift)[0])


def test_batches_for_a_gpu_are_uint8_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, which pinning needs: it is asked for, and the pixels are those of the CPU's batches."""
    made, empty = made_up_regions(3, 6), torch.empty
    asked = []

    def recording(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(shape, dtype=dtype)

    expected = list(resampler().run(iter(made)))
    monkeypatch.setattr(torch, "empty", recording)
    sent = list(resampler(device=torch.device("cuda")).run(iter(made)))
    scale, shift = uint8_normalization(MEAN, STD, CPU)
    assert asked == [True] * 3
    for uint8, normalized in zip(sent, expected, strict=True):
        assert uint8.dtype == torch.uint8 and uint8.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(uint8 * scale + shift, normalized)


def test_memory_comes_back_when_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers((4, 3))
    first = buffers.take()
    place, view = first.data_ptr(), first[1:].permute(1, 0)
    del first
    second = buffers.take()
    assert second.data_ptr() != place
    del view
    assert buffers.take().data_ptr() == place


def test_batches_that_are_held_keep_their_pixels_and_dropped_ones_need_three_buffers() -> None:
    made, steps = made_up_regions(8, 6), resampler()
    held = []
    for images in steps.run(iter(made)):
        held.append((images, images.clone()))
    assert len({images.data_ptr() for images, _ in held}) == 8
    assert all(torch.equal(images, copy) for images, copy in held)
    places = set()
    for images in resampler().run(iter(made)):
        places.add(images.data_ptr())
    assert len(places) <= 3  # one in the caller's hands, two on the way


def test_next_batch_is_resampled_while_the_caller_holds_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    done, both = [], threading.Event()

    def counting(*arguments: object) -> torch.Tensor:
        square = cut_square(*arguments)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == 12:
            both.set()
        return square

    monkeypatch.setattr(resample, "cut_square", counting)
    batches = resampler().run(iter(made_up_regions(4, 6)))
    next(batches)
    assert both.wait(30)  # the second batch, without being asked for
    batches.close()


def test_threads_use_one_core_each_and_leave_the_callers_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = set(), torch.get_num_threads()

    def recording(*arguments: object) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return cut_square(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(resample, "cut_square", recording)
    torch.set_num_threads(3)
    try:
        list(resampler().run(iter(made_up_regions(2, 6))))
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_errors_of_threads_reach_the_caller_after_the_batches_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_fails() -> Iterator[Regions]:
        yield made_up_regions(1, 6)[0]
        raise RuntimeError("no more regions")

    batches = resampler().run(second_fails())
    next(batches)
    with pytest.raises(RuntimeError, match="no more regions"):
        next(batches)

    def failing(*_: object) -> None:
        raise ValueError("no square")

    monkeypatch.setattr(resample, "cut_square", failing)
    with pytest.raises(ValueError, match="no square"):
        list(resampler().run(iter(made_up_regions(3, 6))))


def test_random_resized_crop_is_the_torchvision_loaders_bit_for_bit(
    small_config: Callable[..., DataConfig], build_loader: Callable[..., Loader]
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    loaders = [
        build_loader(small_config(augmentation="random_resized_crop", loader=name, num_threads=2), batch=16)
        for name in ("dali", "torchvision")
    ]
    for dali, torchvision in zip(*(loader.iterate(1) for loader in loaders), strict=True):
        assert dali.sample_ids.tolist() == torchvision.sample_ids.tolist()
        assert torch.equal(dali.images, torchvision.images)
    fingerprint = loaders[0].fingerprint()
    assert fingerprint["decoder"] == "dali on the CPU, resized by torch"
    assert f"torch {torch.__version__.split('+')[0]}" in str(fingerprint["versions"])
