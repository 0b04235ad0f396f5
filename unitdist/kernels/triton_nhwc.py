"""The four passes in Triton, channels_last: launching. The kernels are in triton_forward.py and triton_backward.py.

x (N, C, H, W) in channels_last lies in memory as (N, P, C), P pixels; vectors (N, C) are P = 1. Reads and writes are
float32, bfloat16 or float16, all arithmetic and all tables float32, sums for other ranks float64. Launches: forward
moments, merge, normalize (which moves the running statistics); backward gradients, merge, input gradient. Nothing is
read back to the host and no shape depends on data, so that a step can be captured in a CUDA graph. Each function is
specified in `unitdist.kernels.passes`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unitdist.functional.moments import pixels_of
from unitdist.functional.unitization import GradientTables
from unitdist.kernels import triton_backward, triton_forward
from unitdist.kernels.parameters import Parameters, Running, Saved
from unitdist.kernels.plain import Statistics

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096  # elements a program holds at a time: 32 per thread of four warps
_BLOCK_C = 64  # channels of a tile: 128 bytes of a 16-bit row
_MERGE_TILE = 8192  # elements of a table that a merging program of eight warps holds at a time
_MERGE_C = 16  # channels of it: 64 bytes of a float32 row, and twice the programs that 32 would give
_MERGE_WARPS = 8
_PROGRAMS = 528  # enough to fill the 132 processors of an H200 four times
_MAX_OFFSET = 2**31  # offsets within a sample are 32-bit, from a 64-bit base per sample


class _Plan(NamedTuple):
    """How the work on one shape is cut up."""

    samples: int
    pixels: int
    channels: int
    block_c: int
    block_p: int
    c_blocks: int
    splits: int
    """Ranges of pixels per sample, of the passes that sum over them."""
    split_pixels: int
    blocks: int
    """Ranges of pixels per sample, of the passes that write."""
    block_pixels: int
    row: int
    """Channels of a table's row that a program holds at a time."""
    merge_n: int
    """Samples, ranges and channels of a tile of the merging kernels."""
    merge_s: int
    merge_c: int
    weighted: int
    """Partial sums per sample of the backward pass, and the next power of two."""
    weighted_block: int


def takes(x: Tensor) -> bool:
    """Whether these kernels can work on x: a supported type, channels_last or vectors, not empty, a sample below 2^31."""
    dense = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.dim() == 2 and x.is_contiguous()
    return dense and x.dtype in _DTYPES and 0 < x.numel() < _MAX_OFFSET * x.shape[0]


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
        triton_forward.merge_moments_kernel[(triton.cdiv(plan.channels, plan.merge_c),)](
            parts[0], parts[1], mean_nc, centred_nc, packed, plan.samples, plan.channels, plan.pixels,
            plan.split_pixels, plan.splits, plan.samples * plan.pixels, BLOCK_N=plan.merge_n,
            BLOCK_S=plan.merge_s, BLOCK_C=plan.merge_c, num_warps=_MERGE_WARPS,
        )  # fmt: skip
    return total, mean_nc, centred_nc, packed


def normalize(
    x: Tensor,
    mean_nc: Tensor,
    centred_nc: Tensor,
    statistics: Statistics,
    parameters: Parameters,
    running: Running | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `passes.normalize`; running statistics are float32."""
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
    moved = Running(mean_c, var_c, norm_divisor, None) if running is None else running  # None: not touched
    with _on_device(x):
        triton_forward.normalize_kernel[(plan.samples, plan.blocks)](
            x, y, mean_nc, centred_nc, packed, mean_c, var_c, weight_c, bias_c, alpha_c, norm_divisor, inverse_norm_n,
            moved.mean_c, moved.var_c, moved.batches, float(moved.momentum or 0), eps, plan.channels, plan.pixels,
            plan.block_pixels, FROM_PACKED=from_packed, UPDATE=running is not None, AVERAGE=moved.momentum is None,
            RELU=relu, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, BLOCK_ROW=plan.row,
        )  # fmt: skip
    return y, mean_c, var_c, inverse_norm_n


def gradients(grad_y: Tensor, x: Tensor, saved: Saved, parameters: Parameters) -> tuple[GradientTables, Any]:
    """See `passes.gradients`. Carries grad_y in x's memory format; it is masked again where it is read."""
    plan = _plan(x)
    weight_c, bias_c, alpha_c, norm_divisor, eps, relu = parameters
    grad_y = _like(grad_y, x)
    parts = x.new_empty((2, plan.samples, plan.splits, plan.channels), dtype=torch.float32)
    weighted = x.new_empty((plan.samples, plan.weighted), dtype=torch.float32)
    norm_n = x.new_empty(plan.samples, dtype=torch.float32)
    grad_weight_c, grad_bias_c, grad_alpha_c = _tables(x, 3, plan.channels)
    sums_2c = x.new_empty(2 * plan.channels, dtype=torch.float32)
    with _on_device(x):
        triton_backward.gradients_kernel[(plan.samples, plan.c_blocks, plan.splits)](
            grad_y, x, saved.mean_c, saved.var_c, weight_c, bias_c, alpha_c, saved.inverse_norm_n, parts[0], parts[1],
            weighted, eps, plan.channels, plan.pixels, plan.split_pixels, plan.splits, plan.c_blocks,
            RELU=relu, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c,
        )  # fmt: skip
        triton_backward.merge_gradients_kernel[(triton.cdiv(plan.channels, plan.merge_c),)](
            parts[0], parts[1], weighted, saved.mean_nc, saved.centred_nc, saved.mean_c, saved.var_c, weight_c, alpha_c,
            saved.inverse_norm_n, norm_divisor, norm_n, grad_weight_c, grad_bias_c, grad_alpha_c, sums_2c, eps,
            plan.samples, plan.channels, plan.pixels, plan.splits, plan.weighted, BLOCK_N=plan.merge_n,
            BLOCK_S=plan.merge_s, BLOCK_C=plan.merge_c, num_warps=_MERGE_WARPS, BLOCK_W=plan.weighted_block,
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
    with _on_device(x):
        triton_backward.input_gradient_kernel[(plan.samples, plan.blocks, plan.c_blocks)](
            carry, x, skip, grad_x, saved.mean_c, saved.var_c, weight_c, bias_c, alpha_c, saved.inverse_norm_n, norm_n,
            norm_n if sums_2c is None else sums_2c, saved.packed if sums_2c is not None else norm_n, eps,
            plan.channels, plan.pixels, plan.block_pixels, BATCH_STATISTICS=sums_2c is not None,
            HAS_SKIP=skip_gradient is not None, RELU=relu, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c,
        )  # fmt: skip
    return grad_x


def update_running_statistics(mean_c: Tensor, var_c: Tensor, packed: Tensor, running: Running) -> None:
    """See `passes.update_running_statistics`; running statistics are float32."""
    with _on_device(mean_c):
        triton_forward.update_running_kernel[(1,)](
            mean_c, var_c, packed, running.mean_c, running.var_c, running.batches, float(running.momentum or 0),
            mean_c.numel(), AVERAGE=running.momentum is None, BLOCK=1024,
        )  # fmt: skip


def _tables(x: Tensor, count: int, *shape: int) -> list[Tensor]:
    """So many float32 tables, each with a memory of its own: an operator's results must not share one."""
    return [x.new_empty(shape, dtype=torch.float32) for _ in range(count)]


def _plan(x: Tensor) -> _Plan:
    return _cut(x.shape[0], x.shape[1], pixels_of(x))


@lru_cache(maxsize=4096)  # per shape, and the host has four plans to make per layer and step
def _cut(samples: int, channels: int, pixels: int) -> _Plan:
    block_c = min(triton.next_power_of_2(channels), _BLOCK_C)
    block_p = min(triton.next_power_of_2(pixels), _TILE // block_c, 256)
    c_blocks = triton.cdiv(channels, block_c)
    # Small batches of large maps do not fill the device by samples and channels alone: split their pixels.
    wanted = max(1, min(triton.cdiv(_PROGRAMS, samples * c_blocks), triton.cdiv(pixels, 2 * block_p), 32))
    split_pixels = triton.cdiv(triton.cdiv(pixels, wanted), block_p) * block_p
    splits = triton.cdiv(pixels, split_pixels)
    # 65536 elements per program that writes, fewer where that would leave processors idle.
    elements = 65536 if samples * pixels * channels >= 65536 * 2 * _PROGRAMS else 16384
    block_pixels = max(triton.cdiv(triton.cdiv(elements, channels), block_p), 1) * block_p
    merge_s, merge_c = triton.next_power_of_2(splits), min(triton.next_power_of_2(channels), _MERGE_C)
    return _Plan(
        samples=samples,
        pixels=pixels,
        channels=channels,
        block_c=block_c,
        block_p=block_p,
        c_blocks=c_blocks,
        splits=splits,
        split_pixels=split_pixels,
        blocks=triton.cdiv(pixels, block_pixels),
        block_pixels=block_pixels,
        row=min(triton.next_power_of_2(channels), 2048),
        merge_n=min(triton.next_power_of_2(samples), _MERGE_TILE // (merge_s * merge_c)),
        merge_s=merge_s,
        merge_c=merge_c,
        weighted=splits * c_blocks,
        weighted_block=triton.next_power_of_2(splits * c_blocks),
    )


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
