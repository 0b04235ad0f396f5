"""Small sets of small images (MNIST, CIFAR): all pixels stay on the device, batches are cut and augmented there.

Axes: n sample, h row, w column, c channel.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from unitdist.config import DataConfig
from unitdist.data import draws
from unitdist.data.batch import Batch
from unitdist.data.draws import Ints
from unitdist.data.order import Plan, epoch_order, training_batches, training_plan, validation_plan
from unitdist.data.split import PlanTensors
from unitdist.errors import ConfigError
from unitdist.world import World

PAD_PX = 4


@dataclass(frozen=True, kw_only=True)
class ImageArrays:
    """A whole split. images_nhwc: (N, H, W, C) uint8. labels: (N,) int64. kind: the data set's name."""

    kind: str
    images_nhwc: npt.NDArray[np.uint8]
    labels: Ints
    class_to_idx: dict[str, int]


class ResidentLoader:
    """Loader (batch.py) over ImageArrays. pad_crop_flip: pad 4 black pixels, random crop of the old size, mirror.

    Gray images get as many channels as data.mean has numbers. Raises ConfigError where images and
    data.image_size_px or data.mean do not fit.
    """

    def __init__(
        self,
        arrays: ImageArrays,
        config: DataConfig,
        world: World,
        *,
        per_rank_batch_size: int,
        seed: int,
        training: bool,
        device: torch.device,
    ) -> None:
        _require_fit(arrays, config)
        self._arrays, self._config, self._world, self._seed = arrays, config, world, seed
        self._training, self._device = training, device
        self._augment = training and config.augmentation == "pad_crop_flip"
        self.num_samples = len(arrays.labels)
        self.class_to_idx = arrays.class_to_idx
        self.per_rank_batch_size = per_rank_batch_size
        self.broken: dict[str, str] = {}
        self.max_broken = self.ignored = 0
        job_batch = world.size * per_rank_batch_size
        self.batches_per_epoch = (
            training_batches(self.num_samples, 0, world.size, per_rank_batch_size)
            if training
            else -(-self.num_samples // job_batch)
        )
        pad = PAD_PX if self._augment else 0
        padded = np.pad(arrays.images_nhwc, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self._padded_nhwc = torch.from_numpy(padded).to(device)
        scale_c = 1 / (255 * torch.tensor(config.std, dtype=torch.float64))
        shift_c = -torch.tensor(config.mean, dtype=torch.float64) * 255 * scale_c
        self._scale_c = scale_c.to(device, torch.float32)
        self._shift_c = shift_c.to(device, torch.float32)

    def _plan(self, epoch: int, start_sample: int) -> Plan:
        if not self._training:
            return validation_plan(self.num_samples, start_sample, self._world, self.per_rank_batch_size)
        order = epoch_order(self.num_samples, self._seed, epoch)
        return training_plan(order, start_sample, self._world, self.per_rank_batch_size)

    def _windows(self, epoch: int, sample_ids: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (batches, b, H) and columns (batches, b, W) of the padded images that each sample shows."""
        height, width = self._arrays.images_nhwc.shape[1:3]
        rows = np.broadcast_to(np.arange(height), (*sample_ids.shape, height))
        columns = np.broadcast_to(np.arange(width), (*sample_ids.shape, width))
        if self._augment:
            flat = sample_ids.reshape(-1)
            y = draws.integer(self._seed, epoch, flat, draws.CROP_Y, 2 * PAD_PX + 1).reshape(sample_ids.shape)
            x = draws.integer(self._seed, epoch, flat, draws.CROP_X, 2 * PAD_PX + 1).reshape(sample_ids.shape)
            flip = draws.uniform(self._seed, epoch, flat, draws.FLIP).reshape(sample_ids.shape)
            mirrored = (flip < self._config.flip_probability)[..., None]
            rows = y[..., None] + rows
            columns = x[..., None] + np.where(mirrored, columns[..., ::-1], columns)
        # int32 halves what goes to the device; indexing widens it there.
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(np.ascontiguousarray(index, dtype=np.int32)).to(self._device) for index in (rows, columns)
        )

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """See Loader. Nothing is sent to the device after the first batch."""
        plan = self._plan(epoch, start_sample)
        tensors = PlanTensors.send(plan, self._arrays.labels, self._device)
        rows, columns = self._windows(epoch, plan.sample_ids)
        for row in range(len(plan.sample_ids)):
            ids = tensors.sample_ids[row]
            pixels_nhwc = self._padded_nhwc[
                ids[:, None, None], rows[row].long()[:, :, None], columns[row].long()[:, None]
            ]
            images_nhwc = pixels_nhwc * self._scale_c + self._shift_c
            yield tensors.batch(row, images_nhwc.permute(0, 3, 1, 2))

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader."""
        digest = hashlib.sha256(self._arrays.images_nhwc.tobytes())
        digest.update(self._arrays.labels.tobytes())
        shared: dict[str, int | float | str] = {
            "loader": "resident",
            "source": self._arrays.kind,
            "num_samples": self.num_samples,
            "content": digest.hexdigest(),
        }
        if not self._training:
            return shared
        return shared | {
            "seed": self._seed,
            "augmentation": self._config.augmentation,
            "flip_probability": self._config.flip_probability,
        }

    def close(self) -> None:
        """See Loader."""


def _require_fit(arrays: ImageArrays, config: DataConfig) -> None:
    height, width, channels = arrays.images_nhwc.shape[1:]
    if (height, width) != (config.image_size_px, config.image_size_px):
        raise ConfigError(
            f"data.image_size_px: {arrays.kind} has {height} x {width} images, got {config.image_size_px}"
        )
    if channels not in (1, len(config.mean)):
        raise ConfigError(f"data.mean: {arrays.kind} has {channels} channels, got {len(config.mean)} numbers")
