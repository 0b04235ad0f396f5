"""Small images, small networks and their checkpoints for the evaluation's tests."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from unitdist.config import Config, DataConfig, ModelConfig
from unitdist.config_file import config_to_dict
from unitdist.layers import Unitization2d
from unitdist.models.build import build_model
from unitdist.train.checkpoint import FORMAT, save_checkpoint


class TinyNet(nn.Module):
    """Convolution, Unitization with ReLU, convolution, global pool, linear: 16 classes, any image size."""

    def __init__(self, num_classes: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 5, stride=2, padding=2)
        self.norm = Unitization2d(12, norm_divisor=256, activation="relu")
        self.conv2 = nn.Conv2d(12, 24, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(24, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.conv2(self.norm(self.conv(x_nchw))).relu()).flatten(1))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and alpha as after a training, so that nothing is at a value where errors hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("alpha"):
            value.copy_(torch.rand(value.shape, generator=generator) * 0.8)
        elif name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


@pytest.fixture
def tiny_net() -> TinyNet:
    """An untrained network with 16 outputs, in evaluation mode."""
    torch.manual_seed(3)
    model = randomize(TinyNet())
    model.classifier.weight.data *= 20  # scores that differ between classes
    return model.eval()


@pytest.fixture(scope="session")
def small_val(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 images of 16 classes: two JPEGs of each, a 10:1 image, and one smaller than any crop. Do not change its files."""
    folder = tmp_path_factory.mktemp("small") / "images"
    for class_folder in sorted((sample_data / "val").iterdir()):
        (folder / class_folder.name).mkdir(parents=True)
        for file in sorted(class_folder.iterdir())[:2]:
            shutil.copy(file, folder / class_folder.name)
    classes = sorted(folder.iterdir())
    source = next(classes[0].iterdir())
    with Image.open(source) as image:
        image.convert("RGB").resize((600, 60)).save(classes[0] / "wide.jpg", quality=95)
        image.convert("RGB").resize((21, 33)).save(classes[1] / "minute.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def small_classes(small_val: Path) -> dict[str, int]:
    """Class name -> label of `small_val`."""
    return {folder.name: label for label, folder in enumerate(sorted(small_val.iterdir()))}


@pytest.fixture(scope="session")
def checkpoint(small_classes: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of unitdist's own: cifar_resnet20 with Unitization, trained on nothing, for 32-pixel crops."""
    config = Config(
        model=ModelConfig(name="cifar_resnet20", num_classes=len(small_classes)),
        data=DataConfig(path="data", image_size_px=32, scale_range_px=(32, 60), val_resize_px=37),
    )
    torch.manual_seed(1)
    model = randomize(build_model(config.model, image_size_px=32, sync=False))
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(
        path,
        {
            "format": FORMAT,
            "config": config_to_dict(config),
            "model": model.state_dict(),
            "model_ema": None,
            "class_to_idx": small_classes,
        },
    )
    return path
