"""Training and validation batches by DALI, on the CPU or the GPU: one definition for the four cases."""

from collections.abc import Iterator
from importlib.metadata import version

import nvidia.dali
import torch

from unitdist.data.batch import Batch
from unitdist.data.dali_graph import GeometryOf, GraphSettings, ImagePipeline
from unitdist.data.draws import Ints
from unitdist.data.resample import Resampler
from unitdist.data.split import PlanTensors, Split
from unitdist.data.transfer import copy_ahead, uint8_normalization


class DaliLoader:
    """Loader (batch.py) over a Split. On a CUDA device images are decoded, resampled and normalized there.

    On the CPU, and with gpu_decode false, DALI decodes and a Resampler does the rest.
    """

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
        self.resampler = Resampler(
            batch_size=split.per_rank_batch_size,
            side_px=config.image_size_px,
            mean=config.mean,
            std=config.std,
            device=device,
            threads=config.num_threads,
        )
        self._scale_c, self._shift_c = uint8_normalization(config.mean, config.std, device)

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
        images = self._images(plan.sample_ids, lambda ids, size_hw: self._split.geometry(epoch, ids, size_hw))
        for row, normalized in enumerate(images):
            yield tensors.batch(row, self._split.on_device(epoch, plan.sample_ids[row], normalized))

    def _images(self, sample_ids: Ints, geometry_of: GeometryOf) -> Iterator[torch.Tensor]:
        """Normalized (b, C, H, W) in channels_last strides on the device for each row of sample_ids (batches, b)."""
        if self.settings.decodes_on_gpu:
            return self._pipeline.squares(sample_ids, geometry_of)
        resampled = self.resampler.run(self._pipeline.regions(sample_ids, geometry_of))
        if self._device.type == "cpu":
            return resampled
        return (uint8 * self._scale_c + self._shift_c for uint8 in copy_ahead(resampled, self._device))

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader."""
        packages = {"nvidia-dali": nvidia.dali.__version__}
        if not self.settings.decodes_on_gpu:
            packages["torch"] = version("torch")
        return self._split.fingerprint() | {
            "loader": "dali",
            "decoder": "dali on the GPU" if self.settings.decodes_on_gpu else "dali on the CPU, resized by torch",
            "versions": self._split.versions(packages),
        }

    def close(self) -> None:
        """See Loader."""
        self._pipeline.close()


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()
