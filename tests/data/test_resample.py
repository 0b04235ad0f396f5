"""resample.py: Pillow's pixels, whatever the number of threads, in memory that nobody else writes to."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data import resample
from unitdist.data.batch import Loader
from unitdist.data.resample import Buffers, Regions, Resampler, resize
from unitdist.data.transfer import uint8_normalization

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def made_up_regions(batches: int, count: int) -> list[Regions]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(batches):
        sizes = random.integers(1, 90, (count, 2))
        images = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
        made.append(Regions(images=images, flip=random.random(count) < 0.5))
    return made


def resampler(*, threads: int = 2, count: int = 6, device: torch.device = CPU) -> Resampler:
    return Resampler(batch_size=count, side_px=32, mean=MEAN, std=STD, device=device, threads=threads)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 40), (32, 32), (31, 33), (300, 17), (200, 321)])
def test_squares_are_pillows_within_one_grey_level_to_the_rim(size_hw: tuple[int, int]) -> None:
    region = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    square = resize(region, 32)
    expected = np.array(Image.fromarray(region).resize((32, 32), Image.Resampling.BILINEAR))
    assert square.shape == (32, 32, 3) and square.dtype == torch.uint8
    assert np.abs(square.numpy().astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("threads", [1, 2, 5, 9])
def test_batches_are_mirrored_normalized_and_in_order_with_any_number_of_threads(threads: int) -> None:
    made = made_up_regions(5, 6)
    batches = list(resampler(threads=threads).run(iter(made)))
    scale, shift = uint8_normalization(MEAN, STD, CPU)
    assert len(batches) == 5
    for regions, images_nchw in zip(made, batches, strict=True):
        assert images_nchw.shape == (6, 3, 32, 32) and images_nchw.dtype == torch.float32
        assert images_nchw.is_contiguous(memory_format=torch.channels_last)
        for row, region in enumerate(regions.images):
            square_chw = resize(region, 32).permute(2, 0, 1)
            expected = square_chw.flip(-1) if regions.flip[row] else square_chw
            assert torch.equal(images_nchw[row], (expected * scale + shift)[0])


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

    def counting(region: np.ndarray, side_px: int) -> torch.Tensor:
        square = resize(region, side_px)
        done.append(1)
        if len(done) == 12:
            both.set()
        return square

    monkeypatch.setattr(resample, "resize", counting)
    batches = resampler().run(iter(made_up_regions(4, 6)))
    next(batches)
    assert both.wait(30)  # the second batch, without being asked for
    batches.close()


def test_threads_use_one_core_each_and_leave_the_callers_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = set(), torch.get_num_threads()

    def recording(region: np.ndarray, side_px: int) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return resize(region, side_px)

    monkeypatch.setattr(resample, "resize", recording)
    torch.set_num_threads(3)
    try:
        list(resampler().run(iter(made_up_regions(2, 6))))
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_error_of_a_thread_and_of_the_decoder_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_fails() -> Iterator[Regions]:
        yield made_up_regions(1, 6)[0]
        raise RuntimeError("no more regions")

    with pytest.raises(RuntimeError, match="no more regions"):
        list(resampler().run(second_fails()))

    def failing(*_: object) -> None:
        raise ValueError("no square")

    monkeypatch.setattr(resample, "resize", failing)
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
