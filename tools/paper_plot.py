"""The figures, as SVG and PNG, legible in greyscale: arms differ by dash and marker, units by lightness."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_experiments import Experiment
from paper_results import Results, finished_runs
from paper_stability import MOMENTS, measure_units, moment_series
from paper_table import shift_keys

from unitdist.errors import ConfigError

ARM_LABELS = {"bn": "BN", "unit": "unitization"}
STYLES = (("black", "-", "o"), ("0.45", "--", "s"), ("0.25", ":", "^"), ("0.6", "-.", "D"))
"""(color, dash, marker) of the arms."""


def plot(experiment: Experiment, results: Results, folder: Path) -> list[Path]:
    """Draw the experiment's figures into `folder`; returns the files. ConfigError when nothing was run."""
    if not any(results["runs"].values()):
        raise ConfigError(
            f"{experiment.name}: nothing was run, nothing to plot; python tools/paper.py run {experiment.name} --data DIR"
        )
    plt.rcParams.update(
        {"font.size": 8, "svg.hashsalt": "unitdist", "axes.spines.top": False, "axes.spines.right": False}
    )
    figures: dict[str, Figure] = {}
    if experiment.kind == "moments":
        seeds = sorted({seed for runs in results["runs"].values() for seed in runs})
        figures |= {f"{experiment.name}_seed{seed}": draw_moments(results, seed) for seed in seeds}
        figures[f"{experiment.name}_stability"] = draw_stability(results)
    elif experiment.kind == "distance":
        figures[experiment.name] = draw_distance(experiment, results)
    else:
        figures[experiment.name] = draw_accuracy(experiment, results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for ending in ("svg", "png"):
            paths.append(folder / f"{name}.{ending}")
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(paths[-1], dpi=130, bbox_inches="tight", metadata=metadata)
        plt.close(figure)
    return paths


def draw_moments(results: Results, seed: str) -> Figure:
    """One row per moment, one column per arm, one line per unit; both columns share the vertical axis."""
    figure, axes = plt.subplots(len(MOMENTS), 2, figsize=(7.2, 7.6), sharex=True, sharey="row", constrained_layout=True)
    for column, (arm, label) in enumerate(ARM_LABELS.items()):
        axes[0, column].set_title(f"{label}, seed {seed}")
        axes[-1, column].set_xlabel("epoch")
        run = results["runs"].get(arm, {}).get(seed)
        for row, moment in enumerate(MOMENTS):
            axis = axes[row, column]
            if column == 0:
                axis.set_ylabel(moment)
            if run is None:
                axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
                continue
            series = moment_series(run, moment)
            shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, series.shape[1]))
            for unit in range(series.shape[1]):
                axis.plot(run["per_epoch"]["epoch"], series[:, unit], color=shades[unit], linewidth=0.8)
            mark_rate_steps(axis, run)
    return figure


def draw_stability(results: Results) -> Figure:
    """Movement of skewness and kurtosis in finished runs: a small mark per unit, a column and a bar (median) per seed."""
    figure, axes = plt.subplots(1, 4, figsize=(7.2, 2.6), constrained_layout=True)
    cases = [(moment, measure) for moment in ("skewness", "kurtosis") for measure in ("std", "step")]
    for axis, (moment, measure) in zip(axes, cases, strict=True):
        axis.set_title(
            f"{moment}:\n" + ("std over epochs" if measure == "std" else "mean change per epoch"), fontsize=8
        )
        axis.set_xticks([0, 1], list(ARM_LABELS.values()))
        axis.set_xlim(-0.5, 1.5)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        for place, arm in enumerate(ARM_LABELS):
            color, _, marker = STYLES[place]
            runs = list(finished_runs(results, arm).values())
            for column, run in enumerate(runs):
                values = measure_units(moment_series(run, moment), measure, 1)
                x = place + 0.22 * (column - (len(runs) - 1) / 2)
                axis.plot([x] * len(values), values, marker, color=color, markersize=3, markerfacecolor="none")
                axis.plot([x - 0.09, x + 0.09], [np.nanmedian(values)] * 2, color="black", linewidth=1.5)
    return figure


def draw_distance(experiment: Experiment, results: Results) -> Figure:
    """Mean EM distance (Alg. 3) and mean sliced distance of the chosen layers, epoch by epoch."""
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 5.2), sharex=True, constrained_layout=True)
    axes[0].set_ylabel("EM distance estimate\n(Alg. 3, mean over layers)")
    axes[1].set_ylabel("sliced EM distance\n(mean over layers)")
    axes[1].set_xlabel("epoch")
    for axis in axes:
        axis.set_yscale("log")
    marked = False
    for arm, (color, dash, marker) in zip(experiment.arms, STYLES, strict=False):
        for seed, run in results["runs"].get(arm.name, {}).items():
            series = run["per_epoch"]
            style = {"color": color, "linestyle": dash, "marker": marker, "markersize": 3, "linewidth": 1}
            axes[0].plot(series["epoch"], series["analysis/em_distance"], label=f"{arm.label}, seed {seed}", **style)
            shift = np.mean([series[key] for key in shift_keys(series)], axis=0)
            axes[1].plot(series["epoch"], shift, **style)
            if not marked:
                for axis in axes:
                    mark_rate_steps(axis, run)
                marked = True
    axes[0].legend(frameon=False)
    return figure


def draw_accuracy(experiment: Experiment, results: Results) -> Figure:
    """Every run of every arm (first metric), its median as a bar, the paper's number as a cross."""
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.3 * len(experiment.arms)), constrained_layout=True)
    metric = experiment.metrics[0]
    for row, arm in enumerate(experiment.arms):
        values = [
            run["metrics"][metric] for run in finished_runs(results, arm.name).values() if metric in run["metrics"]
        ]
        if values:
            axis.plot(values, [row] * len(values), "o", color="0.4", markersize=4, markerfacecolor="none")
            axis.plot([np.median(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.5)
        if arm.paper:
            axis.plot(arm.paper[0], row, "x", color="black", markersize=5)
        if not values and not arm.paper:
            axis.text(0.01, row, "not run", va="center", transform=axis.get_yaxis_transform())
    axis.set_yticks(range(len(experiment.arms)), [arm.label for arm in experiment.arms])
    axis.set_ylim(len(experiment.arms) - 0.5, -0.5)
    crosses = ", x the paper's" if any(arm.paper for arm in experiment.arms) else ""
    axis.set_xlabel(f"{metric.replace('val_', 'test ')} in percent (o runs, | median{crosses})")
    return figure


def mark_rate_steps(axis: Axes, run: dict[str, Any]) -> None:
    """A dashed line at every epoch that begins with a smaller learning rate."""
    epochs, rates = run["per_epoch"]["epoch"], run["per_epoch"]["lr"]
    for i in range(1, len(epochs)):
        if rates[i] < rates[i - 1]:
            axis.axvline(epochs[i] - 0.5, color="0.6", linestyle=(0, (2, 2)), linewidth=0.8)
