"""The four passes on CPU without a compiler, made of torch's own vectorized batch and layer norm kernels.

torch's kernels for batch normalization compute per channel what Unitization needs per sample and channel. A
contiguous (N, C, H, W) tensor is therefore viewed as (1, N*C, H, W); a channels_last one is taken sample by sample. That
reads 16-bit input without a float32 copy of it and keeps tables float32. Dense tensors of 4 axes only.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten
_NO_EPS = 0.0


def takes(x: Tensor) -> bool:
    """Whether these passes can work on x: on the CPU, 4 axes, dense in either memory format, not empty."""
    return x.is_cpu and x.dim() == 4 and x.numel() > 0 and (_is_nhwc(x) or x.is_contiguous())


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `passes.sample_moments`. channels_last: batch norm's statistics. contiguous: layer norm's, which also
    writes an output that nobody reads, and still takes a third of the time."""
    samples, channels, height, width = x.shape
    pixels = height * width
    dtype = _statistics_dtype(x)
    if _is_nhwc(x):
        unread = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
        moments = [torch.batch_norm_update_stats(sample, *unread, 0.0) for sample in torch.split(x, 1)]
        mean_nc = torch.stack([mean_c for mean_c, _ in moments])
        return mean_nc, torch.stack([var_c for _, var_c in moments]).mul_(pixels)
    ones, zeros = x.new_ones(pixels, dtype=dtype), x.new_zeros(pixels, dtype=dtype)
    _, mean, inverse_std = torch.native_layer_norm(x.view(-1, pixels), (pixels,), ones, zeros, _NO_EPS)
    centred = inverse_std.square_().reciprocal_().mul_(pixels)  # 1/std of a constant sample is inf: variance 0
    return mean.view(samples, channels), centred.view(samples, channels)


def scale_shift(x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool) -> Tensor:
    """As `passes.scale_shift`. float32: y = shift + scale * x, whose rounding grows with |mean|/std as batch norm's does."""
    if _is_nhwc(x) and x.dtype == scale_nc.dtype:
        shift_nc = bias_c - scale_nc * mean_c
        y = torch.addcmul(_column(shift_nc), x, _column(scale_nc))
    else:
        y = _normalize(x, mean_c.expand_as(scale_nc), scale_nc, bias_c.expand_as(scale_nc))
    return torch.relu_(y) if relu else y


def _normalize(x: Tensor, mean_nc: Tensor, scale_nc: Tensor, bias_nc: Tensor) -> Tensor:
    """scale_nc * (x - mean_nc) + bias_nc by batch norm's evaluation kernel, in x's type and format."""
    y, unread = torch.empty_like(x), scale_nc.new_empty(0)  # no view: in-place ReLUs may follow
    if not _is_nhwc(x):
        tables = [table.reshape(-1) for table in (scale_nc, bias_nc, mean_nc)]
        ones = torch.ones_like(tables[0])
        _aten.native_batch_norm.out(
            _flat(x), *tables, ones, False, 0.0, _NO_EPS, out=_flat(y), save_mean=unread, save_invstd=unread
        )
        return y
    ones = torch.ones_like(scale_nc[0])
    for n, (sample, result) in enumerate(zip(torch.split(x, 1), torch.split(y, 1), strict=True)):
        _aten.native_batch_norm.out(
            sample,
            scale_nc[n],
            bias_nc[n],
            mean_nc[n],
            ones,
            False,
            0.0,
            _NO_EPS,
            out=result,
            save_mean=unread,
            save_invstd=unread,
        )
    return y


def gradient_sums(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, bias_c: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `passes.gradient_sums`; the third result is the masked gradient, made once for this pass and the next."""
    nhwc = _is_nhwc(x)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    if relu:
        grad_y = _aten.threshold_backward(grad_y, scale_shift(x, mean_c, scale_nc, bias_c, False), 0)
    if nhwc:
        ones = torch.ones_like(mean_c)
        pairs = [
            _sums(g, sample, mean_c, ones) for g, sample in zip(torch.split(grad_y, 1), torch.split(x, 1), strict=True)
        ]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs]), grad_y
    mean = mean_c.expand_as(scale_nc).reshape(-1)
    grad_sum, grad_dot = _sums(_flat(grad_y), _flat(x), mean, torch.ones_like(mean))
    return grad_sum.view_as(scale_nc), grad_dot.view_as(scale_nc), grad_y


def _sums(grad: Tensor, x: Tensor, mean_c: Tensor, ones_c: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel of one sample, the sums of g and g * (x - mean): batch norm's gradients of bias and weight."""
    _, grad_dot_c, grad_sum_c = _aten.native_batch_norm_backward(
        grad, x, ones_c, None, None, mean_c, ones_c, True, _NO_EPS, [False, True, True]
    )
    return grad_sum_c, grad_dot_c


def input_gradient(
    grad_y: Tensor, x: Tensor, mean_c: Tensor, scale_nc: Tensor, slope_nc: Tensor, offset_c: Tensor
) -> Tensor:
    """As `passes.input_gradient`. 16-bit input goes through a float32 temporary of one sample's size."""
    offset_nc = offset_c - slope_nc * mean_c
    if x.dtype == scale_nc.dtype and _is_nhwc(x):
        return torch.addcmul(_column(offset_nc), x, _column(slope_nc)).addcmul_(grad_y, _column(scale_nc))
    if x.dtype == scale_nc.dtype:
        zeros_nc = torch.zeros_like(scale_nc)
        grad_x = _normalize(x, mean_c.expand_as(scale_nc), slope_nc, offset_c.expand_as(scale_nc))
        return grad_x.add_(_normalize(grad_y, zeros_nc, scale_nc, zeros_nc))
    grad_x = torch.empty_like(x)
    offset, slope, scale = _column(offset_nc), _column(slope_nc), _column(scale_nc)
    for n in range(x.shape[0]):
        wide = torch.addcmul(offset[n], x[n].to(scale.dtype), slope[n])
        grad_x[n].copy_(wide.addcmul_(grad_y[n].to(scale.dtype), scale[n]))
    return grad_x


def _column(table_nc: Tensor) -> Tensor:
    return table_nc[:, :, None, None]


def _flat(x: Tensor) -> Tensor:
    return x.view(1, -1, *x.shape[2:])


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
