"""unitdist.train.schedule: the learning rate is a pure function of the step."""

import math

import pytest

from unitdist.config import OptimConfig, ScheduleConfig
from unitdist.config_file import load_config
from unitdist.train.schedule import learning_rate_share, peak_learning_rate


def rate_in_epoch(name: str, epoch: int, *, steps_per_epoch: int = 20018) -> float:
    config = load_config(name)
    peak = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    steps = ((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch - 1)
    rates = {
        peak
        * learning_rate_share(config.schedule, step=step, steps_per_epoch=steps_per_epoch, epochs=config.train.epochs)
        for step in steps
    }
    assert len(rates) == 1, "the rate changed within an epoch"
    return rates.pop()


@pytest.mark.parametrize("name", ["imagenet_r101_unit.yaml", "imagenet_r101_bn.yaml"])
@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(1, 0.01), (30, 0.01), (31, 0.002), (60, 0.002), (61, 4e-4), (90, 4e-4), (91, 8e-5), (120, 8e-5)],
)
def test_imagenet_rates_are_the_papers(name: str, epoch: int, rate: float) -> None:
    assert rate_in_epoch(name, epoch) == pytest.approx(rate, rel=1e-12)


def test_lr_scales_linearly_from_its_reference_batch() -> None:
    config = OptimConfig(lr=0.1, reference_batch_size=256)
    assert peak_learning_rate(config, global_batch_size=1024) == pytest.approx(0.4)
    assert peak_learning_rate(OptimConfig(lr=0.1), global_batch_size=1024) == 0.1


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    config = ScheduleConfig(name="constant", warmup_epochs=2, warmup_start_share=0.1)
    shares = [learning_rate_share(config, step=step, steps_per_epoch=10, epochs=5) for step in (0, 10, 20, 49)]
    assert shares == pytest.approx([0.1, 0.55, 1.0, 1.0])


def test_cosine_goes_from_one_to_its_minimum() -> None:
    config = ScheduleConfig(name="cosine", min_lr_share=0.02)
    shares = [learning_rate_share(config, step=step, steps_per_epoch=10, epochs=4) for step in (0, 20, 40)]
    assert shares == pytest.approx([1.0, 0.02 + 0.98 * 0.5, 0.02])
    middle = learning_rate_share(config, step=10, steps_per_epoch=10, epochs=4)
    assert middle == pytest.approx(0.02 + 0.98 * (1 + math.cos(math.pi / 4)) / 2)
