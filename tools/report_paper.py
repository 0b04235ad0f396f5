"""Which of the paper's experiments a run repeats, by its config alone, and the paper's numbers for it."""

from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from paper_experiments import EXPERIMENTS, Arm, Experiment
from paper_run import config_path
from report_runs import RunRecord, essence

from unitdist.config_file import load_config


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One number of the paper, and where this run's stands."""

    title: str
    label: str
    metric: str
    paper: float


def paper_rows(run: RunRecord) -> list[PaperRow]:
    """The paper's numbers for the run's recipe; none where the recipe is not the paper's or has no number there."""
    if run.config is None:
        return []
    wanted = essence(run.config)
    for experiment, arm, recipe in _recipes():
        if recipe == wanted:
            return [
                PaperRow(title=experiment.title, label=arm.label, metric=metric, paper=value)
                for metric, value in zip(experiment.metrics, arm.paper, strict=True)
            ]
    return []


@cache
def _recipes() -> list[tuple[Experiment, Arm, dict[str, Any]]]:
    """Arms for which the paper has a number. Experiments on a part of a data set are not the paper's."""
    return [
        (experiment, arm, essence(load_config(config_path(experiment), arm.overrides)))
        for experiment in EXPERIMENTS.values()
        if experiment.num_train is None
        for arm in experiment.arms
        if arm.paper
    ]


def measured(run: RunRecord, metric: str) -> float | None:
    """A finished run's value of a paper's metric in percent: val_top1 of the last epoch, or "<protocol> top1" of an evaluation."""
    if not run.is_finished:
        return None
    protocol, _, key = metric.rpartition(" ")
    if not protocol:
        return run.last(metric)  # type: ignore[no-any-return]
    for report in reversed(run.evaluations.values()):
        if key in report["protocols"].get(protocol, {}):
            return float(report["protocols"][protocol][key])
    return None


def middle_and_spread(values: list[float]) -> str:
    """Median and range in words; one value stands alone."""
    if not values:
        return "not recorded"
    if len(values) == 1:
        return f"{values[0]:.2f} (one run)"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)} runs)"
