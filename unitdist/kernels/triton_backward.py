"""Triton kernels of the backward pass, channels_last: gradient sums, their merge, the gradient of x.

Memory: x and dy are (N, P, C) contiguous, N samples, P pixels, C channels. Letters in brackets: unitdist/functional/README.md. The
ReLU's mask is recomputed from x, rounded to x's type as forward rounded it: nothing but x and tables is kept.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

from unitdist.kernels.triton_forward import affine_scale


@triton.jit
def masked_gradient(grad, deviation, scale, bias, DTYPE: tl.constexpr, RELU: tl.constexpr):
    """dy where the forward output was positive, else 0; all of dy without a ReLU."""
    if RELU:
        y = scale[None, :] * deviation + bias[None, :]
        return tl.where(y.to(DTYPE).to(tl.float32) > 0.0, grad, 0.0)
    else:
        return grad


@triton.jit
def gradients_kernel(
    grad_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, alpha_ptr, inverse_norm_ptr, sum_ptr, dot_ptr,
    weighted_ptr, eps, channels, pixels, split_pixels, splits, c_blocks,
    RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dy and dy (x - mean) of one sample's block of channels over one range of pixels.

    Writes (N, splits, C) of both, and (N, splits * c_blocks) of weight alpha r times the second, summed over the block's
    channels: its row sum is sum over c of weight alpha E_kc, which the sample's norm needs.
    """
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2)
    inside_c = channel < channels
    mean = tl.load(mean_ptr + channel, mask=inside_c, other=0.0)
    var = tl.load(var_ptr + channel, mask=inside_c, other=1.0)
    weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0)
    alpha = tl.load(alpha_ptr + channel, mask=inside_c, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside_c, other=0.0)
    scale = affine_scale(weight, alpha, var, tl.load(inverse_norm_ptr + sample), eps)
    start = split * split_pixels
    stop = tl.minimum(start + split_pixels, pixels)
    base = sample * pixels * channels
    grad_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    grad_dot = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & inside_c[None, :]
        offset = base + (pixel[:, None] * channels + channel[None, :])
        deviation = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad = masked_gradient(grad, deviation, scale, bias, x_ptr.dtype.element_ty, RELU)
        grad_sum += grad
        grad_dot += grad * deviation
    sum_c = tl.sum(grad_sum, 0)
    dot_c = tl.sum(grad_dot, 0)
    row = (sample * splits + split) * channels + channel
    tl.store(sum_ptr + row, sum_c, mask=inside_c)
    tl.store(dot_ptr + row, dot_c, mask=inside_c)
    weighted = tl.sum(tl.where(inside_c, weight * alpha * dot_c / tl.sqrt(var + eps), 0.0), 0)
    tl.store(weighted_ptr + (sample * splits + split) * c_blocks + tl.program_id(1), weighted)


@triton.jit
def merge_gradients_kernel(
    part_sum_ptr, part_dot_ptr, weighted_ptr, mean_nc_ptr, centred_nc_ptr, mean_ptr, var_ptr, weight_ptr, alpha_ptr,
    inverse_norm_ptr, divisor_ptr, norm_ptr, grad_weight_ptr, grad_bias_ptr, grad_alpha_ptr, sums_ptr,
    eps, samples, channels, pixels, splits, widths,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Tables of the backward pass for a block of channels: dweight, dbias, dalpha, (m G1, m G2), and c_k once."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_S)
    inside_c = channel < channels
    mean_c = tl.load(mean_ptr + channel, mask=inside_c, other=0.0)
    inverse_std = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=inside_c, other=1.0) + eps)
    weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0)
    alpha = tl.load(alpha_ptr + channel, mask=inside_c, other=0.0)
    divisor = tl.load(divisor_ptr).to(tl.float32) * pixels
    grad_weight = tl.zeros((BLOCK_C,), tl.float32)
    grad_bias = tl.zeros((BLOCK_C,), tl.float32)
    grad_alpha = tl.zeros((BLOCK_C,), tl.float32)
    sum_grad = tl.zeros((BLOCK_C,), tl.float32)
    sum_product = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, samples, BLOCK_N):
        sample = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside_n = sample < samples
        inside = inside_n[:, None] & inside_c[None, :]
        width = tl.arange(0, BLOCK_W)
        weighted = tl.load(
            weighted_ptr + sample[:, None] * widths + width[None, :],
            mask=inside_n[:, None] & (width < widths)[None, :],
            other=0.0,
        )
        inverse_norm = tl.load(inverse_norm_ptr + sample, mask=inside_n, other=0.0)
        norm = -inverse_norm * inverse_norm * inverse_norm * tl.sum(weighted, 1) / divisor
        if tl.program_id(0) == 0:
            tl.store(norm_ptr + sample, norm, mask=inside_n)
        inside_parts = inside[:, None, :] & (split < splits)[None, :, None]
        row = (sample[:, None, None] * splits + split[None, :, None]) * channels + channel[None, None, :]
        grad_sum = tl.sum(tl.load(part_sum_ptr + row, mask=inside_parts, other=0.0), 1)
        grad_dot = tl.sum(tl.load(part_dot_ptr + row, mask=inside_parts, other=0.0), 1)
        table = sample[:, None] * channels + channel[None, :]
        spread = tl.load(mean_nc_ptr + table, mask=inside, other=0.0) - mean_c[None, :]
        spread = tl.where(inside, spread, 0.0) * inverse_std[None, :]
        centred = tl.load(centred_nc_ptr + table, mask=inside, other=0.0)
        squares = centred * (inverse_std * inverse_std)[None, :] + pixels * spread * spread
        grad_normalized = grad_dot * inverse_std[None, :]
        mixture = inverse_norm[:, None] * alpha[None, :] + (1.0 - alpha)[None, :]
        scaled = mixture * weight[None, :]
        grad_weight += tl.sum(mixture * grad_normalized, 0)
        grad_bias += tl.sum(grad_sum, 0)
        grad_alpha += tl.sum((inverse_norm[:, None] - 1.0) * grad_normalized, 0) * weight
        sum_grad += tl.sum(scaled * grad_sum + norm[:, None] * (pixels * spread), 0)
        sum_product += tl.sum(scaled * grad_normalized + norm[:, None] * squares, 0)
    tl.store(grad_weight_ptr + channel, grad_weight, mask=inside_c)
    tl.store(grad_bias_ptr + channel, grad_bias, mask=inside_c)
    tl.store(grad_alpha_ptr + channel, grad_alpha, mask=inside_c)
    tl.store(sums_ptr + channel, sum_grad, mask=inside_c)
    tl.store(sums_ptr + channels + channel, sum_product, mask=inside_c)


@triton.jit
def input_gradient_kernel(
    grad_ptr, x_ptr, skip_ptr, grad_x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, alpha_ptr, inverse_norm_ptr, norm_ptr,
    sums_ptr, packed_ptr, eps, channels, pixels, block_pixels,
    BATCH_STATISTICS: tl.constexpr, HAS_SKIP: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = A dy + r^2 (c_k - G2) (x - mean) - r G1 (+ the skip gradient) for a block of channels and a range of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channel < channels
    mean = tl.load(mean_ptr + channel, mask=inside_c, other=0.0)
    var = tl.load(var_ptr + channel, mask=inside_c, other=1.0)
    weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0)
    alpha = tl.load(alpha_ptr + channel, mask=inside_c, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside_c, other=0.0)
    scale = affine_scale(weight, alpha, var, tl.load(inverse_norm_ptr + sample), eps)
    slope = tl.load(norm_ptr + sample) / (var + eps)
    offset_c = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH_STATISTICS:
        share = (1.0 / tl.maximum(tl.load(packed_ptr + 2 * channels), 1.0)).to(tl.float32)
        mean_grad = tl.load(sums_ptr + channel, mask=inside_c, other=0.0) * share
        mean_product = tl.load(sums_ptr + channels + channel, mask=inside_c, other=0.0) * share
        slope -= mean_product / (var + eps)
        offset_c -= mean_grad / tl.sqrt(var + eps)
    start = tl.program_id(1) * block_pixels
    stop = tl.minimum(start + block_pixels, pixels)
    base = sample * pixels * channels
    for first in range(start, stop, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & inside_c[None, :]
        offset = base + (pixel[:, None] * channels + channel[None, :])
        deviation = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad = masked_gradient(grad, deviation, scale, bias, x_ptr.dtype.element_ty, RELU)
        grad_x = scale[None, :] * grad + slope[None, :] * deviation + offset_c[None, :]
        if HAS_SKIP:
            grad_x += tl.load(skip_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
