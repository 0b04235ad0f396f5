"""Statistics over a process group: one all_reduce of 2C+1 numbers forward, one of 2C backward.

Groups travel by name (a string), so that a layer can be copied and pickled and an operator can take one
as an argument: "" is no synchronization, DEFAULT_GROUP the default group, else the name of a group.
No function reads a tensor back to the host.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from unitdist.errors import ConfigError
from unitdist.functional.moments import pack_moments, unpack_moments

DEFAULT_GROUP = "default"
NO_GROUP = ""


def new_sync_group(group_size: int) -> dist.ProcessGroup | None:
    """The group of `group_size` consecutive ranks to which this rank belongs; None: the default group.

    A collective call: every rank of the job makes it, with the same size. Groups are contiguous (0..g-1,
    g..2g-1, ...), so that with g dividing the ranks per node no group leaves its node. Raises ConfigError
    when the size is below 1 or does not divide the number of ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if group_size < 1 or world_size % group_size:
        raise ConfigError(
            f"sync group of {group_size} ranks: must be >= 1 and divide the {world_size} ranks of the job"
        )
    if group_size == world_size:
        return None
    own_group: dist.ProcessGroup | None = None
    for first in range(0, world_size, group_size):
        ranks = list(range(first, first + group_size))
        group = dist.new_group(ranks)
        if isinstance(group, dist.ProcessGroup):  # a rank outside the group gets a number
            own_group = group
    return own_group


def group_from_name(name: str) -> dist.ProcessGroup:
    """The process group of that name. Raises ConfigError when it does not exist in this process."""
    if name == DEFAULT_GROUP:
        return distributed_c10d._get_default_group()
    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except (RuntimeError, ValueError, KeyError):
        raise ConfigError(
            f"process group {name!r} does not exist in this process: create it before the model"
        ) from None


def active_group_name(group_name: str) -> str:
    """`group_name` if there is anybody to talk to, else NO_GROUP (no process group, or a group of one)."""
    if group_name == NO_GROUP or not dist.is_available() or not dist.is_initialized():
        return NO_GROUP
    return group_name if group_from_name(group_name).size() > 1 else NO_GROUP


def merge_moments(mean_c: Tensor, centred_c: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (C,) and count (0-d float64) over all ranks, weighted by their counts.

    mean_c, centred_c: this rank's mean and centred sum over `count` values per channel. One all_reduce
    of 2C+1 float64 numbers. `NO_GROUP`: this rank alone, no collective.
    """
    if group_name == NO_GROUP:
        return mean_c, centred_c / max(count, 1), torch.full((), count, dtype=torch.float64, device=mean_c.device)
    packed = pack_moments(mean_c, centred_c, count)
    dist.all_reduce(packed, group=group_from_name(group_name))
    return unpack_moments(packed, mean_c.dtype)


def sum_over_group(sums: Tensor, group_name: str) -> Tensor:
    """Sum of `sums` over the group, in place. `NO_GROUP`: nothing happens."""
    work = start_sum_over_group(sums, group_name)
    if work is not None:
        work.wait()
    return sums


def start_sum_over_group(sums: Tensor, group_name: str) -> dist.Work | None:
    """Start summing `sums` over the group, in place; wait() on the result before reading it.

    On CUDA wait() makes the current stream wait, not the host. None when there is nobody to talk to.
    """
    if group_name == NO_GROUP:
        return None
    return dist.all_reduce(sums, group=group_from_name(group_name), async_op=True)
