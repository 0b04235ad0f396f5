"""Streaming moments against scipy and against known values."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.multiprocessing as mp
from torch import Tensor

from unitdist.analysis.moments import Moments, merge_moments, merge_over_ranks, moments_of, no_moments, values_per_unit
from unitdist.errors import TrainingError


def merge_all(parts: list[Tensor]) -> Moments:
    merged = moments_of(parts[0])
    for part in parts[1:]:
        merged = merge_moments(merged, moments_of(part))
    return merged


def assert_equals_scipy(moments: Moments, x: Tensor, tolerance: float) -> None:
    values_cv = values_per_unit(x).double().numpy()
    assert moments.count == values_cv.shape[1]
    np.testing.assert_allclose(moments.mean_c, values_cv.mean(axis=1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(moments.variance_c, values_cv.var(axis=1), rtol=tolerance)
    np.testing.assert_allclose(moments.skewness_c, scipy.stats.skew(values_cv, axis=1), rtol=tolerance, atol=tolerance)
    expected_c = scipy.stats.kurtosis(values_cv, axis=1, fisher=False)
    np.testing.assert_allclose(moments.kurtosis_c, expected_c, rtol=tolerance)


def samples(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        return x.exp()
    if kind == "far from zero":
        return x + 100
    return x


@pytest.mark.parametrize("kind", ["gaussian", "skewed", "far from zero"])
@pytest.mark.parametrize("sizes", [[500], [1, 499], [128, 128, 128, 116], [1] * 20 + [480]])
def test_any_split_into_batches_equals_scipy_to_1e_9(kind: str, sizes: list[int]) -> None:
    x = samples(kind, (500, 5))
    assert_equals_scipy(merge_all(list(x.split(sizes))), x, 1e-9)


def test_image_maps_pool_samples_and_pixels() -> None:
    x = samples("skewed", (7, 3, 4, 5))
    assert_equals_scipy(merge_all(list(x.split([3, 4]))), x, 1e-9)


def test_float32_input_is_measured_in_float64() -> None:
    x = (samples("gaussian", (400, 4)) + 1000).float()
    assert_equals_scipy(merge_all(list(x.split(64))), x, 1e-9)


def test_literal_values_of_a_small_sample() -> None:
    moments = moments_of(torch.tensor([[1.0], [2.0], [3.0], [10.0]]))
    assert moments.mean_c.item() == 4.0
    assert moments.variance_c.item() == 12.5
    assert moments.skewness_c.item() == pytest.approx((-27 - 8 - 1 + 216) / 4 / 12.5**1.5, rel=1e-14)
    assert moments.kurtosis_c.item() == pytest.approx((81 + 16 + 1 + 1296) / 4 / 12.5**2, rel=1e-14)


def test_constant_unit_has_no_skewness() -> None:
    moments = moments_of(torch.full((6, 1), 0.1))
    assert moments.variance_c.item() == 0.0
    assert math.isnan(moments.skewness_c.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_activations_are_counted_in_the_error(bad: float) -> None:
    x = torch.ones(4, 3)
    x[1, 2] = bad
    with pytest.raises(TrainingError, match="1 of 12 activations are NaN or infinite"):
        moments_of(x)


def test_empty_batch_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no values"):
        moments_of(torch.empty(0, 3))


def _rank_main(rank: int, store: str, x: Tensor, sizes: list[int], results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    mine = x.split(sizes)[rank]
    moments = moments_of(mine) if len(mine) else no_moments(x.shape[1], x.device)
    merged = merge_over_ranks(moments)
    row = torch.stack([merged.mean_c, merged.variance_c, merged.skewness_c, merged.kurtosis_c])
    torch.save((merged.count, row), os.path.join(results, f"{rank}"))
    torch.distributed.destroy_process_group()


def test_uneven_ranks_one_of_them_empty_equal_one_process(tmp_path: Path) -> None:
    x = samples("skewed", (40, 3))
    arguments = (str(tmp_path / "store"), x, [25, 0, 15], str(tmp_path))
    mp.start_processes(_rank_main, arguments, nprocs=3, start_method="spawn")
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(3)]
    whole = moments_of(x)
    assert [count for count, _ in ranks] == [40.0] * 3
    assert torch.equal(ranks[0][1], ranks[1][1]) and torch.equal(ranks[0][1], ranks[2][1])
    expected = torch.stack([whole.mean_c, whole.variance_c, whole.skewness_c, whole.kurtosis_c])
    torch.testing.assert_close(ranks[0][1], expected, rtol=1e-12, atol=1e-12)
