"""The data room on a GPU: mixed decoding against the CPU's pixels, and copies that overlap."""

from pathlib import Path

import pytest
import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STD255 = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def batches_of(root: Path, device: str, *, training: bool = True, **changes: object) -> list[Batch]:
    config = DataConfig(path=str(root), num_threads=4, **changes)  # type: ignore[arg-type]
    arguments = {"per_rank_batch_size": 16, "device": torch.device(device)}
    if training:
        loader = build_train_loader(config, World.single(), seed=0, **arguments)  # type: ignore[arg-type]
    else:
        loader = build_val_loader(config, World.single(), **arguments)  # type: ignore[arg-type]
    batches = list(loader.iterate(1))
    loader.close()
    return batches


@pytest.mark.parametrize("roi_decode", [True, False])
@pytest.mark.parametrize("augmentation", ["scale", "random_resized_crop"])
def test_mixed_decoding_is_within_a_few_grey_levels_of_the_cpu(
    sample_data: Path, augmentation: str, roi_decode: bool
) -> None:
    changes = {"augmentation": augmentation, "roi_decode": roi_decode}
    on_cpu, on_gpu = (batches_of(sample_data, device, **changes) for device in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.is_cuda and gpu.labels.is_cuda and gpu.valid.is_cuda
        assert gpu.images.is_contiguous(memory_format=torch.channels_last)
        assert gpu.sample_ids.tolist() == cpu.sample_ids.tolist()
        grey_levels = (gpu.images.cpu() - cpu.images).abs() * STD255
        assert grey_levels.mean() < 0.5 and grey_levels.max() < 20


def test_cpu_decoding_for_a_gpu_gives_the_cpus_pixels(sample_data: Path) -> None:
    on_cpu = batches_of(sample_data, "cpu", training=False)
    for cpu, gpu in zip(on_cpu, batches_of(sample_data, "cuda", training=False, gpu_decode=False), strict=True):
        assert ((gpu.images.cpu() - cpu.images).abs() * STD255).max() < 0.01


def test_torchvision_batches_copied_ahead_are_the_cpus(sample_data: Path) -> None:
    on_cpu = batches_of(sample_data, "cpu", loader="torchvision")
    for cpu, gpu in zip(on_cpu, batches_of(sample_data, "cuda", loader="torchvision"), strict=True):
        assert gpu.sample_ids.tolist() == cpu.sample_ids.tolist()
        torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=1e-5, rtol=1e-5)
