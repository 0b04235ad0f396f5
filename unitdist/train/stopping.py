"""Leaving in order: a signal to any rank, or a failure of any rank's data, stops all ranks after the same step.

SIGTERM and SIGUSR1 are what schedulers send before a time limit or a preemption. The handler only sets a flag; once a step
the ranks add up their flags. The exchange runs on the host (gloo) beside the step and is read one step
later, so that it costs no synchronization with the device. A second signal leaves at once, but
for repeats of the first: schedulers and launchers send one request two or three times.
"""

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from unitdist.data.batch import Loader
from unitdist.data.reading import too_many_broken
from unitdist.errors import UnitdistError
from unitdist.train.failure import raise_first
from unitdist.world import World

REPEAT_S = 5.0
"""Seconds after the first signal in which further ones count as its repeats."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(UnitdistError):
    """The job was asked to stop, and all ranks agreed on it. What was reached is saved by the caller."""

    exit_code = 75  # EX_TEMPFAIL: try again


class StopRequest:
    """What this process asks of all: to stop, or to fail together. Agreed over ranks once a step.

    Made on all ranks together; restores the old signal handlers on close.
    """

    def __init__(self, world: World) -> None:
        self._name = ""
        self._failure: UnitdistError | None = None
        self._replacing: Loader | None = None
        self._counted = 0
        self._alone = world.size == 1
        self._group = None if self._alone else dist.new_group(backend="gloo")
        self._agreed = torch.zeros(3, dtype=torch.int64)
        self._pending: dist.Work | None = None
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        # Python calls handlers between two of its own instructions: not while the main thread waits in a collective.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=_leave_on_second, args=(reading,), name="signals", daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = self._name or signal.Signals(number).name

    def fail(self, error: UnitdistError) -> None:
        """This rank cannot go on after the steps for which it holds its batches. All ranks raise the error: alone at the
        next check(), on several ranks at the one after it, until when this rank takes part in what the others do."""
        self._failure = self._failure or error

    def limit_broken(self, loader: Loader) -> None:
        """From now on: raise DataError on all ranks once they have together replaced more than loader.max_broken images."""
        self._replacing = loader

    def check(self) -> None:
        """Once per step (or validation batch), by all ranks. Raises Stopped, or a failure, on all of them in the same call."""
        if self._alone:
            stop, failed, broken = self._flags()
        else:
            if self._pending is not None:
                self._pending.wait()
            stop, failed, broken = self._agreed.tolist()
            self._agreed.copy_(torch.tensor(self._flags()))
            self._pending = None if stop or failed else self._exchange()
        if failed:
            self._raise_failure()
        if self._replacing is not None and broken > max(self._replacing.max_broken, self._counted):
            self._counted = broken
            self._require_few_broken(self._replacing)
        if stop:
            raise Stopped(self._name or "another rank was asked to stop")

    def check_now(self) -> None:
        """As `check`, but a signal of before this call counts: for the moment before the first step."""
        self.check()
        self.check()

    def _flags(self) -> list[int]:
        return [
            int(bool(self._name)),
            int(self._failure is not None),
            0 if self._replacing is None else len(self._replacing.broken),
        ]

    def _raise_failure(self) -> None:
        if self._group is not None:
            raise_first(self._failure, self._group)  # type: ignore[arg-type]
        assert self._failure is not None
        raise self._failure

    def _require_few_broken(self, loader: Loader) -> None:
        """The sum over ranks is above the limit; do the different images reach it too? Another epoch gives a broken image to
        another rank, which counts it again."""
        broken = dict(loader.broken)
        if self._group is not None:
            # The exchange that was just posted comes first on every rank.
            by_rank: list[dict[str, str]] = [{}] * dist.get_world_size(self._group)  # type: ignore[arg-type]
            dist.all_gather_object(by_rank, broken, group=self._group)  # type: ignore[arg-type]
            broken = {name: reason for of_rank in by_rank for name, reason in of_rank.items()}
        if len(broken) > loader.max_broken:
            error = too_many_broken(broken, loader.max_broken)
            error.speaker = 0
            raise error

    def _exchange(self) -> dist.Work | None:
        assert isinstance(self._group, dist.ProcessGroup)
        return dist.all_reduce(self._agreed, dist.ReduceOp.SUM, group=self._group, async_op=True)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._writing)


def _leave_on_second(reading: int) -> None:
    """A thread: reads the numbers of the signals that come, ends the process at a second request, itself when the pipe is closed."""
    first: float | None = None
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first is not None and now - first > REPEAT_S:
                os._exit(128 + number)
            first = now if first is None else first
    os.close(reading)
