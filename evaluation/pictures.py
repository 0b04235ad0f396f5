"""Per-class accuracy, confusion matrix and calibration as PNG. The only file of this folder that imports matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.report import ProtocolResult

NAMED_CLASSES = 40
"""Up to so many classes every class has its own line and name; above, the worst and best are named."""

BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#8a8a8a"


def save_pictures(folder: Path, result: ProtocolResult) -> list[Path]:
    """Write <protocol>_per_class.png, <protocol>_confusion.png and <protocol>_calibration.png; returns their paths."""
    pictures = {"per_class": _per_class, "confusion": _confusion, "calibration": _calibration}
    paths = []
    for name, draw in pictures.items():
        paths.append(folder / f"{result.name}_{name}.png")
        figure = draw(result)
        FigureCanvasAgg(figure)
        figure.savefig(paths[-1], dpi=130)
    return paths


def _per_class(result: ProtocolResult) -> Figure:
    count_k = result.confusion_kk.sum(axis=1)
    accuracy_k = 100 * np.diag(result.confusion_kk) / np.maximum(count_k, 1)
    seen = np.flatnonzero(count_k)
    order = seen[np.argsort(accuracy_k[seen], kind="stable")]
    if len(order) <= NAMED_CLASSES:
        figure = Figure(figsize=(8, 1.4 + 0.26 * len(order)), layout="constrained")
        _bars(figure.add_subplot(), order, accuracy_k, result, f"Top-1 accuracy by class, {result.name}")
        return figure
    figure = Figure(figsize=(11, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.plot(accuracy_k[order], color=BLUE)
    left.set_title(f"Top-1 accuracy of {len(order)} classes, sorted, {result.name}")
    left.set_xlabel("classes, worst first")
    left.set_ylabel("top-1, %")
    left.set_ylim(0, 102)
    left.axhline(result.summary["top1"], color=ORANGE, linewidth=1, label=f"all images {result.summary['top1']:.2f} %")
    left.legend(loc="lower right", frameon=False)
    left.grid(axis="y", alpha=0.3)
    _bars(right, order[:25], accuracy_k, result, "the 25 worst")
    return figure


def _bars(axes: Axes, classes: np.ndarray, accuracy_k: np.ndarray, result: ProtocolResult, title: str) -> None:
    count_k = result.confusion_kk.sum(axis=1)
    places = np.arange(len(classes))[::-1]
    axes.barh(places, accuracy_k[classes], color=BLUE, height=0.7)
    axes.set_yticks(places, [f"{_short(result.class_names[label])} ({count_k[label]})" for label in classes], fontsize=8)
    axes.axvline(result.summary["top1"], color=ORANGE, linewidth=1)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.7, len(classes) - 0.3)
    axes.set_xlabel(f"top-1, % (images in brackets; line: all images, {result.summary['top1']:.2f} %)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _confusion(result: ProtocolResult) -> Figure:
    classes = len(result.class_names)
    title = f"Confusion, {result.name}: {int(result.confusion_kk.sum())} images"
    if classes > NAMED_CLASSES:
        figure = Figure(figsize=(14, 8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        # Colour by the square root: a share of a few percent must still be seen among a thousand classes.
        image = left.imshow(_shares(result), cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="antialiased")
        _most_confused(right, result)
    else:
        side = max(5.0, 2.2 + 0.3 * classes)
        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        left = figure.add_subplot()
        image = left.imshow(_shares(result), cmap="Blues", vmin=0, vmax=100)
        _name_cells(left, result)
    figure.colorbar(image, ax=left, label="% of the true class", shrink=0.8)
    left.set_title(title, fontsize=10)
    left.set_xlabel("predicted class")
    left.set_ylabel("true class")
    return figure


def _shares(result: ProtocolResult) -> np.ndarray:
    return np.asarray(100 * result.confusion_kk / np.maximum(result.confusion_kk.sum(axis=1, keepdims=True), 1))


def _name_cells(axes: Axes, result: ProtocolResult) -> None:
    names = [_short(name) for name in result.class_names]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    share_kk = _shares(result)
    for row, column in zip(*np.nonzero(result.confusion_kk), strict=True):
        color = "white" if share_kk[row, column] > 55 else "black"
        axes.text(column, row, str(result.confusion_kk[row, column]), ha="center", va="center", fontsize=7, color=color)


def _most_confused(axes: Axes, result: ProtocolResult, pairs: int = 30) -> None:
    errors_kk = result.confusion_kk - np.diag(np.diag(result.confusion_kk))
    most = [int(place) for place in np.argsort(-errors_kk, axis=None, kind="stable")[:pairs] if errors_kk.flat[place]]
    places = np.arange(len(most))[::-1]
    names = [[_short(result.class_names[label]) for label in divmod(pair, len(result.class_names))] for pair in most]
    axes.barh(places, [errors_kk.flat[pair] for pair in most], color=ORANGE, height=0.7)
    axes.set_yticks(places, [f"{true}, taken for {predicted}" for true, predicted in names], fontsize=8)
    axes.set_ylim(-0.7, len(most) - 0.3)
    axes.set_xlabel("images")
    axes.set_title("the most frequent confusions", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", alpha=0.3)


def _calibration(result: ProtocolResult) -> Figure:
    bins = len(result.calibration.images_per_bin)
    middles = (np.arange(bins) + 0.5) / bins
    images_b = np.array(result.calibration.images_per_bin)
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    filled = images_b > 0
    accuracy_b, confidence_b = np.array(result.calibration.accuracy_per_bin), np.array(result.calibration.confidence_per_bin)
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    top.bar(middles[filled], accuracy_b[filled], width=0.9 / bins, color=BLUE, alpha=0.85, label="share of hits in the bin")
    top.plot(confidence_b[filled], accuracy_b[filled], "o", color=ORANGE, markersize=4, label="at the bin's mean confidence")
    top.set_ylabel("share of hits")
    top.set_ylim(0, 1.02)
    top.set_title(f"Calibration, {result.name}: ECE {result.calibration.error:.4f}, {int(images_b.sum())} images", fontsize=10)
    top.legend(loc="upper left", frameon=False, fontsize=8)
    bottom.bar(middles, images_b, width=0.9 / bins, color=GREY)
    bottom.set_ylabel("images")
    bottom.set_xlabel("confidence (probability of the predicted class)")
    bottom.set_xlim(0, 1)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
