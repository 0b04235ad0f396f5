"""Equations 6, 8, 9, 10 and the table form against the literal algorithms."""

import math

import pytest
import torch
from torch import Tensor

from unitdist.functional import (
    sample_moments,
    unitization_images,
    unitization_vectors,
    unitize,
    unitize_general,
    unitize_modified,
    unitize_practical,
)
from unitdist.functional.moments import channel_moments
from unitdist.functional.unitization import gradient_tables, input_gradient_tables, sample_tables


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_vanilla_has_length_one_even_at_zero() -> None:
    x = torch.cat([random(4, 6), torch.zeros(1, 6, dtype=torch.float64)])
    torch.testing.assert_close(unitize(x).norm(dim=-1), torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_vanilla_takes_the_given_constant_at_zero() -> None:
    constant = torch.tensor([0.0, 1.0])
    assert unitize(torch.zeros(2), constant).tolist() == [0.0, 1.0]
    assert unitize(torch.tensor([3.0, 4.0]), constant).tolist() == pytest.approx([0.6, 0.8])


def test_modified_by_hand() -> None:
    x = torch.tensor([3.0, 4.0])
    assert unitize_modified(x, 0.0).tolist() == [3.0, 4.0]
    assert unitize_modified(x, 0.25).tolist() == pytest.approx([1.5, 2.0])
    assert unitize_modified(torch.zeros(4), 1.0).tolist() == [0.5] * 4
    assert unitize_modified(torch.zeros(4), 0.5).tolist() == [0.0] * 4


def test_general_is_the_matrix_formula() -> None:
    x, alpha = random(7), torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    matrix = (x.norm() - 1) * torch.diag(alpha) + torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(unitize_general(x, alpha), torch.linalg.solve(matrix, x), rtol=1e-13, atol=1e-14)
    assert unitize_general(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 0.0, 0.0]


def test_general_with_equal_alphas_is_modified() -> None:
    x = random(5, 4)
    torch.testing.assert_close(unitize_general(x, torch.full((4,), 0.3)), unitize_modified(x, 0.3))


def test_practical_approaches_general_at_alpha_one_and_is_identity_at_zero() -> None:
    x = random(5, 4)
    torch.testing.assert_close(unitize_practical(x, torch.ones(4), eps=1e-30), unitize(x))
    torch.testing.assert_close(unitize_practical(x, torch.zeros(4)), x, rtol=0, atol=0)


@pytest.mark.parametrize("form", [unitize, unitize_modified, unitize_general, unitize_practical])
def test_gradients_are_finite_at_zero(form: object) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    arguments = {unitize: (), unitize_modified: (1.0,)}.get(form, (torch.tensor([0.0, 0.5, 1.0]),))
    form(x, *arguments).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_algorithm_1_is_eq_10_of_the_batch_normalized_vector() -> None:
    x, weight, bias, alpha = random(6, 4), random(4, seed=1), random(4, seed=2), random(4, seed=3)
    normalized = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)
    torch.testing.assert_close(
        unitization_vectors(x, weight, bias, alpha), weight * unitize_practical(normalized, alpha) + bias
    )


def test_algorithm_2_by_hand() -> None:
    x = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]], dtype=torch.float64)  # mean 4, variance 5
    one = torch.ones(1, dtype=torch.float64)
    y = unitization_images(x, one, 0 * one, 0.5 * one, norm_divisor=2, eps=0.0)
    norm = math.sqrt((9 / 5 + 1 / 5) / (2 * 2))
    wanted = [v / math.sqrt(5) * (0.5 / norm + 0.5) for v in (-3, -1, 1, 3)]
    assert y.flatten().tolist() == pytest.approx(wanted, rel=1e-14)


def test_pixel_scope_is_eq_10_at_every_pixel() -> None:
    x, alpha = random(3, 4, 2, 5), random(4, seed=1)
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    y = unitization_images(x, one, zero, alpha, norm_divisor=1, norm_scope="pixel", mean_c=zero, var_c=one, eps=1e-30)
    torch.testing.assert_close(y, unitize_practical(x.movedim(1, -1), alpha, eps=1e-30).movedim(-1, 1))


@pytest.mark.parametrize("constant_statistics", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 3, 7), (1, 4, 2, 2), (6, 4)])
def test_tables_give_the_literal_output_and_gradients(shape: tuple[int, ...], constant_statistics: bool) -> None:
    x = random(*shape).requires_grad_()
    parameters = [random(4, seed=s).requires_grad_() for s in (1, 2, 3)]
    weight, bias, alpha = parameters
    given = (random(4, seed=4), random(4, seed=5).square()) if constant_statistics else (None, None)
    y = unitization_images(x, weight, bias, alpha, norm_divisor=6, mean_c=given[0], var_c=given[1])
    grad_y = random(*shape, seed=6)
    wanted = torch.autograd.grad(y, [x, *parameters], grad_y)

    with torch.no_grad():
        pixels = x[0, 0].numel()
        space, column = (-1,) + (1,) * (x.dim() - 2), tuple(range(2, x.dim()))
        mean_nc, centred_nc = sample_moments(x)
        mean_c, centred_c = channel_moments(mean_nc, centred_nc, pixels)
        var_c = centred_c / (shape[0] * pixels)
        if constant_statistics:
            mean_c, var_c = given
        tables = sample_tables(mean_nc, centred_nc, mean_c, var_c, weight, alpha, 6, pixels, 1e-5)
        deviation = x - mean_c.view(space)
        scale = tables.scale_nc.view(*shape[:2], *space[1:])
        torch.testing.assert_close(scale * deviation + bias.view(space), y, rtol=0, atol=1e-13)
        dot = grad_y * deviation
        sums = (grad_y.sum(column), dot.sum(column)) if column else (grad_y, dot)
        gradients = gradient_tables(*sums, tables, mean_nc, mean_c, weight, alpha, 6, pixels)
        sums_2c = None if constant_statistics else gradients.sums_2c
        slope, offset = input_gradient_tables(tables, gradients.norm_n, sums_2c, shape[0] * pixels, mean_c)
        grad_x = scale * grad_y + slope.view(scale.shape) * deviation + offset.view(space)
    got = (grad_x, gradients.weight_c, gradients.bias_c, gradients.alpha_c)
    for name, have, want in zip(("x", "weight", "bias", "alpha"), got, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"d{name}: {text}")
