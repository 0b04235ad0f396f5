"""Leaving in order: a signal to any rank stops all ranks after the same step, saved.

SIGTERM and SIGUSR1 are what schedulers send before a time limit or a preemption. The handler only sets a flag; once a step
the ranks agree on the largest flag. The exchange runs on the host (gloo) beside the step and is read one step
later, so that it costs no synchronization with the device. A second signal leaves at once, but
for repeats of the first: schedulers and launchers send one request two or three times.
"""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from unitdist.errors import UnitdistError
from unitdist.world import World

REPEAT_S = 5.0
"""Seconds after the first signal in which further ones count as its repeats."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(UnitdistError):
    """The job was asked to stop, and all ranks agreed on it. What was reached is saved by the caller."""

    exit_code = 75  # EX_TEMPFAIL: try again


class StopRequest:
    """Flag of this process and its agreement over ranks. Made on all ranks together; restores the old handlers on close."""

    def __init__(self, world: World) -> None:
        self._name, self._noted = "", 0.0
        self._alone = world.size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._agreed = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._name and now - self._noted > REPEAT_S:
            os._exit(128 + number)
        if not self._name:
            self._name, self._noted = signal.Signals(number).name, now

    def check(self) -> None:
        """Once per step (or validation batch), by all ranks. Raises Stopped on all of them in the same call."""
        if self._alone:
            stop = bool(self._name)
        else:
            if self._pending is not None:
                self._pending.wait()
            stop = bool(self._agreed.item())
            self._agreed.fill_(int(bool(self._name)))
            self._pending = None if stop else self._exchange()
        if stop:
            raise Stopped(self._name or "another rank was asked to stop")

    def _exchange(self) -> dist.Work | None:
        assert isinstance(self._group, dist.ProcessGroup)
        return dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
