"""draws.py: uniform, independent of order and batch, different for every seed, epoch, sample and purpose."""

import numpy as np
import pytest

from unitdist.data import draws

IDS = np.arange(200_000, dtype=np.int64)


def test_values_are_pinned_so_that_old_runs_can_be_continued() -> None:
    assert draws.hash64(0, 0, np.array([0, 1, 2]), draws.ORDER).tolist() == [
        7003780324009007464,
        9475536865216446800,
        16517311042913851803,
    ]


@pytest.mark.parametrize("purpose", [draws.ORDER, draws.SCALE, draws.FLIP, draws.AREA])
def test_uniform_fills_each_of_100_bins_evenly(purpose: int) -> None:
    values = draws.uniform(3, 5, IDS, purpose)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    expected = len(IDS) / 100
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, standard deviation 14


def test_integer_takes_each_value_of_the_closed_scale_range_equally_often() -> None:
    counts = np.bincount(draws.integer(1, 2, IDS, draws.SCALE, 225), minlength=225)
    assert len(counts) == 225
    assert abs(counts - len(IDS) / 225).max() < 5 * np.sqrt(len(IDS) / 225)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, draws.FLIP), (0, 1, draws.FLIP)),
        ((0, 0, draws.FLIP), (1, 0, draws.FLIP)),
        ((0, 0, draws.CROP_Y), (0, 0, draws.CROP_X)),
        ((0, 1, draws.FLIP), (1, 0, draws.FLIP)),
    ],
    ids=["epochs", "seeds", "purposes", "epoch and seed exchanged"],
)
def test_streams_are_uncorrelated(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    a, b = (draws.uniform(seed, epoch, IDS, purpose) for seed, epoch, purpose in (first, second))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert not np.any(a == b)


def test_neighbouring_samples_are_uncorrelated() -> None:
    values = draws.uniform(0, 0, IDS, draws.SCALE)
    for lag in (1, 2, 3, 64):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 0.01


def test_a_draw_does_not_depend_on_the_other_samples_asked_for() -> None:
    together = draws.uniform(7, 9, IDS, draws.CROP_X)
    assert draws.uniform(7, 9, np.array([17]), draws.CROP_X)[0] == together[17]
    assert np.array_equal(draws.uniform(7, 9, IDS[::-1], draws.CROP_X), together[::-1])


def test_large_seeds_and_epochs_are_accepted() -> None:
    assert 0 <= draws.uniform(2**63, 10**9, np.array([2**40]), draws.FLIP)[0] < 1
