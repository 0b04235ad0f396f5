"""No bound is ever violated by an exact EM distance; the appendix's example grows without end."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unitdist.analysis import bounds
from unitdist.analysis.exact_transport import exact_em_distance
from unitdist.errors import ConfigError

# Rounding of the exact distance: float64 sums of at most 24 terms.
SLACK = 1e-9


@st.composite
def two_samples(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two samples of equal size: Gaussian, heavy-tailed or boxes, shifted and scaled over four decades."""
    n, d = draw(st.integers(2, 24)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pair = []
    for _ in range(2):
        x_nd = torch.randn(n, d, generator=generator, dtype=torch.float64)
        shape = draw(st.sampled_from(["gaussian", "heavy", "box"]))
        if shape == "heavy":
            x_nd = x_nd.sign() * x_nd.abs().exp()
        if shape == "box":
            x_nd = torch.rand(n, d, generator=generator, dtype=torch.float64)
        scale = 10.0 ** draw(st.floats(-2, 2))
        pair.append(x_nd * scale + draw(st.floats(-3, 3)) * scale)
    return pair[0], pair[1]


def moments(x_nd: Tensor) -> tuple[Tensor, Tensor]:
    return x_nd.mean(dim=0), x_nd.var(dim=0, correction=0)


def norms(x_nd: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_nd, dim=1, keepdim=True)


@settings(max_examples=150, deadline=None)
@given(two_samples())
def test_theorem_1_holds_on_samples(pair: tuple[Tensor, Tensor]) -> None:
    old, new = pair
    bound = bounds.upper_bound_from_moments(*moments(old), *moments(new))
    assert exact_em_distance(old, new) <= bound + SLACK


@settings(max_examples=150, deadline=None)
@given(two_samples(), st.integers(2, 8), st.floats(-2, 3))
def test_theorem_2_holds_on_samples(pair: tuple[Tensor, Tensor], power: int, log_clip: float) -> None:
    old, new = pair
    bound = bounds.lower_bound_from_moments(old, new, power, 10.0**log_clip)
    assert exact_em_distance(old, new) >= bound - SLACK * (1 + bound)


@settings(max_examples=100, deadline=None)
@given(two_samples(), st.integers(2, 6), st.floats(0.3, 3), st.floats(-1, 1))
def test_equations_4_and_5_hold_for_noisy_batchnorm_outputs(
    pair: tuple[Tensor, Tensor], power: int, spread: float, offset: float
) -> None:
    outputs, estimates, noisy = [], [], []
    for x_nd in pair:
        mean_d, variance_d = moments(x_nd)
        estimated = (mean_d + offset * variance_d.sqrt(), variance_d * spread + 1e-5)
        estimates.append(estimated)
        noisy.append(bounds.noisy_standardized_moments(mean_d, variance_d, *estimated))
        outputs.append((x_nd - estimated[0]) / estimated[1].sqrt())
    exact = exact_em_distance(*outputs)
    assert exact <= bounds.batchnorm_upper_bound(noisy[0], noisy[1]) + SLACK
    lower = bounds.batchnorm_lower_bound(*pair, estimates[0], estimates[1], power, 3.0)
    assert exact >= lower - SLACK * (1 + lower)
    assert lower == pytest.approx(bounds.lower_bound_from_moments(*outputs, power, 3.0), rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(two_samples(), st.floats(0, 1))
def test_theorems_3_1_and_3_2_hold(pair: tuple[Tensor, Tensor], alpha: float) -> None:
    old, new = pair
    assert exact_em_distance(old / norms(old), new / norms(new)) <= bounds.vanilla_bound() + SLACK
    modified = [x_nd / (alpha * norms(x_nd) + 1 - alpha) for x_nd in pair]
    bound = bounds.modified_bound(alpha, float(norms(old).mean()), float(norms(new).mean()))
    assert exact_em_distance(*modified) <= bound + SLACK * (1 + bound)


@settings(max_examples=150, deadline=None)
@given(two_samples(), st.integers(0, 2**31), st.booleans())
def test_theorem_3_3_holds(pair: tuple[Tensor, Tensor], seed: int, some_zero: bool) -> None:
    alpha_d = torch.rand(pair[0].shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if some_zero:
        alpha_d[0] = 0
    general = [x_nd / ((norms(x_nd) - 1) * alpha_d + 1) for x_nd in pair]
    bound = bounds.general_bound(alpha_d, float(norms(pair[0]).mean()), float(norms(pair[1]).mean()))
    assert exact_em_distance(*general) <= bound + SLACK * (1 + bound)


def test_batchnorm_bound_without_noise_is_2_d_plus_2() -> None:
    exact = (torch.zeros(8), torch.ones(8))
    assert bounds.batchnorm_upper_bound(exact, exact) == 18.0


def test_box_example_equals_theorem_2_on_a_fine_grid() -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    clip, power = 8.0, 3
    far, near = (clip / 2 + clip / 2 * grid)[:, None], (clip / 4 * grid)[:, None]
    expected = bounds.lower_bound_from_moments(near, far, power, clip)
    assert bounds.box_example_lower_bound(clip, 1, power) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_units", [1, 5])
def test_box_example_bounds_the_exact_distance_and_grows_without_bound(num_units: int) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(2, 64, num_units, generator=generator, dtype=torch.float64)
    distances = []
    for clip in (1.0, 10.0, 100.0, 1000.0):
        exact = exact_em_distance(clip / 2 + clip / 2 * unit[0], clip / 4 * unit[1])
        assert exact >= bounds.box_example_lower_bound(clip, num_units, 2)
        distances.append(exact)
    assert distances[-1] == pytest.approx(1000 * distances[0], rel=1e-12)
    assert bounds.box_example_lower_bound(1e6, num_units, 4) > 1e4


def test_alpha_bound_speaks_only_where_theorem_3_3_does() -> None:
    assert bounds.alpha_bound(torch.tensor([0.5, 1.0])) == 4.0
    assert bounds.alpha_bound(torch.tensor([0.0, 1.0])) is None
    assert bounds.alpha_bound(torch.tensor([-0.1, 0.4])) is None
    assert bounds.alpha_bound(torch.tensor([0.5, 1.25])) is None


def test_trained_form_can_break_2_over_alpha() -> None:
    """Eq. 10 is not bounded: why the monitor's bound is stated for Eq. 9."""
    alpha, far = 0.5, torch.tensor([[1000.0]])
    outputs = [(alpha / x.abs() + 1 - alpha) * x for x in (far, -far)]
    assert exact_em_distance(*outputs) == pytest.approx(2 * (0.5 + 500.0))
    assert exact_em_distance(*outputs) > 2 / alpha


@pytest.mark.parametrize(
    "call",
    [
        lambda: bounds.modified_bound(1.5, 1.0, 1.0),
        lambda: bounds.general_bound(torch.tensor([-0.1, 0.5]), 1.0, 1.0),
        lambda: bounds.lipschitz_moment(torch.ones(2, 2), 1, 1.0),
        lambda: bounds.box_example_lower_bound(0.0, 1, 2),
    ],
)
def test_values_outside_a_theorem_are_errors(call: object) -> None:
    with pytest.raises(ConfigError):
        call()  # type: ignore[operator]


def test_closed_form_of_shifted_gaussians() -> None:
    """W of N(0, I) and N(m, I) is |m|; the same sample shifted attains it exactly."""
    x_nd = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    assert exact_em_distance(x_nd, x_nd + shift) == pytest.approx(13.0, rel=1e-12)
    assert math.isclose(exact_em_distance(x_nd, x_nd), 0.0, abs_tol=1e-12)
