"""What bench_sync.py measures: agreement with one process, collectives per layer, time with and without them."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitdist import Unitization2d
from unitdist.layers import normalize_and_convolve


def _layer(channels: int, device: torch.device, sync: bool, dtype: torch.dtype = torch.float32) -> Unitization2d:
    layer = Unitization2d(channels, norm_divisor=9, activation="relu", sync=sync, device=device, dtype=dtype)
    nn.init.constant_(layer.alpha, 0.5)
    return layer


def check_against_one_process(device: torch.device) -> float:
    """Largest difference of the input's gradient between all ranks together and one process with the whole batch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(2 * world, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for sync, share in ((False, slice(None)), (True, slice(2 * rank, 2 * rank + 2))):
        leaf = x[share].clone().requires_grad_()
        y = _layer(6, device, sync, torch.float64)(leaf)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    error = (grads[1] - grads[0][2 * rank : 2 * rank + 2]).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


def count_collectives(device: torch.device) -> list[str]:
    """Every all_reduce of one layer's forward and backward, with its numbers and bytes."""
    seen, original = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            f"all_reduce of {tensor.numel()} numbers ({tensor.numel() * tensor.element_size()} bytes) for C = 256"
        )
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        x = torch.randn(2, 256, 4, 4, device=device, requires_grad=True)
        _layer(256, device, True)(x).sum().backward()
    finally:
        dist.all_reduce = original
    return seen


def time_forms(channels: int, side: int, samples: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Wall-clock milliseconds of norm + ReLU + 1x1 convolution, forward and backward, all ranks starting together."""
    x = torch.randn(samples, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(channels, 64, 1, bias=False, device=device).to(memory_format=torch.channels_last)
    apart, synced = _layer(channels, device, False), _layer(channels, device, True)
    forms = {
        "unsynchronized": lambda leaf: conv(apart(leaf)),
        "synchronized": lambda leaf: conv(synced(leaf)),
        "one node": lambda leaf: normalize_and_convolve(synced, conv, leaf),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(rounds + 2):
        for name, form in forms.items():
            leaf = x.clone().requires_grad_()
            dist.barrier()
            begin = time.perf_counter()
            out = form(leaf)
            torch.autograd.grad(out, [leaf, conv.weight], torch.ones_like(out))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {"channels": channels, "side": side, "samples": samples, "times": times}
