"""A number for Fig. 2's "more stable": how much each unit's moments move over the epochs, and a test of the difference.

The units of one net share its weights and move together, so a net counts once: each seed gives the median over its units, and
the test compares these few numbers.
"""

from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from paper_results import Results, finished_runs
from scipy.stats import mannwhitneyu

MOMENTS = ("mean", "variance", "skewness", "kurtosis")
MEASURES = {
    "std": "standard deviation over the epochs",
    "step": "mean change from one epoch to the next",
}

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure of one moment in both arms, over the epochs `first`..`last`.

    `bn`, `unit`: one number per seed, the median over its units. `p_value`: Mann-Whitney's exact two-sided p over the
    seeds; it cannot fall below `smallest_p`, which it reaches when every seed of one arm lies above every seed of the other.
    """

    moment: str
    measure: str
    first: int
    last: int
    bn: tuple[float, ...]
    unit: tuple[float, ...]
    p_value: float

    @property
    def smallest_p(self) -> float:
        """2 over the number of ways to choose one arm's seeds among all: 0.1 for 3 against 3."""
        return min(1.0, 2 / comb(len(self.bn) + len(self.unit), len(self.bn)))


def moment_series(run: dict[str, Any], moment: str) -> Array:
    """(epochs, units) of one moment of the watched layer; NaN where it is not defined."""
    key = next(key for key in run["per_epoch"] if key.endswith(f"unit_{moment}"))
    return np.asarray(run["per_epoch"][key], dtype=np.float64)


def measure_units(series: Array, measure: str, first: int, last: int | None = None) -> Array:
    """One value per unit over the epochs `first`..`last`, counted from 1 (last None: to the end)."""
    used = series[first - 1 : last]
    if measure == "std":
        return np.nanstd(used, axis=0)
    return np.nanmean(np.abs(np.diff(used, axis=0)), axis=0)


def measure_seeds(runs: dict[str, Any], moment: str, measure: str, first: int, last: int | None) -> tuple[float, ...]:
    """One value per seed: the median over the units."""
    per_seed = [measure_units(moment_series(run, moment), measure, first, last) for run in runs.values()]
    return tuple(float(np.nanmedian(units)) for units in per_seed)


def compare(results: Results, first: int, last: int | None = None) -> list[Comparison]:
    """All moments and measures over the finished runs; none where an arm has no finished run of two such epochs."""
    runs = {arm: finished_runs(results, arm) for arm in ("bn", "unit")}
    if not all(runs.values()):
        return []
    end = min(last or run["epochs_done"] for arm in runs.values() for run in arm.values())
    if end <= first:
        return []
    comparisons = []
    for moment in MOMENTS:
        for measure in MEASURES:
            bn, unit = (measure_seeds(runs[arm], moment, measure, first, end) for arm in ("bn", "unit"))
            p_value = float(mannwhitneyu(bn, unit, alternative="two-sided", method="exact").pvalue)
            comparisons.append(
                Comparison(moment=moment, measure=measure, first=first, last=end, bn=bn, unit=unit, p_value=p_value)
            )
    return comparisons


def rate_stretches(run: dict[str, Any]) -> list[tuple[int, int]]:
    """(first, last) epoch, counted from 1, of each stretch of one learning rate."""
    rates = run["per_epoch"]["lr"]
    starts = [i for i in range(len(rates)) if i == 0 or rates[i] != rates[i - 1]]
    return [(start + 1, end) for start, end in zip(starts, [*starts[1:], len(rates)], strict=True)]


def in_words(values: tuple[float, ...]) -> str:
    """Median and range over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{median(values):.4f} ({min(values):.4f}..{max(values):.4f})"
