"""The CPU's passes against the generic ones in float64, which the functional tests compare with the paper."""

import pytest
import torch
from torch import Tensor

from unitdist.kernels import cpu, generic

SHAPES = [(1, 1, 1, 1), (3, 5, 4, 7), (2, 64, 7, 7), (4, 3, 33, 17), (5, 17, 1, 1), (1, 33, 9, 1)]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Largest errors seen, relative to the largest value: float32 2e-6, 16-bit results one rounding.
LIMIT = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
TABLE_LIMIT = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def error(have: Tensor, want: Tensor) -> float:
    return ((have.double() - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_passes_equal_generic_float64(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    random = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    x, grad_y = ((random(*shape) + 1).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    mean_c, bias_c, offset_c = random(3, shape[1])
    scale_nc, slope_nc = random(2, *shape[:2])
    wide = [mean_c, scale_nc, bias_c, slope_nc, offset_c]
    narrow = [t.double() if dtype == torch.float64 else t.float() for t in wide]
    assert cpu.takes(x)

    have, want = cpu.sample_moments(x), generic.sample_moments(x.double())
    assert have[0].dtype == have[1].dtype == narrow[0].dtype
    assert error(have[0], want[0]) < TABLE_LIMIT[dtype]
    assert ((have[1].double() - want[1]).abs() / want[1].clamp(min=1e-9)).max().item() < TABLE_LIMIT[dtype]

    for relu in (False, True):
        y, want_y = cpu.scale_shift(x, *narrow[:3], relu), generic.scale_shift(x.double(), *wide[:3], relu)
        assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
        assert error(y, want_y) < LIMIT[dtype]
        masked = grad_y.double() * (y > 0) if relu else grad_y.double()
        *sums, carried = cpu.gradient_sums(grad_y, x, *narrow[:3], relu)
        *want_sums, _ = generic.gradient_sums(masked, x.double(), *wide[:3], False)
        assert error(sums[0], want_sums[0]) < TABLE_LIMIT[dtype]
        assert error(sums[1], want_sums[1]) < TABLE_LIMIT[dtype]
        grad_x = cpu.input_gradient(carried, x, narrow[0], narrow[1], narrow[3], narrow[4])
        want_x = generic.input_gradient(masked, x.double(), wide[0], wide[1], wide[3], wide[4])
        assert grad_x.dtype == dtype and grad_x.stride() == torch.empty_like(x).stride()
        assert error(grad_x, want_x) < LIMIT[dtype]


def test_gradient_in_another_memory_format_is_understood() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    grad_y, table = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    have = cpu.gradient_sums(grad_y, x, table[0], table, table[1], True)
    want = generic.gradient_sums(grad_y, x, table[0], table, table[1], True)
    torch.testing.assert_close(have[0], want[0])
    torch.testing.assert_close(have[1], want[1])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_variance_survives_a_mean_of_a_hundred_deviations(memory_format: torch.memory_format) -> None:
    x = (torch.randn(3, 8, 28, 28, generator=torch.Generator().manual_seed(0)) + 100).contiguous(
        memory_format=memory_format
    )
    _, centred_nc = cpu.sample_moments(x)
    want = generic.sample_moments(x.double())[1]
    assert ((centred_nc.double() - want).abs() / want).max().item() < 2e-6


def test_constant_samples_have_no_variance() -> None:
    for memory_format in FORMATS:
        x = torch.full((2, 3, 4, 4), 7.0).contiguous(memory_format=memory_format)
        mean_nc, centred_nc = cpu.sample_moments(x)
        assert mean_nc.tolist() == [[7.0] * 3] * 2 and centred_nc.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("x", [torch.zeros(0, 3, 2, 2), torch.zeros(2, 3), torch.zeros(2, 3, 4, 8)[..., ::2]])
def test_tensors_that_are_empty_not_dense_or_no_images_are_left_to_the_generic_form(x: Tensor) -> None:
    assert not cpu.takes(x)
