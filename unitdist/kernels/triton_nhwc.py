"""The four passes in Triton, channels_last: launching. The kernels are in triton_forward.py and triton_backward.py.

x (N, C, H, W) in channels_last lies in memory as (N, P, C), P pixels; vectors (N, C) are P = 1. Reads and writes are
float32, bfloat16 or float16, all arithmetic and all tables float32, sums for other ranks float64. Launches: forward
moments, merge, normalize; backward gradients, merge, input gradient; and one for the running statistics. Nothing is
read back to the host and no shape depends on data, so that a step can be captured in a CUDA graph. Each function is
specified in `unitdist.kernels.passes`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unitdist.functional.moments import pixels_of
from unitdist.functional.unitization import GradientTables
from unitdist.kernels import triton_backward, triton_forward
from unitdist.kernels.parameters import Parameters, Saved
from unitdist.kernels.plain import Statistics

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096  # elements a program holds at a time: 32 per thread of four warps
_BLOCK_C = 64  # channels of a tile: 128 bytes of a 16-bit row
_PROGRAMS = 528  # enough to fill the 132 processors of an H200 four times
_MAX_OFFSET = 2**31  # offsets within a sample are 32-bit, from a 64-bit base per sample


class _Plan(NamedTuple):
    samples: int
    pixels: int
    channels: int
    block_c: int
    block_p: int
    c_blocks: int
    splits: int
    split_pixels: int


def takes(x: Tensor) -> bool:
    """Whether these kernels can work on x: a supported type, channels_last or vectors, not empty, a sample below 2^31."""
    dense = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.dim() == 2 and x.is_contiguous()
    return dense and x.dtype in _DTYPES and x.numel() > 0 and x[0].numel() < _MAX_OFFSET


def moments(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.moments`. The sum with the residual is rounded to x's type before it is measured."""
    plan = _plan(x)
    total = x if residual is None else torch.empty_like(x)
    addend = x if residual is None else _like(residual, x)
    parts = x.new_empty((2, plan.samples, plan.splits, plan.channels), dtype=torch.float32)
    mean_nc, centred_nc = _tables(x, 2, plan.samples, plan.channels)
    packed = x.new_empty(2 * plan.channels + 1, dtype=torch.float64)
    with _on_device(x):
        triton_forward.moments_kernel[(plan.samples, plan.c_blocks, plan.splits)](
            x, addend, total, parts[0], parts[1], plan.channels, plan.pixels, plan.split_pixels, plan.splits,
            HAS_RESIDUAL=residual is not None, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c,
        )  # fmt: skip
        block_n, block_c = _merge_block(plan)
        triton_forward.merge_moments_kernel[(triton.cdiv(plan.channels, block_c),)](
            parts[0], parts[1], mean_nc, centred_nc, packed, plan.samples, plan.channels, plan.pixels,
            plan.split_pixels, plan.splits, plan.samples * plan.pixels, BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
    return total, mean_nc, centred_nc, packed


def normalize(
    x: Tensor, mean_nc: Tensor, centred_nc: Tensor, statistics: Statistics, parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.normalize`."""
    plan = _plan(x)
    weight_c, bias_c, alpha_c, norm_divisor, eps, relu = parameters
    from_packed = isinstance(statistics, Tensor)
    if isinstance(statistics, Tensor):
        packed = statistics
        mean_c, var_c = _tables(x, 2, plan.channels)
    else:
        mean_c, var_c = statistics
        packed = mean_c
    y, inverse_norm_n = torch.empty_like(x), x.new_empty(plan.samples, dtype=torch.float32)
    blocks, block_pixels = _pixel_blocks(plan)
    with _on_device(x):
        triton_forward.normalize_kernel[(plan.samples, blocks)](
            x, y, mean_nc, centred_nc, packed, mean_c, var_c, weight_c, bias_c, alpha_c, norm_divisor, inverse_norm_n,
            eps, plan.channels, plan.pixels, block_pixels, FROM_PACKED=from_packed, RELU=relu, BLOCK_P=plan.block_p,
            BLOCK_C=plan.block_c, BLOCK_ROW=min(triton.next_power_of_2(plan.channels), 2048),
        )  # fmt: skip
    return y, mean_c, var_c, inverse_norm_n


def gradients(grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters) -> tuple[GradientTables, Any]:
    """See `passes.gradients`. Carries grad_y in x's memory format; it is masked again where it is read."""
    plan = _plan(x)
    weight_c, bias_c, alpha_c, norm_divisor, eps, relu = parameters
    grad_y = _like(grad_y, x)
    parts = x.new_empty((2, plan.samples, plan.splits, plan.channels), dtype=torch.float32)
    weighted = x.new_empty((plan.samples, plan.splits * plan.c_blocks), dtype=torch.float32)
    norm_n = x.new_empty(plan.samples, dtype=torch.float32)
    grad_weight_c, grad_bias_c, grad_alpha_c = _tables(x, 3, plan.channels)
    sums_2c = x.new_empty(2 * plan.channels, dtype=torch.float32)
    with _on_device(x):
        triton_backward.gradients_kernel[(plan.samples, plan.c_blocks, plan.splits)](
            grad_y, x, saved.mean_c, saved.var_c, weight_c, bias_c, alpha_c, saved.inverse_norm_n, parts[0], parts[1],
            weighted, eps, plan.channels, plan.pixels, plan.split_pixels, plan.splits, plan.c_blocks,
            RELU=relu, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c,
        )  # fmt: skip
        block_n, block_c = _merge_block(plan)
        triton_backward.merge_gradients_kernel[(triton.cdiv(plan.channels, block_c),)](
            parts[0], parts[1], weighted, saved.mean_nc, saved.centred_nc, saved.mean_c, saved.var_c, weight_c, alpha_c,
            saved.inverse_norm_n, norm_divisor, norm_n, grad_weight_c, grad_bias_c, grad_alpha_c, sums_2c, eps,
            plan.samples, plan.channels, plan.pixels, plan.splits, plan.splits * plan.c_blocks, BLOCK_N=block_n, BLOCK_C=block_c,
            BLOCK_W=triton.next_power_of_2(plan.splits * plan.c_blocks),
        )  # fmt: skip
    return GradientTables(grad_weight_c, grad_bias_c, grad_alpha_c, norm_n, sums_2c), grad_y


def input_gradient(
    carry: Any,
    x: Tensor,
    saved: Saved,
    parameters: Parameters,
    norm_n: Tensor,
    sums_2c: Tensor | None,
    skip_gradient: Tensor | None,
) -> Tensor:
    """See `passes.input_gradient`."""
    plan = _plan(x)
    weight_c, bias_c, alpha_c, _, eps, relu = parameters
    grad_x = torch.empty_like(x)
    skip = x if skip_gradient is None else _like(skip_gradient, x)
    blocks, block_pixels = _pixel_blocks(plan)
    with _on_device(x):
        triton_backward.input_gradient_kernel[(plan.samples, blocks, plan.c_blocks)](
            carry, x, skip, grad_x, saved.mean_c, saved.var_c, weight_c, bias_c, alpha_c, saved.inverse_norm_n, norm_n,
            norm_n if sums_2c is None else sums_2c, saved.packed if sums_2c is not None else norm_n, eps,
            plan.channels, plan.pixels, block_pixels, BATCH_STATISTICS=sums_2c is not None,
            HAS_SKIP=skip_gradient is not None, RELU=relu, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c,
        )  # fmt: skip
    return grad_x


def update_running_statistics(
    mean_c: Tensor, var_c: Tensor, packed: Tensor, running_mean: Tensor, running_var: Tensor, num_batches: Tensor,
    momentum: float | None,
) -> None:  # fmt: skip
    """running += weight * (batch - running), in place, in one launch; weight is `momentum`, or 1/batches if None.

    The variance enters unbiased. float32 statistics. Where the packed count is 0 they stay.
    """
    with _on_device(mean_c):
        triton_forward.update_running_kernel[(1,)](
            mean_c, var_c, packed, running_mean, running_var, num_batches, 0.0 if momentum is None else momentum,
            mean_c.numel(), AVERAGE=momentum is None, BLOCK=1024,
        )  # fmt: skip


def _tables(x: Tensor, count: int, *shape: int) -> list[Tensor]:
    """So many float32 tables, each with a memory of its own: an operator's results must not share one."""
    return [x.new_empty(shape, dtype=torch.float32) for _ in range(count)]


def _plan(x: Tensor) -> _Plan:
    samples, channels, pixels = x.shape[0], x.shape[1], pixels_of(x)
    block_c = min(triton.next_power_of_2(channels), _BLOCK_C)
    block_p = min(triton.next_power_of_2(pixels), _TILE // block_c, 256)
    c_blocks = triton.cdiv(channels, block_c)
    # Small batches of large maps do not fill the device by samples and channels alone: split their pixels.
    splits = max(1, min(triton.cdiv(_PROGRAMS, samples * c_blocks), triton.cdiv(pixels, 2 * block_p), 32))
    split_pixels = triton.cdiv(triton.cdiv(pixels, splits), block_p) * block_p
    return _Plan(samples, pixels, channels, block_c, block_p, c_blocks, triton.cdiv(pixels, split_pixels), split_pixels)


def _merge_block(plan: _Plan) -> tuple[int, int]:
    block_c = min(triton.next_power_of_2(plan.channels), 32)
    return min(triton.next_power_of_2(plan.samples), 32), block_c


def _pixel_blocks(plan: _Plan) -> tuple[int, int]:
    """Programs per sample and pixels of each: 65536 elements, fewer where that would leave processors idle."""
    elements = 65536 if plan.samples * plan.pixels * plan.channels >= 65536 * 2 * _PROGRAMS else 16384
    pixels = max(triton.cdiv(triton.cdiv(elements, plan.channels), plan.block_p), 1) * plan.block_p
    return triton.cdiv(plan.pixels, pixels), pixels


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in x's type and memory format. A dense tensor of the other format costs a copy, which is said once.

    An expanded tensor (the gradient of a mean) has to be written out anyway.
    """
    if tensor.dtype != x.dtype:
        tensor = tensor.to(x.dtype)
    memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    if tensor.is_contiguous() and not tensor.is_contiguous(memory_format=memory_format):
        _say_copied()
    return tensor.contiguous(memory_format=memory_format)


@cache
def _say_copied() -> None:
    warnings.warn(
        "the gradient or residual that meets a channels_last Unitization is contiguous and is copied at every step; keep the "
        "modules around it channels_last too (model.to(memory_format=torch.channels_last))",
        stacklevel=3,
    )


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
