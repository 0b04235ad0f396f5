"""Between ranks: the same software, and clocks that agree. Only under a launcher that started several."""

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from unitdist.doctor.finding import Finding, fault, ok, warning
from unitdist.version import __version__
from unitdist.wording import counted
from unitdist.world import World

T = TypeVar("T")

SKEW_NOTED_S = 1.0
SKEW_FAULT_S = 5.0
"""torch's c10d rendezvous compares wall clocks of different nodes and takes a node that is 15 s behind for dead; logs mix before."""


def clock_offsets() -> dict[int, float]:
    """Rank -> seconds by which its wall clock is ahead of rank 0's, right to half of one message's round trip.

    A collective call over the default process group; the values are on every rank.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    offsets = torch.zeros(world_size, dtype=torch.float64)
    clock = torch.zeros(1, dtype=torch.float64)
    for other in range(1, world_size):
        if rank == other:
            dist.recv(clock, src=0)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=0)
        elif rank == 0:
            asked = time.time()
            dist.send(clock, dst=other)
            dist.recv(clock, src=other)
            offsets[other] = clock[0] - (asked + time.time()) / 2
    dist.broadcast(offsets, src=0)
    return dict(enumerate(offsets.tolist()))


def check_clocks(offsets: Mapping[int, float], hosts: Sequence[str]) -> Finding:
    """`offsets`: as from `clock_offsets`; `hosts`: each rank's host."""
    ahead, behind = max(offsets, key=offsets.__getitem__), min(offsets, key=offsets.__getitem__)
    skew = offsets[ahead] - offsets[behind]
    text = f"{counted(len(offsets), 'rank')} within {skew:.3f} s"
    if skew < SKEW_NOTED_S:
        return ok("clocks", text)
    text += f": rank {ahead} on {hosts[ahead]} is ahead of rank {behind} on {hosts[behind]}"
    remedy = "start chrony or ntpd on every node (chronyc tracking)"
    if skew < SKEW_FAULT_S:
        return warning("clocks", text, remedy)
    return fault("clocks", f"{text}; torchrun's rendezvous drops nodes whose clock is late", remedy)


def own_software() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, unitdist {__version__}"


def check_same_software(software: Sequence[str], hosts: Sequence[str]) -> Finding:
    """`software`: each rank's versions in words."""
    usual, _ = Counter(software).most_common(1)[0]
    for rank, one in enumerate(software):
        if one != usual:
            return fault(
                "versions",
                f"rank {rank} on {hosts[rank]} runs {one}, others {usual}",
                "install the same versions on every node",
            )
    return ok("versions", f"the same on {counted(len(software), 'rank')}")


def gather(value: T, world: World) -> list[T]:
    """Every rank's value, in rank order."""
    values = [value] * world.size
    dist.all_gather_object(values, value)
    return values
