"""The data room on a GPU: mixed decoding against the CPU's pixels, streams in order, copies one batch ahead."""

import shutil
from pathlib import Path

import pytest
import torch

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.errors import DataError
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


def test_random_resized_crops_of_the_cpu_are_sent_and_normalized_on_the_gpu(sample_data: Path) -> None:
    changes = {"augmentation": "random_resized_crop"}
    on_cpu = batches_of(sample_data, "cpu", **changes)
    for cpu, gpu in zip(on_cpu, batches_of(sample_data, "cuda", gpu_decode=False, **changes), strict=True):
        assert gpu.sample_ids.tolist() == cpu.sample_ids.tolist()
        assert gpu.images.is_cuda and gpu.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=1e-5, rtol=1e-5)


def test_torchvision_batches_copied_ahead_are_the_cpus(sample_data: Path) -> None:
    on_cpu = batches_of(sample_data, "cpu", loader="torchvision")
    for cpu, gpu in zip(on_cpu, batches_of(sample_data, "cuda", loader="torchvision"), strict=True):
        assert gpu.sample_ids.tolist() == cpu.sample_ids.tolist()
        torch.testing.assert_close(gpu.images.cpu(), cpu.images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("load", [0.0, 1.0])
def test_share_of_the_hardware_decoder_changes_no_colour_visibly(sample_data: Path, load: float) -> None:
    on_cpu = batches_of(sample_data, "cpu")
    for cpu, gpu in zip(on_cpu, batches_of(sample_data, "cuda", hw_decoder_load=load, set_affinity=True), strict=True):
        grey_levels = (gpu.images.cpu() - cpu.images).abs() * STD255
        assert grey_levels.mean() < 0.5 and grey_levels.max() < 20


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_no_batch_is_overwritten_while_the_device_still_reads_it(sample_data: Path, loader: str) -> None:
    """The host runs far ahead of a slow stream and drops each batch at once; its memory may only be used again behind the
    kernels that read it."""
    config = DataConfig(path=str(sample_data), num_threads=4, loader=loader)  # type: ignore[arg-type]
    arguments = {"per_rank_batch_size": 16, "seed": 0, "device": torch.device("cuda")}
    train = build_train_loader(config, World.single(), **arguments)  # type: ignore[arg-type]
    expected = []
    for batch in train.iterate(1):
        torch.cuda.synchronize()
        expected.append(batch.images.double().sum().item())
    side, sums = torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        for batch in train.iterate(1):
            torch.cuda._sleep(20_000_000)
            sums.append(batch.images.double().sum())
            del batch
    torch.cuda.synchronize()
    train.close()
    assert [value.item() for value in sums] == expected


def test_resume_on_the_gpu_is_bit_identical(sample_data: Path) -> None:
    config = DataConfig(path=str(sample_data), num_threads=4)
    arguments = {"per_rank_batch_size": 16, "seed": 0, "device": torch.device("cuda")}
    whole, resumed = (build_train_loader(config, World.single(), **arguments) for _ in range(2))  # type: ignore[arg-type]
    rest = list(whole.iterate(1))[5:]
    for ours, expected in zip(resumed.iterate(1, start_sample=80), rest, strict=True):
        assert ours.sample_ids.tolist() == expected.sample_ids.tolist()
        assert torch.equal(ours.images, expected.images)
    assert resumed.fingerprint()["decoder"] == "dali on the GPU"
    whole.close()
    resumed.close()


def test_unreadable_image_is_named_or_replaced_on_the_gpu(sample_data: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_data, tmp_path / "data")
    victim = tmp_path / "data" / "train" / "coffee" / "coffee_0003.jpg"
    victim.write_bytes(victim.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))
    with pytest.raises(DataError, match=f"^unreadable image {victim}"):
        batches_of(tmp_path / "data", "cuda")
    replaced = batches_of(tmp_path / "data", "cuda", on_broken="replace", max_broken_share=0.01)
    whole = batches_of(sample_data, "cuda")
    different = []
    for ours, expected in zip(replaced, whole, strict=True):
        worst = ((ours.images - expected.images).abs() * STD255.cuda()).amax((1, 2, 3))
        different += ours.sample_ids[worst > 20].tolist()
    assert len(different) == 1
