"""Encoded images from a source: read ahead by threads, checked, and replaced where the policy allows it.

A file is checked before it is decoded (header, size limit, end marker), so that a message names it. What a decoder
still refuses comes back here as `refused`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unitdist.data import draws
from unitdist.data.draws import Ints
from unitdist.data.header import UnreadableImage, image_size
from unitdist.errors import DataError

LOG = logging.getLogger(__name__)

RETRY_PAUSES_S = (0.05, 0.2, 0.5)
"""Waits before a file that cannot be read is tried again: network storage has hiccups."""


class ImageSource(Protocol):
    """Encoded images by sample id: a list of files, tars with an index, ... All members are free of state.

    kind: the source's name in configs. labels: (N,) int64. class_to_idx: class name -> label. ignored: files that were left
    out of the list.
    """

    @property
    def kind(self) -> str: ...

    @property
    def labels(self) -> Ints: ...

    @property
    def class_to_idx(self) -> dict[str, int]: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def ignored(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes; raises OSError. Called from several threads."""
        ...

    def name(self, sample_id: int) -> str:
        """Where the image lies, for messages."""
        ...

    def order(self, seed: int, epoch: int) -> Ints:
        """The epoch's permutation of sample ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReadingPolicy:
    """What to do with images that cannot be read.

    replace: take another image of the same class instead of stopping. max_broken: stop above so many of the set.
    max_pixels: a larger image counts as unreadable.
    """

    replace: bool
    max_broken: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Encoded images of sample_ids (b,) with size_hw (b, 2) in pixels, and what was unreadable on the way.

    read_ids (b,): the samples whose bytes these are; another one of the class where a sample had to be replaced.
    """

    sample_ids: Ints
    read_ids: Ints
    images: list[bytes]
    size_hw: Ints
    broken: list[tuple[int, str]]

    def rows(self, which: slice) -> "EncodedBatch":
        """Some of the rows, without the list of broken files."""
        return EncodedBatch(
            sample_ids=self.sample_ids[which],
            read_ids=self.read_ids[which],
            images=self.images[which],
            size_hw=self.size_hw[which],
            broken=[],
        )


def read_checked(source: ImageSource, sample_id: int, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """(bytes, (height, width)) of one image. Raises UnreadableImage."""
    data = _read_patiently(source, sample_id)
    height, width = image_size(data)
    if height * width > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels exceed data.max_image_megapixels")
    return data, (height, width)


def _read_patiently(source: ImageSource, sample_id: int) -> bytes:
    for pause_s in RETRY_PAUSES_S:
        try:
            return source.read(sample_id)
        except OSError:
            time.sleep(pause_s)
    try:
        return source.read(sample_id)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnreadableImage(f"lost access, {reason}, {len(RETRY_PAUSES_S)} retries") from error


def replacement_ids(source: ImageSource, sample_id: int) -> Iterator[int]:
    """The other samples of the same class, each once, from a start that depends on sample_id alone."""
    same_class = np.flatnonzero(source.labels == source.labels[sample_id])
    first = int(draws.integer(0, 0, np.asarray([sample_id]), draws.REPLACEMENT, len(same_class))[0])
    for candidate in np.roll(same_class, -first):
        if candidate != sample_id:
            yield int(candidate)


def unreadable_error(name: str, reason: str) -> DataError:
    """The error for policy error."""
    return DataError(f"unreadable image {name} ({reason}); repair or remove it, or set data.on_broken=replace")


@dataclass(frozen=True, kw_only=True)
class ReadImage:
    """The bytes of read_id with their (height, width), and (sample id, reason) of all that was unreadable before."""

    read_id: int
    data: bytes
    size: tuple[int, int]
    broken: list[tuple[int, str]]


def read_image(source: ImageSource, sample_id: int, policy: ReadingPolicy, refused: dict[int, str]) -> ReadImage:
    """The sample, or the first readable one of its class. refused: samples known to be unreadable, with the reason.

    Raises DataError when the policy does not replace or the class holds nothing readable.
    """
    broken: list[tuple[int, str]] = []
    others = replacement_ids(source, sample_id)
    candidate: int | None = sample_id
    while candidate is not None:
        try:
            if candidate in refused:
                raise UnreadableImage(refused[candidate])
            data, size = read_checked(source, candidate, policy.max_pixels)
            return ReadImage(read_id=candidate, data=data, size=size, broken=broken)
        except UnreadableImage as error:
            if not policy.replace:
                raise unreadable_error(source.name(candidate), str(error)) from None
            broken.append((candidate, str(error)))
        candidate = next(others, None)
    raise DataError(f"no readable image is left in the class of {source.name(sample_id)} ({broken[0][1]})")


def read_batch(source: ImageSource, sample_ids: Ints, policy: ReadingPolicy, refused: dict[int, str]) -> EncodedBatch:
    """Read the given samples one after the other."""
    read = [read_image(source, sample_id, policy, refused) for sample_id in sample_ids.tolist()]
    return EncodedBatch(
        sample_ids=sample_ids,
        read_ids=np.asarray([image.read_id for image in read], dtype=np.int64),
        images=[image.data for image in read],
        size_hw=np.asarray([image.size for image in read], dtype=np.int64).reshape(-1, 2),
        broken=[problem for image in read for problem in image.broken],
    )


def _join(parts: list[EncodedBatch]) -> EncodedBatch:
    return EncodedBatch(
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        read_ids=np.concatenate([part.read_ids for part in parts]),
        images=[image for part in parts for image in part.images],
        size_hw=np.concatenate([part.size_hw for part in parts]),
        broken=[problem for part in parts for problem in part.broken],
    )


def read_ahead(
    source: ImageSource,
    sample_ids: Ints,
    policy: ReadingPolicy,
    *,
    threads: int,
    batches_ahead: int,
    refused: dict[int, str],
) -> Generator[EncodedBatch, None, None]:
    """Yield the batches sample_ids (batches, b) in order, reading up to batches_ahead of them in advance.

    Each batch is read by up to `threads` tasks of consecutive samples: single files are too small a task for Python.
    """
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="unitdist-read") as pool:
        waiting: deque[list[Future[EncodedBatch]]] = deque()
        rows = iter(sample_ids)
        try:
            while True:
                while len(waiting) <= batches_ahead and (row := next(rows, None)) is not None:
                    parts = np.array_split(row, min(threads, len(row)))
                    waiting.append([pool.submit(read_batch, source, part, policy, refused) for part in parts])
                if not waiting:
                    return
                yield _join([part.result() for part in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def too_many_broken(broken: Mapping[str, str], max_broken: int) -> DataError:
    """The error for more unreadable images than allowed. broken: {name: reason}."""
    first = min(broken)
    return DataError(
        f"{len(broken)} unreadable images, more than the {max_broken} that data.max_broken_share allows, "
        f"first {first} ({broken[first]})"
    )


class BrokenCount:
    """Names each unreadable image once in the log and stops above the limit. One per loader, on each rank.

    reasons: {name: reason} of this rank. The limit is one of the whole set: training adds up the ranks (train/stopping.py).
    """

    def __init__(self, source: ImageSource, policy: ReadingPolicy) -> None:
        self._source = source
        self._policy = policy
        self._lock = threading.Lock()
        self.reasons: dict[str, str] = {}

    def add(self, broken: list[tuple[int, str]]) -> None:
        """Count images that were replaced. Raises DataError above policy.max_broken."""
        with self._lock:
            for sample_id, reason in broken:
                name = self._source.name(sample_id)
                if name not in self.reasons:
                    self.reasons[name] = reason
                    LOG.warning("replaced unreadable image %s (%s)", name, reason)
            if len(self.reasons) > self._policy.max_broken:
                raise too_many_broken(self.reasons, self._policy.max_broken)
