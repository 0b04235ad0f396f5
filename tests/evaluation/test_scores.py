import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.scores import (
    accuracy_summary,
    calibration,
    confusion_matrix,
    label_ranks,
    softmax,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (7, 10), (38_915, 50_000), (1, 3)])
def test_wilson_interval_is_scipys(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_ranks_count_the_classes_before_the_true_one() -> None:
    scores_nk = np.array([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2]])
    assert label_ranks(scores_nk, np.array([0, 1, 2])).tolist() == [2, 0, 1]


def test_ties_go_to_the_smaller_index_as_in_argmax() -> None:
    scores_nk = np.zeros((3, 3))
    assert label_ranks(scores_nk, np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_hits_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    scores_nk, labels_n = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    summary = accuracy_summary(scores_nk, labels_n)
    best_first = np.argsort(-scores_nk, axis=1)
    assert summary["top1_correct"] == sum(int(order[0] == label) for order, label in zip(best_first, labels_n, strict=True))
    assert summary["top5_correct"] == sum(int(label in order[:5]) for order, label in zip(best_first, labels_n, strict=True))
    assert summary["count"] == 200
    assert summary["top1"] == summary["top1_correct"] / 2


def test_top5_of_three_classes_is_certain() -> None:
    assert accuracy_summary(np.eye(3), np.array([0, 0, 0]))["top5_correct"] == 3


def test_calibration_of_a_case_by_hand() -> None:
    # Two images at confidence 0.8 with one hit, two at 0.6 with two hits: 1/2 |0.5 - 0.8| + 1/2 |1 - 0.6| = 0.35.
    probabilities_nk = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]])
    result = calibration(probabilities_nk, np.array([0, 0, 0, 1]), bins=10)
    assert result.error == pytest.approx(0.35, abs=1e-12)
    assert result.images_per_bin == (0, 0, 0, 0, 0, 2, 0, 2, 0, 0)


def test_a_certain_and_right_network_is_calibrated() -> None:
    assert calibration(np.eye(4), np.arange(4)).error == 0.0


def test_confusion_has_true_classes_as_rows() -> None:
    matrix = confusion_matrix(np.array([1, 1, 2, 0]), np.array([0, 1, 2, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_softmax_survives_large_scores() -> None:
    assert softmax(np.array([[1000.0, 1000.0]])).tolist() == [[0.5, 0.5]]
