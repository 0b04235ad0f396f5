"""Both decoders against each other, against torchvision's transforms, and on damaged files."""

import io
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as transforms

from evaluation.dali_views import DaliDecoder
from evaluation.decoding import Decoder, EncodedImage, run_ahead
from evaluation.torchvision_views import TorchvisionDecoder
from evaluation.views import Pass, crops_passes, resized_size, whole_passes

PASSES = (*crops_passes((64, 73, 110), 64), *whole_passes((64, 110)))


def encode(path: Path) -> EncodedImage:
    with Image.open(path) as image:
        return EncodedImage(name=path.name, content=path.read_bytes(), height=image.height, width=image.width)


def build_dali(passes: tuple[Pass, ...] = PASSES) -> Decoder:
    return DaliDecoder(passes, crop_px=64, images_per_chunk=40, num_threads=1)


def build_torchvision(passes: tuple[Pass, ...] = PASSES) -> Decoder:
    return TorchvisionDecoder(passes, crop_px=64, num_threads=1)


both = pytest.mark.parametrize("build", [build_dali, build_torchvision])


@pytest.fixture(scope="module")
def encoded(small_val: Path) -> list[EncodedImage]:
    return [encode(path) for path in sorted(small_val.rglob("*.jpg"))]


def test_dali_equals_torchvision_to_one_grey_level_inside_and_sixteen_on_the_ring(encoded: list[EncodedImage]) -> None:
    dali, torchvision = build_dali().decode(encoded), build_torchvision().decode(encoded)
    assert dali.kept == torchvision.kept == tuple(range(34))
    for name, reference in torchvision.crops.items():
        # The image's outermost pixels can only be a window's outermost pixels.
        difference = (dali.crops[name].int() - reference.int()).abs()
        assert difference.max() <= 16
        assert difference.float().mean() <= 0.25
        assert difference[:, :, 1:-1, 1:-1].max() <= 1
    for name, references in torchvision.wholes.items():
        for ours, reference in zip(dali.wholes[name], references, strict=True):
            difference = (ours.int() - reference.int()).abs()
            assert difference.max() <= 16
            assert difference[1:-1, 1:-1].max() <= 1


@both
def test_windows_are_torchvisions_five_crop(build: Callable[..., Decoder], encoded: list[EncodedImage]) -> None:
    image = encoded[0]
    decoded = build().decode([image])
    resized = transforms.resize(Image.open(io.BytesIO(image.content)).convert("RGB"), 110)
    for window, crop in zip(decoded.crops["crops_110px_10views"][0], transforms.five_crop(resized, 64), strict=True):
        assert (window.int() - torch.from_numpy(np.array(crop)).int()).abs().max() <= 16
        assert (window.int() - torch.from_numpy(np.array(crop)).int()).abs().float().mean() <= 0.25


@both
def test_whole_images_have_the_size_of_the_geometry(build: Callable[..., Decoder], encoded: list[EncodedImage]) -> None:
    decoded = build().decode(encoded)
    for image, whole in zip(encoded, decoded.wholes["whole_110px_2views"], strict=True):
        assert tuple(whole.shape) == (*resized_size(image.height, image.width, 110), 3)
    shapes = {tuple(whole.shape[:2]) for whole in decoded.wholes["whole_110px_2views"]}
    assert (110, 1100) in shapes


@both
def test_pixels_do_not_depend_on_the_images_beside(build: Callable[..., Decoder], encoded: list[EncodedImage]) -> None:
    decoder = build()
    together = decoder.decode(encoded[:6])
    alone = decoder.decode(encoded[3:4])
    for name, windows in alone.crops.items():
        assert torch.equal(windows[0], together.crops[name][3])
    for name, wholes in alone.wholes.items():
        assert torch.equal(wholes[0], together.wholes[name][3])


@both
def test_pixels_do_not_depend_on_the_other_passes(build: Callable[..., Decoder], encoded: list[EncodedImage]) -> None:
    everything = build().decode(encoded[:4])
    one = build((PASSES[1],)).decode(encoded[:4])
    assert torch.equal(one.crops[PASSES[1].name], everything.crops[PASSES[1].name])


@both
def test_broken_files_are_named_and_the_others_decoded(
    build: Callable[..., Decoder], encoded: list[EncodedImage], capfd: pytest.CaptureFixture[str]
) -> None:
    good = encoded[:5]
    truncated = EncodedImage(name="cut", content=good[1].content[:4000], height=good[1].height, width=good[1].width)
    junk = EncodedImage(name="junk", content=b"this is no image", height=10, width=20)
    decoder = build()
    decoded = decoder.decode([good[0], truncated, good[2], junk, good[4]])
    assert decoded.kept == (0, 2, 4)
    assert set(decoded.broken) == {1, 3}
    assert all(decoded.broken.values())
    reference = decoder.decode([good[0], good[2], good[4]])
    for name, windows in reference.crops.items():
        assert torch.equal(windows, decoded.crops[name])


@both
def test_a_chunk_of_broken_files_only_is_empty(
    build: Callable[..., Decoder], capfd: pytest.CaptureFixture[str]
) -> None:
    decoded = build().decode([EncodedImage(name="junk", content=b"this is no image", height=10, width=20)])
    assert decoded.kept == ()
    assert set(decoded.broken) == {0}


@both
def test_grey_and_palette_files_become_rgb(build: Callable[..., Decoder], tmp_path: Path) -> None:
    columns = np.linspace(0, 255, 90, dtype=np.uint8)
    Image.fromarray(np.tile(columns, (70, 1))).save(tmp_path / "grey.jpg", quality=95)
    Image.fromarray(np.tile(columns, (70, 1))).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.tile(columns, (70, 1))).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    images = [encode(tmp_path / name) for name in ("grey.jpg", "palette.png", "cmyk.jpg")]
    decoded = build((PASSES[0],)).decode(images)
    assert decoded.kept == (0, 1, 2)
    for windows in decoded.crops[PASSES[0].name]:
        red, green, blue = (windows[0, :, :, channel].int() for channel in range(3))
        assert (red - green).abs().max() <= 2
        assert (red - blue).abs().max() <= 2
        assert red[:, -1].float().mean() - red[:, 0].float().mean() > 100


def test_run_ahead_keeps_the_order_and_works_in_another_thread() -> None:
    main = threading.get_ident()
    results = list(run_ahead(lambda item: (item * item, threading.get_ident()), range(20)))
    assert [value for value, _ in results] == [item * item for item in range(20)]
    assert all(thread != main for _, thread in results)


def test_run_ahead_raises_an_error_where_it_happened() -> None:
    done = []
    with pytest.raises(ZeroDivisionError):
        for value in run_ahead(lambda item: 6 // (3 - item), range(10)):
            done.append(value)
    assert done == [2, 3, 6]


def test_run_ahead_stops_when_it_is_left_early() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item

    for value in run_ahead(work, range(1000), depth=2):
        if value == 3:
            break
    assert threading.active_count() >= 1
    assert len(started) <= 8
