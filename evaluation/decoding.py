"""What a decoder hands over, and the thread that keeps one chunk of images ahead of the network.

A chunk is a fixed run of consecutive images. A decoder turns the encoded bytes of one chunk into the pixels that the
passes need, from one decode per image: `dali_views.DaliDecoder` and `torchvision_views.TorchvisionDecoder`.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from evaluation.views import Pass

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """The bytes of one image file with the size its header states, in pixels as stored (EXIF rotation is not applied)."""

    name: str
    content: bytes
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """Pixels of the images of one chunk that could be decoded.

    `kept`: their positions in the chunk, increasing. `broken`: position -> reason, for the others. `crops`: pass name ->
    uint8 (B, windows, crop, crop, 3). `wholes`: pass name -> B uint8 tensors (height, width, 3). B = len(kept).
    """

    kept: tuple[int, ...]
    broken: dict[int, str]
    crops: dict[str, torch.Tensor]
    wholes: dict[str, list[torch.Tensor]]


class Decoder(Protocol):
    """Decodes chunks for a fixed list of passes. Used by one thread at a time."""

    def decode(self, images: list[EncodedImage]) -> DecodedChunk:
        """All pixels of one chunk; files that cannot be decoded are reported in `broken`, never raised."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def run_ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Iterator[Result]:
    """`map(work, items)` in a background thread, at most `depth` results ahead of the reader, errors raised at their place.

    Closing the iterator early stops the thread.
    """
    results: queue.Queue[tuple[Result] | _Failure | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[Result] | _Failure | None) -> None:
        while not stopped.is_set():
            try:
                results.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put((work(item),))
            put(None)
        except BaseException as error:
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="decode-ahead", daemon=True)
    thread.start()
    try:
        while (entry := results.get()) is not None:
            if isinstance(entry, _Failure):
                raise entry.error
            yield entry[0]
    finally:
        stopped.set()
        thread.join()


def window_count(plan: Pass) -> int:
    """Windows that a decoder cuts for a crops pass; mirrors are made later, on the network's device."""
    return plan.views // 2 if plan.mirrored else plan.views
