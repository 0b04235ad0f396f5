"""From per-image scores to the numbers of a report: integer counts, intervals, calibration, confusion.

Legend: N images, K classes; `scores_nk` float64, `labels_n` int64. Everything is computed by one process, in the order of
the image list, so that the numbers do not depend on how many processes produced the scores.
"""

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Reliability of the confidences in equal bins of (0, 1].

    `error` is the expected calibration error sum_b (n_b / N) |accuracy_b - confidence_b|; empty bins hold 0.
    """

    error: float
    images_per_bin: tuple[int, ...]
    accuracy_per_bin: tuple[float, ...]
    confidence_per_bin: tuple[float, ...]


def softmax(logits_nk: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64."""
    shifted = logits_nk.astype(np.float64) - logits_nk.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def label_ranks(scores_nk: np.ndarray, labels_n: np.ndarray) -> np.ndarray:
    """Number of classes placed before the true one: higher score, or equal score and smaller index. (N,) int64, 0 is a hit.

    The tie rule is argmax's, so that rank 0 and `predictions` agree even for constant scores.
    """
    true_n1 = np.take_along_axis(scores_nk, labels_n[:, None], axis=1)
    earlier_nk = np.arange(scores_nk.shape[1])[None, :] < labels_n[:, None]
    before_nk = (scores_nk > true_n1) | ((scores_nk == true_n1) & earlier_nk)
    return np.asarray(before_nk.sum(axis=1))


def wilson_interval(hits: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, in [0, 1]; (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_summary(scores_nk: np.ndarray, labels_n: np.ndarray) -> dict[str, object]:
    """count, integer hits, and top-1 and top-5 (top-K where K < 5) in percent with 95 % Wilson intervals."""
    ranks_n = label_ranks(scores_nk, labels_n)
    count = len(labels_n)
    summary: dict[str, object] = {"count": count}
    for key, places in (("top1", 1), ("top5", 5)):
        hits = int((ranks_n < places).sum())
        summary[f"{key}_correct"] = hits
        summary[key] = 100 * hits / count if count else 0.0
        summary[f"{key}_interval"] = [100 * bound for bound in wilson_interval(hits, count)]
    return summary


def calibration(probabilities_nk: np.ndarray, labels_n: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error of the top-1 confidence in `bins` equal bins (lower edge open, upper edge closed)."""
    if len(labels_n) == 0:
        return Calibration(error=0.0, images_per_bin=(0,) * bins, accuracy_per_bin=(0.0,) * bins, confidence_per_bin=(0.0,) * bins)
    confidence_n = probabilities_nk.max(axis=1)
    correct_n = probabilities_nk.argmax(axis=1) == labels_n
    bin_n = np.clip(np.ceil(confidence_n * bins).astype(np.int64) - 1, 0, bins - 1)
    images_b = np.bincount(bin_n, minlength=bins)
    filled_b = np.maximum(images_b, 1)
    accuracy_b = np.bincount(bin_n, weights=correct_n.astype(np.float64), minlength=bins) / filled_b
    confidence_b = np.bincount(bin_n, weights=confidence_n.astype(np.float64), minlength=bins) / filled_b
    error = float((images_b * np.abs(accuracy_b - confidence_b)).sum() / len(labels_n))
    return Calibration(
        error=error,
        images_per_bin=tuple(images_b.tolist()),
        accuracy_per_bin=tuple(accuracy_b.tolist()),
        confidence_per_bin=tuple(confidence_b.tolist()),
    )


def confusion_matrix(predictions_n: np.ndarray, labels_n: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64: row = true class, column = predicted class; its sum is the number of images."""
    flat = np.bincount(labels_n * num_classes + predictions_n, minlength=num_classes * num_classes)
    return np.asarray(flat.reshape(num_classes, num_classes))
