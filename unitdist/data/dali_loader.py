"""Training and validation batches by DALI, on the CPU or the GPU: one definition for the four cases."""

from collections.abc import Iterator

import nvidia.dali
import torch

from unitdist.data.batch import Batch
from unitdist.data.dali_graph import GraphSettings, ImagePipeline
from unitdist.data.split import PlanTensors, Split


class DaliLoader:
    """Loader (batch.py) over a Split. On a CUDA device images are decoded, resampled and normalized there."""

    def __init__(self, split: Split, device: torch.device) -> None:
        config = split.config
        self._split = split
        self._device = device
        self.num_samples, self.ignored = len(split.source), split.source.ignored
        self.class_to_idx = split.source.class_to_idx
        self.per_rank_batch_size = split.per_rank_batch_size
        self.batches_per_epoch = split.batches_per_epoch
        self.settings = GraphSettings(
            batch_size=split.per_rank_batch_size,
            side_px=config.image_size_px,
            num_threads=config.num_threads,
            device_id=_device_id(device),
            prefetch_batches=config.prefetch_batches,
            mean=config.mean,
            std=config.std,
            roi_decode=config.roi_decode,
            crop_then_resize=split.training and config.augmentation == "random_resized_crop",
            gpu_decode=config.gpu_decode,
            hw_decoder_load=config.hw_decoder_load,
            set_affinity=config.set_affinity,
        )
        self._pipeline = ImagePipeline(self.settings, split.source, split.policy)

    @property
    def broken(self) -> dict[str, str]:
        """See Loader."""
        return self._pipeline.broken.reasons

    @property
    def max_broken(self) -> int:
        """See Loader."""
        return self._split.policy.max_broken

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """See Loader. Raises DataError for an image that cannot be read, or for too many of them."""
        plan = self._split.plan(epoch, start_sample)
        tensors = PlanTensors.send(plan, self._split.source.labels, self._device)
        batches = self._pipeline.run(plan.sample_ids, lambda ids, size_hw: self._split.geometry(epoch, ids, size_hw))
        for row, images in enumerate(batches):
            yield tensors.batch(row, self._split.on_device(epoch, plan.sample_ids[row], images))

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader."""
        on_gpu = self.settings.device_id is not None and self.settings.gpu_decode
        return self._split.fingerprint() | {
            "loader": "dali",
            "decoder": "dali on the GPU" if on_gpu else "dali on the CPU",
            "versions": self._split.versions({"nvidia-dali": nvidia.dali.__version__}),
        }

    def close(self) -> None:
        """See Loader."""
        self._pipeline.close()


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()
