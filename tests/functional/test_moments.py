"""Moments: well conditioned, mergeable, exact over uneven and empty shares."""

import pytest
import torch

from unitdist.functional.moments import (
    accumulation_dtype,
    channel_moments,
    pack_moments,
    sample_moments,
    unpack_moments,
)


def test_statistics_are_float32_or_wider() -> None:
    assert [accumulation_dtype(t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)] == [
        torch.float64,
        torch.float32,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (1, 3, 2, 2), (6, 3), (2, 3, 9)])
def test_channel_moments_equal_mean_and_variance(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_ncp = x.reshape(shape[0], shape[1], -1)
    pixels = x_ncp.shape[2]
    mean_c, centred_c = channel_moments(*sample_moments(x), pixels)
    torch.testing.assert_close(mean_c, x_ncp.mean((0, 2)), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        centred_c / (shape[0] * pixels), x_ncp.var((0, 2), unbiased=False), rtol=1e-13, atol=1e-14
    )


def test_merging_uneven_and_empty_shares_equals_the_whole() -> None:
    x = torch.randn(11, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 7
    packed = torch.zeros(7, dtype=torch.float64)
    for share in x.split([3, 0, 1, 7]):
        packed += pack_moments(*channel_moments(*sample_moments(share), 25), share.shape[0] * 25)
    mean_c, var_c, count = unpack_moments(packed, torch.float64)
    torch.testing.assert_close(mean_c, x.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(var_c, x.var((0, 2, 3), unbiased=False), rtol=1e-13, atol=0)
    assert count.item() == 275


def test_nobody_has_a_sample() -> None:
    mean_c, var_c, count = unpack_moments(torch.zeros(5, dtype=torch.float64), torch.float32)
    assert mean_c.tolist() == [0, 0] and var_c.tolist() == [0, 0] and count.item() == 0


def test_float32_variance_survives_a_mean_a_hundred_times_the_deviation() -> None:
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(2)) + 100
    wanted = x.double().var((0, 2, 3), unbiased=False)
    packed = torch.zeros(9, dtype=torch.float64)
    for share in x.split([3, 5]):
        packed += pack_moments(*channel_moments(*sample_moments(share), 256), share.shape[0] * 256)
    _, var_c, _ = unpack_moments(packed, torch.float32)
    assert ((var_c.double() - wanted).abs() / wanted).max() < 1e-6
