"""Decoded regions to squares on the CPU, by threads, one batch ahead.

DALI's decoder is as quick as any; its resize on the CPU takes over twice the time of torch's, which is antialiased bilinear in
integers as Pillow's. Axes: n sample, h row, w column, c channel.
"""

import time
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unitdist.data.draws import Ints
from unitdist.data.geometry import Bools, CornerRegion
from unitdist.data.transfer import uint8_normalization

Pixels = npt.NDArray[np.uint8]

_HEAD_START_S = 0.001
"""So long the thread that takes the next batch stands back: its work in Python would keep the interpreter's lock, for up to
5 ms at a time, from the thread that just asked for a batch and wants to leave with it."""


@dataclass(frozen=True, kw_only=True)
class Regions:
    """One batch of decoded regions. images: N times (h, w, 3) uint8. region: what they are and what to do with them."""

    images: list[Pixels]
    region: CornerRegion


def cut_square(image_hwc: Pixels, region: CornerRegion, row: int, side_px: int) -> torch.Tensor:
    """(side, side, 3) uint8: one row of the region applied to its decoded pixels."""
    source_hwc = _mirrored(torch.from_numpy(image_hwc), region.mirror_yx[row])
    # functional.interpolate takes a size or a scale; here the grid is a part of the whole image's.
    resized_nchw: torch.Tensor = torch.ops.aten._upsample_bilinear2d_aa.default(
        source_hwc[None].permute(0, 3, 1, 2), region.grid_hw[row].tolist(), False, *region.scale_hw[row].tolist()
    )
    top, left = region.first_yx[row].tolist()
    square_chw = resized_nchw[0, :, top : top + side_px, left : left + side_px]
    return _mirrored(square_chw.permute(1, 2, 0), region.back_yx[row])


def _mirrored(image_hwc: torch.Tensor, mirror_yx: Bools) -> torch.Tensor:
    axes = [axis for axis, mirrored in enumerate(mirror_yx.tolist()) if mirrored]
    return image_hwc.flip(axes) if axes else image_hwc


class Resampler:
    """Turns Regions into batches (N, 3, side, side) in channels_last strides.

    device: the CPU gets normalized float32; a GPU gets uint8 in pinned memory, to be sent and normalized there.
    threads: images are resampled on so many.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        side_px: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        threads: int,
    ) -> None:
        self._side_px = side_px
        self._pinned = device.type == "cuda"
        self._threads = threads
        self._shape_nhwc = (batch_size, side_px, side_px, 3)
        self._buffers = Buffers(self._shape_nhwc)
        scale, shift = uint8_normalization(mean, std, torch.device("cpu"))
        # One row of the image: a dimension of three channels would make three steps of every loop.
        self._scale_row, self._shift_row = (value.flatten().repeat(side_px) for value in (scale, shift))

    def run(self, batches: Iterator[Regions]) -> Generator[torch.Tensor, None, None]:
        """Yield the batches in order. Meanwhile the next is taken from `batches`, in a thread of its own, and resampled."""
        # Images are parallel enough: no operation of these threads is split over more. The number is each thread's own, but
        # one that has not computed yet takes over the last that was set, so the caller's is settled first.
        torch.get_num_threads()
        one_each: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with (
            ThreadPoolExecutor(self._threads, thread_name_prefix="unitdist-resample", **one_each) as pool,
            ThreadPoolExecutor(1, thread_name_prefix="unitdist-decoded", **one_each) as taker,
        ):
            following = taker.submit(self._start, pool, batches)
            try:
                while (started := following.result()) is not None:
                    following = taker.submit(self._start, pool, batches)
                    squares_nhwc, parts = started
                    for part in parts:
                        part.result()
                    yield squares_nhwc.permute(0, 3, 1, 2)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, pool: ThreadPoolExecutor, batches: Iterator[Regions]
    ) -> tuple[torch.Tensor, list[Future[None]]] | None:
        """The next batch's memory and the tasks that fill it; None at the end."""
        time.sleep(_HEAD_START_S)
        regions = next(batches, None)
        if regions is None:
            return None
        if self._pinned:
            squares_nhwc = torch.empty(self._shape_nhwc, dtype=torch.uint8, pin_memory=True)
        else:
            squares_nhwc = self._buffers.take()
        count = len(regions.images)
        parts = np.array_split(np.arange(count), min(self._threads, count))
        return squares_nhwc, [pool.submit(self._resample, regions, rows, squares_nhwc) for rows in parts]

    def _resample(self, regions: Regions, rows: Ints, squares_nhwc: torch.Tensor) -> None:
        """Fill some rows of squares_nhwc."""
        for row in rows.tolist():
            target = squares_nhwc[row]
            target.copy_(cut_square(regions.images[row], regions.region, row, self._side_px))
            if not self._pinned:
                # While the image is in the core's cache.
                target.view(self._side_px, -1).mul_(self._scale_row).add_(self._shift_row)


class Buffers:
    """float32 memory for batches of one shape that is used again once nobody holds a tensor on it.

    The system hands out fresh memory page by page as it is written to, which costs more than filling it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[npt.NDArray[np.float32]] = []

    def take(self) -> torch.Tensor:
        """A tensor with arbitrary contents. Its memory comes back when the tensor and all views of it are gone."""
        memory = self._free.pop() if self._free else np.empty(self._shape, dtype=np.float32)
        lent = memory[:]  # held by the tensor's storage and by nothing else
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
