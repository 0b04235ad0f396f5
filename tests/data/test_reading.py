"""reading.py: order kept while reading ahead, unreadable images named or replaced within their class."""

import logging
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from unitdist.data.header import UnreadableImage
from unitdist.data.reading import BrokenCount, ReadingPolicy, read_ahead, read_batch, read_checked, read_image
from unitdist.errors import DataError

ERROR = ReadingPolicy(replace=False, max_broken=0, max_pixels=64_000_000)
REPLACE = ReadingPolicy(replace=True, max_broken=2, max_pixels=64_000_000)


def png_header(height: int, width: int, tail: bytes = b"") -> bytes:
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + size + tail + b"IEND"


@dataclass
class MemorySource:
    """Twelve tiny "images" in three classes (label = id % 3), some of them bad."""

    bad: dict[int, bytes | OSError] = field(default_factory=dict)
    kind = "memory"
    labels = np.arange(12) % 3
    class_to_idx = {"a": 0, "b": 1, "c": 2}
    content_hash = "x"
    ignored = 0

    def __len__(self) -> int:
        return 12

    def read(self, sample_id: int) -> bytes:
        data = self.bad.get(sample_id, png_header(10, 20, tail=bytes([sample_id])))
        if isinstance(data, OSError):
            raise data
        return data

    def name(self, sample_id: int) -> str:
        return f"image {sample_id}"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(12)


def test_read_ahead_keeps_the_order_whatever_the_threads() -> None:
    rows = np.array([[3, 1, 2, 9], [0, 0, 11, 4], [5, 6, 7, 8]])
    for threads in (1, 3, 8):
        reader = read_ahead(MemorySource(), rows, ERROR, threads=threads, batches_ahead=2, refused={})
        batches = list(reader)
        assert [batch.sample_ids.tolist() for batch in batches] == rows.tolist()
        assert [[image[-5] for image in batch.images] for batch in batches] == rows.tolist()
        assert all(batch.size_hw.tolist() == [[10, 20]] * 4 for batch in batches)


def test_closing_the_reader_early_ends_its_threads() -> None:
    before = threading.active_count()
    reader = read_ahead(MemorySource(), np.zeros((1000, 4), int), ERROR, threads=2, batches_ahead=3, refused={})
    next(reader)
    reader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("unitdist-read"):
            thread.join(5)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "empty file"),
        (FileNotFoundError(2, "No such file or directory"), "lost access, No such file or directory, 3 retries"),
        (PermissionError(13, "Permission denied"), "lost access, Permission denied, 3 retries"),
        (png_header(20_000, 20_000), "20000 x 20000 pixels exceed data.max_image_megapixels"),
    ],
)
def test_unreadable_image_stops_with_its_name_and_reason(bad: bytes | OSError, reason: str) -> None:
    with pytest.raises(
        DataError, match=rf"^unreadable image image 4 \({reason}\); repair or remove it, or set data.on"
    ):
        read_batch(MemorySource({4: bad}), np.array([0, 4]), ERROR, {})


def test_hiccup_of_the_storage_is_outlasted() -> None:
    class Hiccup(MemorySource):
        failures = 3

        def read(self, sample_id: int) -> bytes:
            if self.failures:
                self.failures -= 1
                raise OSError(5, "Input/output error")
            return super().read(sample_id)

    batch = read_batch(Hiccup(), np.array([4, 5]), ERROR, {})
    assert batch.read_ids.tolist() == [4, 5] and batch.broken == []


def test_replacement_is_another_image_of_the_class_and_always_the_same() -> None:
    source = MemorySource({4: b""})
    found = {read_image(source, 4, REPLACE, {}).read_id for _ in range(5)}
    assert len(found) == 1
    assert found < {1, 7, 10}
    batch = read_batch(source, np.array([3, 4, 5]), REPLACE, {})
    assert batch.sample_ids.tolist() == [3, 4, 5]
    assert batch.read_ids.tolist() == [3, found.pop(), 5]
    assert batch.broken == [(4, "empty file")]


def test_replacement_that_is_unreadable_too_is_passed_over() -> None:
    first = read_image(MemorySource({4: b""}), 4, REPLACE, {}).read_id
    second = read_image(MemorySource({4: b"", first: b""}), 4, REPLACE, {})
    assert second.read_id not in (4, first) and second.read_id % 3 == 1
    assert [sample_id for sample_id, _ in second.broken] == [4, first]


def test_image_refused_by_the_decoder_is_replaced_like_an_unreadable_one() -> None:
    image = read_image(MemorySource(), 4, REPLACE, {4: "the decoder refuses it"})
    assert image.read_id % 3 == 1 and image.read_id != 4
    assert image.broken == [(4, "the decoder refuses it")]


def test_class_without_readable_images_is_an_error() -> None:
    source = MemorySource({sample_id: b"" for sample_id in (1, 4, 7, 10)})
    with pytest.raises(DataError, match=r"no readable image is left in the class of image 7 \(empty file\)"):
        read_image(source, 7, REPLACE, {})


def test_broken_images_are_logged_once_each_and_limited(caplog: pytest.LogCaptureFixture) -> None:
    count = BrokenCount(MemorySource(), REPLACE)
    with caplog.at_level(logging.WARNING):
        count.add([(4, "empty file")])
        count.add([(4, "empty file"), (5, "gone")])
    assert caplog.messages == [
        "replaced unreadable image image 4 (empty file)",
        "replaced unreadable image image 5 (gone)",
    ]
    with pytest.raises(DataError, match=r"^3 unreadable images, more than the 2 that data.max_broken_share allows"):
        count.add([(6, "gone")])


def test_read_checked_returns_bytes_and_size() -> None:
    assert read_checked(MemorySource(), 7, 200) == (png_header(10, 20, tail=b"\x07"), (10, 20))
    with pytest.raises(UnreadableImage):
        read_checked(MemorySource(), 7, 199)
