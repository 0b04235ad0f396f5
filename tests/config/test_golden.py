"""Golden numbers of every shipped config: parameters, and learning rates at the paper's epochs."""

from pathlib import Path

import pytest
import torch

from unitdist.config_file import CONFIG_FOLDER, load_config
from unitdist.models.build import build_model
from unitdist.train.schedule import learning_rate_share, peak_learning_rate

IMAGENET_RATES = {1: 0.01, 30: 0.01, 31: 0.002, 60: 0.002, 61: 4e-4, 90: 4e-4, 91: 8e-5, 120: 8e-5}
CIFAR_RATES = {1: 0.05, 60: 0.05, 61: 0.01, 120: 0.01, 121: 0.002, 160: 0.002, 161: 4e-4, 200: 4e-4}
GOLDEN = {
    "demo.yaml": (11_185_296, {1: 0.0}),
    "imagenet_r101_unit.yaml": (44_443_816 + 3 * 46_784, IMAGENET_RATES),
    "imagenet_r101_bn.yaml": (44_443_816 + 2 * 46_784, IMAGENET_RATES),
    "recipes/imagenet_r50_fast.yaml": (25_572_072, {1: 0.0, 4: 2.0}),
    "recipes/finetune_bn.yaml": (25_557_032 + 26_560, {1: 0.0, 2: 0.004}),
    "recipes/cifar10_minutes.yaml": (273_018, {1: 0.0, 3: 0.2}),
    "paper/table3.yaml": (44_443_816 + 3 * 46_784, IMAGENET_RATES),
    "paper/fig2.yaml": (784 * 100 + 9 * 100 * 100 + 100 * 8 + 8 * 10 + 10 + 3 * (10 * 100 + 8), CIFAR_RATES),
    "paper/fig3.yaml": (1_734_618, CIFAR_RATES),
    "paper/fig3_mnist.yaml": (172_314, {1: 0.05, 5: 0.05, 6: 0.01, 11: 0.002, 14: 4e-4}),
    "paper/table1.yaml": (270_906 + 3 * 704, CIFAR_RATES),
    "paper/table2.yaml": (270_906 + 3 * 704 + 90 * 65, CIFAR_RATES),
    "paper/table4.yaml": (1_734_618, CIFAR_RATES),
    "paper/table4_mnist.yaml": (77_850, {1: 0.05, 2: 0.01}),
}


def test_every_config_has_golden_numbers() -> None:
    assert {str(file.relative_to(CONFIG_FOLDER)) for file in CONFIG_FOLDER.rglob("*.yaml")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_count(name: str) -> None:
    config = load_config(CONFIG_FOLDER / Path(name))
    with torch.device("meta"):
        model = build_model(config.model, image_size_px=config.data.image_size_px, sync=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == GOLDEN[name][0]
    assert str(model)


@pytest.mark.parametrize("name", GOLDEN)
def test_learning_rates(name: str) -> None:
    config = load_config(CONFIG_FOLDER / Path(name))
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    for epoch, rate in GOLDEN[name][1].items():
        step = (epoch - 1) * 1000
        share = learning_rate_share(config.schedule, step=step, steps_per_epoch=1000, epochs=config.train.epochs)
        assert peak * share == pytest.approx(rate, rel=1e-12), epoch
