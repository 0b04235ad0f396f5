"""The four passes as (N, C) tables of `unitdist.functional` between four passes over the tensor.

The tensor passes are `compiled`'s where they are asked for, else `cpu`'s where they can take x, else `generic`'s, which
take anything. Each function is specified in `unitdist.kernels.passes`.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

from unitdist.functional.moments import channel_moments, pack_moments, pixels_of, unpack_moments
from unitdist.functional.unitization import (
    GradientTables,
    SampleTables,
    gradient_tables,
    input_gradient_tables,
    sample_tables,
)
from unitdist.kernels import compiled as compiled_form
from unitdist.kernels import cpu, generic
from unitdist.kernels.parameters import Parameters, Saved

Statistics = Tensor | tuple[Tensor, Tensor]


def moments(x: Tensor, residual: Tensor | None, compiled: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.moments`."""
    total = x if residual is None else x + residual
    mean_nc, centred_nc = _tensor_passes(total, compiled).sample_moments(total)
    return total, mean_nc, centred_nc, pack(mean_nc, centred_nc, pixels_of(x))


def pack(mean_nc: Tensor, centred_nc: Tensor, pixels: int) -> Tensor:
    """These samples' share of the batch statistics, as 2C+1 float64 numbers that add up over ranks."""
    return pack_moments(*channel_moments(mean_nc, centred_nc, pixels), mean_nc.shape[0] * pixels)


def normalize(
    x: Tensor,
    mean_nc: Tensor,
    centred_nc: Tensor,
    statistics: Statistics,
    parameters: Parameters,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.normalize`."""
    mean_c, var_c, tables = tables_of(mean_nc, centred_nc, statistics, parameters, pixels_of(x))
    y = _tensor_passes(x, compiled).scale_shift(x, mean_c, tables.scale_nc, parameters.bias_c, parameters.relu)
    return y, mean_c, var_c, tables.inverse_norm_n.squeeze(1)


def tables_of(
    mean_nc: Tensor, centred_nc: Tensor, statistics: Statistics, parameters: Parameters, pixels: int
) -> tuple[Tensor, Tensor, SampleTables]:
    """Mean and variance from packed sums or as given, and the forward tables that follow from them."""
    if isinstance(statistics, Tensor):
        mean_c, var_c, _ = unpack_moments(statistics, mean_nc.dtype)
    else:
        mean_c, var_c = statistics
    weight_c, _, alpha_c, norm_divisor, eps, _ = parameters
    return (
        mean_c,
        var_c,
        sample_tables(mean_nc, centred_nc, mean_c, var_c, weight_c, alpha_c, norm_divisor, pixels, eps),
    )


def saved_tables(saved: Saved, parameters: Parameters, pixels: int) -> SampleTables:
    """The forward tables again, in backward."""
    return sample_tables(
        saved.mean_nc,
        saved.centred_nc,
        saved.mean_c,
        saved.var_c,
        parameters.weight_c,
        parameters.alpha_c,
        parameters.norm_divisor,
        pixels,
        parameters.eps,
        saved.inverse_norm_n.unsqueeze(1),
    )


def gradients(
    grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters, compiled: bool = False
) -> tuple[GradientTables, Any]:
    """See `passes.gradients`. Carries what the tensor pass carries and the forward tables to `input_gradient`."""
    weight_c, bias_c, alpha_c, norm_divisor, eps, relu = parameters
    pixels = pixels_of(x)
    tables = saved_tables(saved, parameters, pixels)
    grad_sum_nc, grad_dot_nc, carried = _tensor_passes(x, compiled).gradient_sums(
        grad_y, x, saved.mean_c, tables.scale_nc, bias_c, relu
    )
    gradient = gradient_tables(
        grad_sum_nc, grad_dot_nc, tables, saved.mean_nc, saved.mean_c, weight_c, alpha_c, norm_divisor, pixels
    )
    return gradient, (carried, tables)


def input_gradient(
    carry: Any,
    x: Tensor,
    saved: Saved,
    parameters: Parameters,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    skip_gradient: Tensor | None,
    compiled: bool = False,
) -> Tensor:
    """See `passes.input_gradient`."""
    carried, tables = carry
    count = None if sums_2c is None else saved.packed[-1].clamp(min=1.0).to(sums_2c.dtype)
    slope_nc, offset_c = input_gradient_tables(tables, norm_n, sums_2c, count, saved.mean_c)
    tensor_passes = _tensor_passes(x, compiled)
    grad_x: Tensor = tensor_passes.input_gradient(carried, x, saved.mean_c, tables.scale_nc, slope_nc, offset_c)
    return grad_x if skip_gradient is None else grad_x.add_(skip_gradient)


def _tensor_passes(x: Tensor, compiled: bool) -> ModuleType:
    if compiled and compiled_form.takes(x):
        return compiled_form
    return cpu if cpu.takes(x) else generic
