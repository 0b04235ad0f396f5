"""The training or validation side of a set of encoded images: which samples, which windows, which labels, when.

Both image loaders (DALI and torchvision) take everything that decides what a batch holds from here, so they agree.
"""

from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.draws import Ints
from unitdist.data.geometry import Geometry, training_geometry, validation_geometry
from unitdist.data.order import Plan, training_batches, training_plan, validation_plan
from unitdist.data.reading import ImageSource, ReadingPolicy
from unitdist.version import __version__
from unitdist.world import World


@dataclass(frozen=True, kw_only=True)
class Split:
    """One side of the data set for one rank. training=False: the data set's order, centre crops, padded last batch."""

    config: DataConfig
    source: ImageSource
    world: World
    per_rank_batch_size: int
    seed: int
    training: bool

    @property
    def batches_per_epoch(self) -> int:
        """Batches of every rank in a whole epoch."""
        if self.training:
            return training_batches(len(self.source), 0, self.world.size, self.per_rank_batch_size)
        return -(-len(self.source) // (self.world.size * self.per_rank_batch_size))

    def plan(self, epoch: int, start_sample: int) -> Plan:
        """This rank's samples of the epoch after start_sample of the job."""
        if self.training:
            order = self.source.order(self.seed, epoch)
            return training_plan(order, start_sample, self.world, self.per_rank_batch_size)
        return validation_plan(len(self.source), start_sample, self.world, self.per_rank_batch_size)

    def geometry(self, epoch: int, sample_ids: Ints, size_hw: Ints) -> Geometry:
        """The windows of these samples in this epoch."""
        if self.training:
            return training_geometry(self.config, seed=self.seed, epoch=epoch, sample_ids=sample_ids, size_hw=size_hw)
        return validation_geometry(self.config, size_hw=size_hw)

    def on_device(self, epoch: int, sample_ids: Ints, images: torch.Tensor) -> torch.Tensor:
        """Augmentation of a normalized batch, (b, C, H, W), where it lies; none in validation."""
        if not self.augments_on_device:
            return images
        from unitdist.data.device_augment import augment_on_device  # needs torchvision, which DALI users may lack

        return augment_on_device(images, sample_ids, self.config, seed=self.seed, epoch=epoch)

    @property
    def policy(self) -> ReadingPolicy:
        """Validation never replaces an image: its result would silently be about another set."""
        return ReadingPolicy(
            replace=self.training and self.config.on_broken == "replace",
            max_broken=int(self.config.max_broken_share * len(self.source)),
            max_pixels=self.config.max_image_megapixels * 1_000_000,
        )

    def versions(self, packages: dict[str, str]) -> str:
        """Names and versions of what makes the pixels. packages: {name: version} of the loader's own."""
        packages = {"unitdist": __version__, **packages}
        if self.augments_on_device:
            packages |= {name: version(name) for name in ("torch", "torchvision")}
        return ", ".join(f"{name} {number}" for name, number in packages.items())

    @property
    def augments_on_device(self) -> bool:
        """Whether on_device changes anything."""
        return self.training and bool(self.config.randaugment_operations or self.config.erasing_probability)

    def fingerprint(self) -> dict[str, int | float | str]:
        """What decides the samples and their pixels, but for the decoder. World and batch size do not."""
        config = self.config
        shared: dict[str, int | float | str] = {
            "source": self.source.kind,
            "num_samples": len(self.source),
            "content": self.source.content_hash,
            "image_size_px": config.image_size_px,
        }
        if not self.training:
            return shared | {"val_resize_px": config.val_resize_px}
        window = {
            "scale": f"{config.scale_range_px}",
            "random_resized_crop": f"{config.area_range} {config.aspect_range}",
        }.get(config.augmentation, f"{config.val_resize_px}")
        return shared | {
            "seed": self.seed,
            "augmentation": f"{config.augmentation} {window}",
            "flip_probability": config.flip_probability,
            "randaugment": f"{config.randaugment_operations} x {config.randaugment_magnitude}",
            "erasing_probability": config.erasing_probability,
        }


@dataclass(frozen=True, kw_only=True)
class PlanTensors:
    """A plan's rows on the device, sent once per epoch so that no step waits for a small copy. All (batches, b)."""

    sample_ids: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def send(cls, plan: Plan, labels: Ints, device: torch.device) -> "PlanTensors":
        """labels: (num_samples,) int64 of the whole data set."""
        return cls(
            sample_ids=torch.from_numpy(np.ascontiguousarray(plan.sample_ids)).to(device),
            labels=torch.from_numpy(labels[plan.sample_ids]).to(device),
            valid=torch.from_numpy(np.ascontiguousarray(plan.valid)).to(device),
        )

    def batch(self, row: int, images: torch.Tensor) -> Batch:
        """The batch of one row of the plan."""
        return Batch(images=images, labels=self.labels[row], valid=self.valid[row], sample_ids=self.sample_ids[row])
