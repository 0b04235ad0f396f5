"""A number for Fig. 2's "more stable": how much each unit's moments move over the epochs, and a test of the difference."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from paper_results import Results
from scipy.stats import mannwhitneyu

MOMENTS = ("mean", "variance", "skewness", "kurtosis")
MEASURES = {
    "std": "standard deviation over the epochs",
    "step": "mean change from one epoch to the next",
}

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Medians over units and seeds of one measure of one moment in both arms, and Mann-Whitney's two-sided p.

    The units of one net are not independent: p counts them as if they were, so it is a lower end.
    """

    moment: str
    measure: str
    bn: float
    unit: float
    p_value: float


def moment_series(run: dict[str, Any], moment: str) -> Array:
    """(epochs, units) of one moment of the watched layer; NaN where it is not defined."""
    key = next(key for key in run["per_epoch"] if key.endswith(f"unit_{moment}"))
    return np.asarray(run["per_epoch"][key], dtype=np.float64)


def measure_units(series: Array, measure: str, first_epoch: int) -> Array:
    """One value per unit over the epochs from `first_epoch` (counted from 1) on."""
    used = series[first_epoch - 1 :]
    if measure == "std":
        return np.nanstd(used, axis=0)
    return np.nanmean(np.abs(np.diff(used, axis=0)), axis=0)


def compare(results: Results, first_epoch: int) -> list[Comparison]:
    """All moments and measures, over all runs in the results that have two epochs from `first_epoch` on."""
    runs = {
        arm: [run for run in results["runs"].get(arm, {}).values() if run["epochs_done"] > first_epoch]
        for arm in ("bn", "unit")
    }
    if not all(runs.values()):
        return []
    comparisons = []
    for moment in MOMENTS:
        for measure in MEASURES:
            bn, unit = (
                np.concatenate([measure_units(moment_series(run, moment), measure, first_epoch) for run in runs[arm]])
                for arm in ("bn", "unit")
            )
            p_value = float(mannwhitneyu(bn, unit, alternative="two-sided").pvalue)
            comparisons.append(
                Comparison(moment=moment, measure=measure, bn=median(bn), unit=median(unit), p_value=p_value)
            )
    return comparisons
