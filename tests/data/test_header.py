"""header.py: the size of every format we read, and cut-off files told from whole ones."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from unitdist.data.header import UnreadableImage, image_size


def encoded(image_format: str, size: tuple[int, int] = (37, 21), mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=image_format, **options)
    return buffer.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation: turn by 90 degrees

WHOLE = {
    "jpeg": encoded("JPEG"),
    "jpeg progressive": encoded("JPEG", progressive=True),
    "jpeg gray": encoded("JPEG", mode="L"),
    "jpeg cmyk": encoded("JPEG", mode="CMYK"),
    "jpeg with rotation": encoded("JPEG", exif=EXIF),
    "jpeg with comment and colour profile": encoded("JPEG", comment=b"x" * 9000, icc_profile=b"y" * 70_000),
    "jpeg with trailing bytes": encoded("JPEG") + b"\x00" * 100,
    "jpeg with fill bytes": encoded("JPEG")[:2] + b"\xff\xff" + encoded("JPEG")[2:],
    "png": encoded("PNG"),
    "png palette": encoded("PNG", mode="P"),
    "webp lossy": encoded("WEBP"),
    "webp lossless": encoded("WEBP", lossless=True),
    "webp extended": encoded("WEBP", exif=EXIF.tobytes()),
    "bmp": encoded("BMP"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_size_is_pillows(name: str) -> None:
    with Image.open(io.BytesIO(WHOLE[name])) as image:
        assert image_size(WHOLE[name]) == (image.height, image.width) == (21, 37)


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "webp lossy", "webp lossless", "bmp"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_cut_off_files_are_unreadable(name: str, share: float) -> None:
    data = WHOLE[name]
    with pytest.raises(UnreadableImage, match="truncated|not a JPEG"):
        image_size(data[: int(len(data) * share)])


def test_thumbnails_end_marker_does_not_hide_a_cut() -> None:
    exif = Image.Exif()
    exif[0x010E] = "thumbnail: " + WHOLE["jpeg"].decode("latin1")
    data = encoded("JPEG", size=(200, 200), exif=exif.tobytes())
    assert image_size(data) == (200, 200)
    with pytest.raises(UnreadableImage, match="no end marker"):
        image_size(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\x00" * 500, "not a JPEG, PNG, WebP or BMP image"),
        (b"just some text", "not a JPEG, PNG, WebP or BMP image"),
        (b"GIF89a" + b"\x00" * 40, "not a JPEG, PNG, WebP or BMP image"),
        (b"\xff\xd8\xff\xe0" + b"\x00" * 40, "broken segment|no image header"),
    ],
)
def test_foreign_bytes_are_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        image_size(data)


def test_one_header_costs_less_than_30_microseconds() -> None:
    data = encoded("JPEG", size=(500, 375), quality=95)
    began = time.process_time()
    for _ in range(2000):
        image_size(data)
    assert (time.process_time() - began) / 2000 < 30e-6


def test_any_bytes_give_a_size_or_are_unreadable() -> None:
    random = np.random.default_rng(1)
    outcomes = {"size": 0, "unreadable": 0}
    for data in WHOLE.values():
        for _ in range(300):
            bytes_ = bytearray(data[: int(random.integers(1, min(len(data), 400)))] + data[-2:])
            for at in random.integers(0, len(bytes_), 6):
                bytes_[at] = int(random.integers(0, 256))
            bytes_[:2] = data[:2]
            try:
                height, width = image_size(bytes(bytes_))
                assert height >= 0 and width >= 0
                outcomes["size"] += 1
            except UnreadableImage:
                outcomes["unreadable"] += 1
    assert min(outcomes.values()) > 100
