"""One fixed batch on the device, again and again: for measuring everything but the data."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.order import validation_plan
from unitdist.world import World


class SyntheticLoader:
    """Loader (batch.py) without data: normal noise images, labels and ids that count up; nothing is copied per step."""

    def __init__(
        self, config: DataConfig, world: World, *, per_rank_batch_size: int, training: bool, device: torch.device
    ) -> None:
        self._world, self._training, self._device = world, training, device
        self.num_samples = config.synthetic_samples
        self.class_to_idx = {f"class_{label}": label for label in range(config.synthetic_classes)}
        self.per_rank_batch_size = per_rank_batch_size
        self.broken: dict[str, str] = {}
        self.max_broken = self.ignored = 0
        self._job_batch = world.size * per_rank_batch_size
        whole = self.num_samples // self._job_batch
        self.batches_per_epoch = whole if training else -(-self.num_samples // self._job_batch)
        generator = torch.Generator().manual_seed(world.rank)
        shape = (per_rank_batch_size, len(config.mean), config.image_size_px, config.image_size_px)
        rows = torch.arange(per_rank_batch_size) + world.rank * per_rank_batch_size
        self._batch = Batch(
            images=torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last),
            labels=(rows % config.synthetic_classes).to(device),
            valid=torch.ones(per_rank_batch_size, dtype=torch.bool, device=device),
            sample_ids=rows.to(device),
        )

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """See Loader."""
        if self._training:
            for _ in range(max(self.num_samples - start_sample, 0) // self._job_batch):
                yield self._batch
            return
        plan = validation_plan(self.num_samples, start_sample, self._world, self.per_rank_batch_size)
        for ids, valid in zip(plan.sample_ids, plan.valid, strict=True):
            rows = {"sample_ids": torch.from_numpy(ids.copy()), "valid": torch.from_numpy(valid.copy())}
            yield replace(self._batch, **{name: row.to(self._device) for name, row in rows.items()})

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader."""
        return {"loader": "synthetic", "num_samples": self.num_samples, "num_classes": len(self.class_to_idx)}

    def close(self) -> None:
        """See Loader."""
