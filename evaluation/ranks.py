"""What the evaluation needs from the other processes: decisions of rank 0 for all, and the scores of all for rank 0.

Everything goes over gloo on the host, also next to NCCL: a few messages per run, no device memory.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from unitdist.errors import UnitdistError
from unitdist.world import World

Value = TypeVar("Value")

# Ranks reach the end of their share hours apart when their machines differ; a dead rank is noticed at once all the same.
PATIENCE = timedelta(hours=24)


class Ranks:
    """All processes of the job, or just this one.

    Joins the default process group where there is one (it must be made by all ranks alike) and opens one where the launcher
    announced several processes: nccl on CUDA machines, gloo elsewhere.
    """

    def __init__(self, world: World, *, use_cuda: bool) -> None:
        self.world = world
        self._opened = False
        self._group: dist.ProcessGroup | None = None
        if world.size == 1 and not dist.is_initialized():
            return
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=PATIENCE)
            self._opened = True
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        self._group = group

    def from_main(self, decide: Callable[[], Value]) -> Value:
        """The value that rank 0 computes, on every rank; an error of rank 0 is raised on every rank."""
        if self._group is None:
            return decide()
        message: list[Any] = [None, None]
        if self.world.is_main:
            try:
                message[0] = decide()
            except UnitdistError as error:
                error.speaker = 0
                message[1] = (type(error), str(error))
        dist.broadcast_object_list(message, src=0, group=self._group)
        if message[1] is not None:
            kind, text = message[1]
            failure: UnitdistError = kind(text)
            failure.speaker = 0
            raise failure
        return message[0]  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of ranks, on rank 0; an empty list on the others."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world.size if self.world.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def close(self) -> None:
        """Close what this object opened."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        if self._opened:
            dist.destroy_process_group()

