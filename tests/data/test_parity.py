"""Given the drawn numbers, DALI's crops are Pillow's, and a trained network decides alike on both loaders' images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unitdist.config import DataConfig
from unitdist.data.batch import Loader
from unitdist.data.geometry import CropThenResize, ResizeThenCrop, training_geometry, validation_geometry
from unitdist.data.index import scan_image_folder

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
BuildLoader = Callable[..., Loader]
# Pixels themselves come out: the tolerances below are in grey levels.
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


def pillow_crop(path: Path, geometry: ResizeThenCrop | CropThenResize, row: int, side: int) -> torch.Tensor:
    """The geometry in Pillow's own operations."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if isinstance(geometry, ResizeThenCrop):
        height, width = geometry.resized_hw[row].tolist()
        y, x = geometry.offset_yx[row].tolist()
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((x, y, x + side, y + side))
    else:
        (y, x), (height, width) = geometry.corner_yx[row].tolist(), geometry.box_hw[row].tolist()
        image = image.crop((x, y, x + width, y + height)).resize((side, side), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.flip(-1) if geometry.flip[row] else pixels


@pytest.mark.parametrize("case", ["scale", "random_resized_crop", "validation"])
def test_crops_at_224_are_pillows_within_the_stated_tolerance(
    sample_data: Path, build_loader: BuildLoader, case: str
) -> None:
    training = case != "validation"
    config = DataConfig(path=str(sample_data), num_threads=1, augmentation=case if training else "scale", **RAW)
    loader = build_loader(config, batch=48, training=training, seed=5)
    batch = next(loader.iterate(2))
    index = scan_image_folder(sample_data / ("train" if training else "val"))
    ids = batch.sample_ids.numpy()
    sizes = []
    for sample_id in ids.tolist():
        with Image.open(index.name(sample_id)) as image:
            sizes.append((image.height, image.width))
    size_hw = np.asarray(sizes)
    geometry = (
        training_geometry(config, seed=5, epoch=2, sample_ids=ids, size_hw=size_hw)
        if training
        else validation_geometry(config, size_hw=size_hw)
    )
    means = []
    for row, sample_id in enumerate(ids.tolist()):
        difference = (batch.images[row] - pillow_crop(Path(index.name(sample_id)), geometry, row, 224)).abs()
        assert difference.max() <= 1.01  # to the rim; 0.01 for the normalization's float32
        means.append(difference.mean().item())
    assert np.mean(means) < 0.25


def small_net() -> nn.Module:
    """Enough to learn the sample data at 32 px in seconds."""

    def block(channels: int, maps: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, maps, 3, 2, 1, bias=False), nn.BatchNorm2d(maps), nn.ReLU())

    return nn.Sequential(
        block(3, 16), block(16, 32), block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 16)
    )


def test_trained_network_decides_alike_on_the_images_of_both_loaders(
    small_config: Callable[..., DataConfig], build_loader: BuildLoader
) -> None:
    torch.manual_seed(0)
    net, train = small_net(), build_loader(small_config(), batch=32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(12):
        for batch in train.iterate(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    net.eval()
    decisions, probabilities, labels = {}, {}, torch.empty(0)
    for name in ("dali", "torchvision"):
        batches = list(build_loader(small_config(loader=name), batch=16, training=False).iterate(0))
        with torch.no_grad():
            logits = torch.cat([net(batch.images)[batch.valid] for batch in batches])
        labels = torch.cat([batch.labels[batch.valid] for batch in batches])
        decisions[name], probabilities[name] = logits.argmax(1), logits.softmax(1)
    assert (decisions["dali"] == labels).float().mean() > 0.5  # chance: 0.06; it has learned something
    assert (decisions["dali"] == decisions["torchvision"]).float().mean() >= 0.97
    assert (probabilities["dali"] - probabilities["torchvision"]).abs().mean() < 0.002
