"""The four passes over x, two forward and two backward: what each computes, and which form computes it.

Axes: n samples, c channels. x is (N, C, *spatial) of any floating type and memory format; tables are float32 or wider. The
caller's work lies between the passes: the sums of the first and third pass are what ranks exchange.

- `triton_nhwc`: CUDA, channels_last (or vectors), float32, bfloat16, float16.
- `plain`: everything else; its passes over the tensor are torch's own vectorized kernels on the CPU, or Inductor's where
  the caller asks for `compiled`.
"""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unitdist.functional.unitization import GradientTables
from unitdist.kernels import plain
from unitdist.kernels.parameters import Parameters, Running, Saved
from unitdist.kernels.plain import Statistics


def moments(x: Tensor, residual: Tensor | None, compiled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First pass: reads x (and `residual`, which is added to it).

    Returns x + residual in x's type and format (x itself without a residual), its mean and centred sum of
    squares per sample and channel (N, C), and `pack_moments` of these samples (float64, 2C+1), to be summed over ranks.
    """
    if _takes_triton(x, compiled):
        return _triton_form().moments(x, residual)  # type: ignore[no-any-return]
    return plain.moments(x, residual, compiled)


def normalize(
    x: Tensor,
    mean_nc: Tensor,
    centred_nc: Tensor,
    statistics: Statistics,
    parameters: Parameters,
    compiled: bool,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second pass: reads x, writes y = weight t (x - mean) r + bias, then ReLU if asked.

    `statistics`: the packed sums of all ranks, or (mean_c, var_c). `running`: moved towards packed statistics, in the
    kernel's launch where there is one. Returns y in x's type and format, mean_c, var_c and p_k (N,).
    """
    arguments = (x, mean_nc, centred_nc, statistics, parameters)
    if _takes_triton(x, compiled):
        fused = running if running is not None and _triton_can_move(running) else None
        y, mean_c, var_c, inverse_norm_n = _triton_form().normalize(*arguments, fused)
    else:
        fused = None
        y, mean_c, var_c, inverse_norm_n = plain.normalize(*arguments, compiled)
    if running is not None and fused is None:
        assert isinstance(statistics, Tensor)
        update_running_statistics(mean_c, var_c, statistics, running)
    return y, mean_c, var_c, inverse_norm_n


def gradients(
    grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters, compiled: bool
) -> tuple[GradientTables, Any]:
    """Third pass: reads x and dy, masks dy by the recomputed ReLU. Returns the tables, and what the fourth takes."""
    if _takes_triton(x, compiled):
        return _triton_form().gradients(grad_y, x, saved, parameters)  # type: ignore[no-any-return]
    return plain.gradients(grad_y, x, saved, parameters, compiled)


def input_gradient(
    carry: Any,
    x: Tensor,
    saved: Saved,
    parameters: Parameters,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    skip_gradient: Tensor | None,
    compiled: bool,
) -> Tensor:
    """Fourth pass: reads x and dy, writes dx in x's type and format.

    `carry`: from `gradients`. `sums_2c`: (m G1, m G2) of all ranks, None where mean and variance were constants.
    `skip_gradient`: a gradient of x from elsewhere, added in the same store.
    """
    arguments = (carry, x, saved, parameters, norm_n, sums_2c, skip_gradient)
    if _takes_triton(x, compiled):
        return _triton_form().input_gradient(*arguments)  # type: ignore[no-any-return]
    return plain.input_gradient(*arguments, compiled)


def update_running_statistics(mean_c: Tensor, var_c: Tensor, packed: Tensor, running: Running) -> None:
    """Move `running` in place, alone. mean_c, var_c: (C,), biased variance, which enters unbiased.

    packed: its last number is the count; 0: mean and variance stay.
    """
    if _triton_can_move(running) and not torch.compiler.is_compiling():
        _triton_form().update_running_statistics(mean_c, var_c, packed, running)
        return
    running.batches.add_(1)
    count, dtype = packed[-1], running.mean_c.dtype
    momentum = 1.0 / running.batches.to(dtype) if running.momentum is None else running.momentum
    weight = (count > 0).to(dtype) * momentum
    unbiased_c = var_c * (count / (count - 1).clamp(min=1.0)).to(var_c.dtype)
    running.mean_c.lerp_(mean_c.to(dtype), weight)
    running.var_c.lerp_(unbiased_c.to(dtype), weight)


def _triton_can_move(running: Running) -> bool:
    return running.mean_c.is_cuda and running.mean_c.dtype == running.var_c.dtype == torch.float32


def _takes_triton(x: Tensor, compiled: bool) -> bool:
    if compiled or not x.is_cuda:
        return False
    if _triton_form().takes(x):
        return True
    if x.numel() > 0:
        _say_slow(x.dim(), x.dtype)
    return False


@cache
def _triton_form() -> ModuleType:
    return import_module("unitdist.kernels.triton_nhwc")  # the only door to triton, opened when a CUDA tensor asks


@cache
def _say_slow(dimensions: int, dtype: torch.dtype) -> None:
    warnings.warn(
        f"Unitization of a {dimensions}-axis {dtype} tensor on CUDA that is not channels_last takes the slow plain path; "
        "use model.to(memory_format=torch.channels_last)",
        stacklevel=2,
    )
