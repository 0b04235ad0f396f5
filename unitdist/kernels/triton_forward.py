"""Triton kernels of the forward pass, channels_last: moments, their merge, normalization, running statistics.

Memory: x is (N, P, C) contiguous, N samples, P pixels, C channels. Letters in brackets: unitdist/functional/README.md.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def moments_kernel(
    x_ptr, residual_ptr, total_ptr, mean_ptr, centred_ptr, channels, pixels, split_pixels, splits,
    HAS_RESIDUAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of one sample's block of channels over one range of pixels, by Welford.

    Writes (N, splits, C). Each lane (pixel modulo BLOCK_P, channel) runs its own recurrence; lanes merge at the end.
    """
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2)
    start = split * split_pixels
    stop = tl.minimum(start + split_pixels, pixels)
    lane = tl.arange(0, BLOCK_P)
    base = sample * pixels * channels
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    centred = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = 0.0
    for first in range(start, stop, BLOCK_P):
        pixel = first + lane
        inside = (pixel < stop)[:, None] & (channel < channels)[None, :]
        offset = base + (pixel[:, None] * channels + channel[None, :])
        value = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + offset, rounded, mask=inside)
            value = rounded.to(tl.float32)
        count += 1.0
        deviation = tl.where(inside, value - mean, 0.0)
        mean += deviation * (1.0 / count)  # one division per tile, not one per element
        centred += deviation * (value - mean)
    held = tl.maximum((stop - start - lane + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    mean_c = tl.sum(mean * held, 0) / (stop - start).to(tl.float32)
    spread = mean - mean_c[None, :]
    centred_c = tl.sum(centred + held * spread * spread, 0)
    row = (sample * splits + split) * channels + channel
    tl.store(mean_ptr + row, mean_c, mask=channel < channels)
    tl.store(centred_ptr + row, centred_c, mask=channel < channels)


@triton.jit
def merge_moments_kernel(
    part_mean_ptr, part_centred_ptr, mean_nc_ptr, centred_nc_ptr, packed_ptr, samples, channels, pixels, split_pixels,
    splits, total_count, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge ranges of pixels into samples [m_kc, M2_kc] and samples into (sum, sum of squares, count) in float64.

    A tile holds all ranges of BLOCK_N samples: the few programs here wait for memory once per tile, not once per range.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_S)
    part = tl.minimum(tl.maximum(pixels - split * split_pixels, 0), split_pixels).to(tl.float32)[None, :, None]
    mean_c = tl.zeros((BLOCK_C,), tl.float32)
    centred_c = tl.zeros((BLOCK_C,), tl.float32)
    held = 0.0
    for first in range(0, samples, BLOCK_N):
        sample = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (sample < samples)[:, None] & (channel < channels)[None, :]
        inside_parts = inside[:, None, :] & (split < splits)[None, :, None]
        row = (sample[:, None, None] * splits + split[None, :, None]) * channels + channel[None, None, :]
        part_mean = tl.load(part_mean_ptr + row, mask=inside_parts, other=0.0)
        part_centred = tl.load(part_centred_ptr + row, mask=inside_parts, other=0.0)
        mean = tl.sum(part_mean * part, 1) / pixels
        part_spread = part_mean - mean[:, None, :]
        centred = tl.sum(part_centred + part * part_spread * part_spread, 1)
        table = sample[:, None] * channels + channel[None, :]
        tl.store(mean_nc_ptr + table, mean, mask=inside)
        tl.store(centred_nc_ptr + table, centred, mask=inside)
        rows = tl.minimum(samples - first, BLOCK_N) * 1.0
        tile_mean = tl.sum(mean, 0) / rows
        spread = tl.where(inside, mean - tile_mean[None, :], 0.0)
        delta = tile_mean - mean_c
        mean_c += delta * (rows / (held + rows))
        centred_c += tl.sum(centred, 0) + pixels * tl.sum(spread * spread, 0)
        centred_c += delta * delta * (pixels * (held * rows / (held + rows)))
        held += rows
    count = tl.zeros((BLOCK_C,), tl.float64) + total_count
    wide_mean = mean_c.to(tl.float64)
    wide_sum = wide_mean * count
    tl.store(packed_ptr + channel, wide_sum, mask=channel < channels)
    tl.store(packed_ptr + channels + channel, centred_c.to(tl.float64) + wide_sum * wide_mean, mask=channel < channels)
    if tl.program_id(0) == 0:
        tl.store(packed_ptr + 2 * channels + tl.arange(0, BLOCK_C), count, mask=tl.arange(0, BLOCK_C) == 0)


@triton.jit
def batch_statistics(packed_ptr, mean_ptr, var_ptr, channel, channels, FROM_PACKED: tl.constexpr):
    """Mean and biased variance of a block of channels, from packed sums or as given."""
    inside = channel < channels
    if FROM_PACKED:
        share = 1.0 / tl.maximum(tl.load(packed_ptr + 2 * channels), 1.0)
        wide_mean = tl.load(packed_ptr + channel, mask=inside, other=0.0) * share
        wide_var = tl.load(packed_ptr + channels + channel, mask=inside, other=0.0) * share - wide_mean * wide_mean
        return wide_mean.to(tl.float32), tl.maximum(wide_var, 0.0).to(tl.float32)
    else:
        return tl.load(mean_ptr + channel, mask=inside, other=0.0), tl.load(var_ptr + channel, mask=inside, other=1.0)


@triton.jit
def normalize_kernel(
    x_ptr, y_ptr, mean_nc_ptr, centred_nc_ptr, packed_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, alpha_ptr,
    divisor_ptr, inverse_norm_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, eps, channels, pixels,
    block_pixels, FROM_PACKED: tl.constexpr, UPDATE: tl.constexpr, AVERAGE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """One sample's norm [s_k, p_k] from its row of the tables, then y = A (x - mean) + bias for a range of pixels.

    Every program of a sample computes the norm again (a row lies in the L2 cache) rather than waiting for another
    launch; the first stores it, and the very first program stores mean and variance if they came packed, and moves the
    running statistics if UPDATE.
    """
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    is_first = (sample == 0) & (block == 0)
    squares = tl.zeros((BLOCK_ROW,), tl.float32)
    for first in range(0, channels, BLOCK_ROW):
        channel = first + tl.arange(0, BLOCK_ROW)
        inside = channel < channels
        mean, var = batch_statistics(packed_ptr, mean_ptr, var_ptr, channel, channels, FROM_PACKED)
        spread = tl.load(mean_nc_ptr + sample * channels + channel, mask=inside, other=0.0) - mean
        centred = tl.load(centred_nc_ptr + sample * channels + channel, mask=inside, other=0.0)
        squares += tl.where(inside, (centred + pixels * spread * spread) / (var + eps), 0.0)
        if FROM_PACKED:
            if is_first:
                tl.store(mean_ptr + channel, mean, mask=inside)
                tl.store(var_ptr + channel, var, mask=inside)
                if UPDATE:
                    move_running(
                        mean, var, packed_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, channel,
                        channels, AVERAGE,
                    )  # fmt: skip
    if UPDATE:
        if is_first:
            count_batch(batches_ptr, AVERAGE)
    divisor = tl.load(divisor_ptr).to(tl.float32) * pixels
    inverse_norm = 1.0 / tl.sqrt(tl.sum(squares, 0) / divisor + eps)
    if block == 0:
        tl.store(inverse_norm_ptr + sample, inverse_norm)

    start = block * block_pixels
    stop = tl.minimum(start + block_pixels, pixels)
    base = sample * pixels * channels
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        inside_c = channel < channels
        mean, var = batch_statistics(packed_ptr, mean_ptr, var_ptr, channel, channels, FROM_PACKED)
        weight = tl.load(weight_ptr + channel, mask=inside_c, other=0.0)
        alpha = tl.load(alpha_ptr + channel, mask=inside_c, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=inside_c, other=0.0)
        scale = affine_scale(weight, alpha, var, inverse_norm, eps)
        for row in range(start, stop, BLOCK_P):
            pixel = row + tl.arange(0, BLOCK_P)
            inside = (pixel < stop)[:, None] & inside_c[None, :]
            offset = base + (pixel[:, None] * channels + channel[None, :])
            value = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            y = scale[None, :] * (value - mean[None, :]) + bias[None, :]
            if RELU:
                y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def affine_scale(weight, alpha, var, inverse_norm, eps):
    """[A_kc] = weight (p alpha + 1 - alpha) / sqrt(var + eps)."""
    return weight * (inverse_norm * alpha + 1.0 - alpha) / tl.sqrt(var + eps)


@triton.jit
def move_running(
    mean, var, packed_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, channel, channels,
    AVERAGE: tl.constexpr,
):  # fmt: skip
    """Running mean and (unbiased) variance of a block of channels towards the batch's; not at all if the count is 0."""
    inside = channel < channels
    count = tl.load(packed_ptr + 2 * channels)
    weight = 1.0 / (tl.load(batches_ptr) + 1).to(tl.float32) if AVERAGE else momentum
    weight = tl.where(count > 0, weight, 0.0)
    unbiased = var * (count / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    old_mean = tl.load(running_mean_ptr + channel, mask=inside, other=0.0)
    old_var = tl.load(running_var_ptr + channel, mask=inside, other=0.0)
    tl.store(running_mean_ptr + channel, old_mean + weight * (mean - old_mean), mask=inside)
    tl.store(running_var_ptr + channel, old_var + weight * (unbiased - old_var), mask=inside)


@triton.jit
def count_batch(batches_ptr, AVERAGE: tl.constexpr):
    """Advances the counter, by the program that read it in `move_running`.

    Every thread of the program reads it there, and one of them stores here: the barrier keeps the store behind the
    slowest warp's read.
    """
    if AVERAGE:
        tl.debug_barrier()
    tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def update_running_kernel(
    mean_ptr, var_ptr, packed_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, channels,
    AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running statistics of all channels in one program: the counter must be read before it is advanced."""
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        mean = tl.load(mean_ptr + channel, mask=channel < channels, other=0.0)
        var = tl.load(var_ptr + channel, mask=channel < channels, other=0.0)
        move_running(
            mean, var, packed_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, channel, channels, AVERAGE
        )
    count_batch(batches_ptr, AVERAGE)
