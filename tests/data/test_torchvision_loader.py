"""torchvision_loader.py: the samples and windows of the DALI loader, pixels within its tolerance, the same messages."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.data.geometry import CropThenResize, ResizeThenCrop
from unitdist.data.header import UnreadableImage
from unitdist.data.torchvision_loader import cut_window, decode_rgb
from unitdist.data.transfer import copy_ahead, uint8_normalization
from unitdist.errors import DataError

MakeConfig = Callable[..., DataConfig]
BuildLoader = Callable[..., Loader]
STD255 = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def random_image(height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels)


def test_cut_window_is_resize_then_crop_then_flip() -> None:
    image = random_image(60, 80)
    geometry = ResizeThenCrop(
        resized_hw=np.array([[45, 60], [45, 60]]), offset_yx=np.array([[3, 20], [3, 20]]), flip=np.array([False, True])
    )
    expected = transforms.resize(image, [45, 60], antialias=True)[:, 3:35, 20:52]
    assert torch.equal(cut_window(image, geometry, 0, 32), expected)
    assert torch.equal(cut_window(image, geometry, 1, 32), expected.flip(-1))


def test_cut_window_is_torchvisions_resized_crop() -> None:
    image = random_image(60, 80)
    geometry = CropThenResize(corner_yx=np.array([[5, 7]]), box_hw=np.array([[40, 33]]), flip=np.array([False]))
    expected = transforms.resized_crop(image, 5, 7, 40, 33, [32, 32], antialias=True)
    assert torch.equal(cut_window(image, geometry, 0, 32), expected)


def test_decode_rgb_refuses_what_cannot_be_decoded() -> None:
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="JPEG")
    assert decode_rgb(buffer.getvalue()).shape == (3, 64, 64)
    for data in (b"", b"text", buffer.getvalue()[:-40]):
        with pytest.raises(UnreadableImage):
            decode_rgb(data)


def test_uint8_normalization_is_the_usual_formula() -> None:
    scale, shift = uint8_normalization((0.485, 0.456), (0.229, 0.5), torch.device("cpu"))
    levels = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 2, 256, 1)
    mean, std = torch.tensor([0.485, 0.456])[:, None, None], torch.tensor([0.229, 0.5])[:, None, None]
    torch.testing.assert_close(levels * scale + shift, (levels.double() / 255 - mean) / std, check_dtype=False)


@pytest.mark.parametrize("case", ["scale", "random_resized_crop", "validation"])
def test_batches_are_those_of_dali_within_one_grey_level_off_the_rim(
    small_config: MakeConfig, build_loader: BuildLoader, case: str
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    sizes = {"image_size_px": 112, "scale_range_px": (128, 240), "val_resize_px": 128}
    augmentation = "scale" if case == "validation" else case
    config = small_config(augmentation=augmentation, **sizes)
    both = [
        list(
            build_loader(
                small_config(augmentation=augmentation, loader=loader, **sizes), batch=16, training=case != "validation"
            ).iterate(2)
        )
        for loader in ("dali", "torchvision")
    ]
    assert len(both[0]) == len(both[1]) == (5 if case == "validation" else 12)
    total, worst_inside, worst = 0.0, 0.0, 0.0
    for dali, torchvision in zip(*both, strict=True):
        assert dali.sample_ids.tolist() == torchvision.sample_ids.tolist()
        assert dali.labels.tolist() == torchvision.labels.tolist()
        assert dali.valid.tolist() == torchvision.valid.tolist()
        assert torchvision.images.is_contiguous(memory_format=torch.channels_last)
        grey_levels = (dali.images - torchvision.images).abs() * STD255
        total += grey_levels.mean().item()
        worst_inside = max(worst_inside, grey_levels[..., 1:-1, 1:-1].max().item())
        worst = max(worst, grey_levels.max().item())
    assert total / len(both[0]) < 0.25
    assert worst_inside < 1.05
    assert worst < 16
    assert config.mean == (0.485, 0.456, 0.406)


def test_workers_resume_anywhere_survive_an_early_end_and_name_an_unreadable_image(
    sample_data: Path, tmp_path: Path, small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    """One loader for the three claims: starting worker processes is the slow part."""
    root = tmp_path / "data"
    shutil.copytree(sample_data, root)
    loader = build_loader(small_config(path=str(root), loader="torchvision", num_threads=2), batch=16)
    whole = list(loader.iterate(1))
    assert len(whole) == 12
    early = loader.iterate(0)
    next(early)
    del early
    for start, rest in ((5, whole[5:]), (12, [])):
        for ours, expected in zip(loader.iterate(1, start_sample=16 * start), rest, strict=True):
            assert torch.equal(ours.images, expected.images)
    victim = root / "train" / "coffee" / "coffee_0003.jpg"
    victim.write_bytes(victim.read_bytes()[:2000])
    with pytest.raises(DataError, match=rf"^unreadable image {victim} \(truncated JPEG.*\); repair or remove it"):
        list(loader.iterate(1))


def test_workers_replace_the_image_that_dali_replaces(
    sample_data: Path, tmp_path: Path, small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    root = tmp_path / "data"
    shutil.copytree(sample_data, root)
    victim = root / "train" / "coffee" / "coffee_0003.jpg"
    victim.write_bytes(victim.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))
    both = [
        build_loader(small_config(path=str(root), loader=loader, on_broken="replace", max_broken_share=0.01), batch=64)
        for loader in ("dali", "torchvision")
    ]
    for dali, torchvision in zip(both[0].iterate(0), both[1].iterate(0), strict=True):
        assert dali.sample_ids.tolist() == torchvision.sample_ids.tolist()
        assert ((dali.images - torchvision.images).abs() * STD255).max() < 16
    assert both[0].broken == both[1].broken == {str(victim): "the decoder refuses it"}


def test_the_next_batch_is_copied_before_this_one_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what copy_ahead asks of CUDA, in which order."""
    events: list[str] = []

    class FakeBatch:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, *, non_blocking: bool) -> "FakeBatch":
            assert device.type == "cuda" and non_blocking
            events.append(f"copy {self.number} on {active[-1]}")
            return self

        def record_stream(self, stream: "FakeStream") -> None:
            events.append(f"{self.number} is used on {stream.name}")

    class FakeStream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "copying"

        def record_event(self) -> str:
            return events[-1]

        def wait_event(self, event: str) -> None:
            events.append(f"{self.name} waits for {event}")

        def __enter__(self) -> None:
            active.append(self.name)

        def __exit__(self, *_: object) -> None:
            active.pop()

    active = ["computing"]
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream("computing"))
    batches = copy_ahead(iter([FakeBatch(number) for number in range(3)]), torch.device("cuda"))  # type: ignore[misc]
    for batch in batches:
        events.append(f"step {batch.number}")  # type: ignore[attr-defined]
    handed_out = [
        (f"computing waits for copy {n} on copying", f"{n} is used on computing", f"step {n}") for n in range(3)
    ]
    assert events == [
        "copy 0 on copying",
        "copy 1 on copying",
        *handed_out[0],
        "copy 2 on copying",
        *handed_out[1],
        *handed_out[2],
    ]


KILLED = """
import os, signal, sys
import torch
from unitdist.config import DataConfig
from unitdist.data.build import build_train_loader
from unitdist.world import World
config = DataConfig(path=sys.argv[1], loader="torchvision", image_size_px=32, scale_range_px=(36, 40), num_threads=2)
loader = build_train_loader(config, World.single(), per_rank_batch_size=4, seed=0, device=torch.device("cpu"))
next(loader.iterate(0))
print("served", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_trainer(sample_data: Path) -> None:
    # The workers inherit the pipe: run() returns when the last of them has closed it.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(sample_data)], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "served\n")
