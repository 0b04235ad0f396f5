"""Training and validation batches by Pillow and torchvision in worker processes: the same samples and windows as DALI's.

Workers get whole batches and answer with uint8 images; they are normalized in float32 on the device, which costs a
quarter of the transfer.
"""

import multiprocessing
import os
import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from unitdist.data.batch import Batch
from unitdist.data.draws import Ints
from unitdist.data.geometry import CropThenResize, Geometry
from unitdist.data.header import UnreadableImage
from unitdist.data.reading import BrokenCount, EncodedBatch, read_batch
from unitdist.data.split import PlanTensors, Split
from unitdist.data.transfer import copy_ahead, uint8_normalization
from unitdist.errors import DataError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

Task = tuple[int, Ints]
"""(epoch, sample_ids (b,)): what a worker is asked for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """images: (b, 3, H, W) uint8, channels_last. broken: as EncodedBatch. error: the text of a DataError, or None.

    An exception would reach the main process as another type with the worker's traceback as its text.
    """

    images: torch.Tensor
    broken: list[tuple[int, str]]
    error: str | None = None


class _Windows(Dataset[Answer]):
    """What runs in a worker: read, decode, cut. Indexed by tasks."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitem__(self, task: Task) -> Answer:
        epoch, sample_ids = task
        refused: dict[int, str] = {}
        while True:
            try:
                batch = read_batch(self._split.source, sample_ids, self._split.policy, refused)
                return Answer(images=self._cut(epoch, batch), broken=batch.broken)
            except _Refused as error:
                refused[error.sample_id] = "the decoder refuses it"
            except DataError as error:
                return Answer(images=torch.empty(0), broken=[], error=str(error))

    def _cut(self, epoch: int, batch: EncodedBatch) -> torch.Tensor:
        side = self._split.config.image_size_px
        geometry = self._split.geometry(epoch, batch.sample_ids, batch.size_hw)
        shape = (len(batch.images), 3, side, side)
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for row, data in enumerate(batch.images):
            try:
                image = decode_rgb(data)
            except UnreadableImage:
                raise _Refused(int(batch.read_ids[row])) from None
            images[row] = cut_window(image, geometry, row, side)
        return images


class _Refused(Exception):
    """The decoder refuses the image of this sample."""

    def __init__(self, sample_id: int) -> None:
        super().__init__(sample_id)
        self.sample_id = sample_id


def decode_rgb(data: bytes) -> torch.Tensor:
    """Encoded bytes -> (3, H, W) uint8 in channels_last strides, EXIF orientation ignored. Raises UnreadableImage.

    By Pillow: torchvision's own decoders are deprecated since 0.29. The pixels are the same.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            pixels_hwc = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from error
    return torch.from_numpy(pixels_hwc).permute(2, 0, 1)


def cut_window(image: torch.Tensor, geometry: Geometry, row: int, side_px: int) -> torch.Tensor:
    """(3, side, side) uint8: one row of the geometry applied to one decoded image (3, H, W)."""
    if isinstance(geometry, CropThenResize):
        (top, left), (height, width) = geometry.corner_yx[row].tolist(), geometry.box_hw[row].tolist()
        box = image[:, top : top + height, left : left + width]
        window: torch.Tensor = transforms.resize(box, [side_px, side_px], antialias=True)
    else:
        top, left = geometry.offset_yx[row].tolist()
        resized = transforms.resize(image, geometry.resized_hw[row].tolist(), antialias=True)
        window = resized[:, top : top + side_px, left : left + side_px]
    return window.flip(-1) if geometry.flip[row] else window


class _Tasks:
    """The DataLoader's batch sampler: the rows of the epoch that is being asked for."""

    def __init__(self) -> None:
        self.epoch = 0
        self.sample_ids: Ints = np.empty((0, 1), dtype=np.int64)

    def __iter__(self) -> Iterator[Task]:
        return ((self.epoch, row) for row in self.sample_ids)

    def __len__(self) -> int:
        return len(self.sample_ids)


def _start_worker(trainer: int, _: int) -> None:
    """One thread, and an end with the process that trains, however that ends.

    torch's own check looks at the parent, which is the fork server here, and that lives as long as its workers do.
    """
    torch.set_num_threads(1)
    if hasattr(os, "pidfd_open"):
        try:
            alive = os.pidfd_open(trainer)
        except ProcessLookupError:
            os._exit(0)
        threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(process: int) -> None:
    select.select([process], [], [])  # a pidfd is readable once its process has ended
    os._exit(0)


class TorchvisionLoader:
    """Loader (batch.py) over a Split, with data.num_threads worker processes."""

    def __init__(self, split: Split, device: torch.device) -> None:
        config = split.config
        self._split = split
        self._device = device
        self.num_samples, self.ignored = len(split.source), split.source.ignored
        self.class_to_idx = split.source.class_to_idx
        self.per_rank_batch_size = split.per_rank_batch_size
        self.batches_per_epoch = split.batches_per_epoch
        self._broken = BrokenCount(split.source, split.policy)
        self._tasks = _Tasks()
        self._scale_c, self._shift_c = uint8_normalization(config.mean, config.std, device)
        self._workers: DataLoader[Answer] | None = None

    def _start(self) -> DataLoader[Answer]:
        # Not fork: this process has threads (collectives, DALI, CUDA) whose locks a fork would copy.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return DataLoader(
            _Windows(self._split),
            sampler=self._tasks,
            batch_size=None,
            num_workers=self._split.config.num_threads,
            prefetch_factor=self._split.config.prefetch_batches,
            multiprocessing_context=context,
            worker_init_fn=partial(_start_worker, os.getpid()),
            persistent_workers=True,
            pin_memory=self._device.type == "cuda",
        )

    @property
    def broken(self) -> dict[str, str]:
        """See Loader."""
        return self._broken.reasons

    @property
    def max_broken(self) -> int:
        """See Loader."""
        return self._split.policy.max_broken

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """See Loader. Raises DataError for an image that cannot be read, or for too many of them."""
        plan = self._split.plan(epoch, start_sample)
        tensors = PlanTensors.send(plan, self._split.source.labels, self._device)
        self._tasks.epoch, self._tasks.sample_ids = epoch, plan.sample_ids
        if self._workers is None:
            self._workers = self._start()
        for row, images in enumerate(copy_ahead(self._images(self._workers), self._device)):
            normalized = images * self._scale_c + self._shift_c
            yield tensors.batch(row, self._split.on_device(epoch, plan.sample_ids[row], normalized))

    def _images(self, workers: DataLoader[Answer]) -> Iterator[torch.Tensor]:
        for answer in workers:
            if answer.error is not None:
                raise DataError(answer.error)
            self._broken.add(answer.broken)
            yield answer.images

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader."""
        packages = {name: version(name) for name in ("pillow", "torchvision", "torch")}
        return self._split.fingerprint() | {
            "loader": "torchvision",
            "decoder": "pillow",
            "versions": self._split.versions(packages),
        }

    def close(self) -> None:
        """See Loader."""
        self._workers = None
