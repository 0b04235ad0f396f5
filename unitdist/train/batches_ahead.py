"""A step's batches, handed out only when every rank holds its own.

A rank whose data fails may not simply leave: the others would wait for it in the step's collectives. Each rank therefore
holds the batches of two steps. One that cannot get those of a later step says so through the exchange of `stopping.py`,
which is read one step later: all ranks leave together, after the last step for which all of them held their batches.
"""

from collections import deque
from collections.abc import Iterator

from unitdist.data.batch import Batch, Loader
from unitdist.errors import UnitdistError
from unitdist.train.agreement import agreed
from unitdist.train.metrics import Stopwatch
from unitdist.train.stopping import StopRequest
from unitdist.world import World

STEPS_AHEAD = 2


class BatchesAhead:
    """The batches of the next `steps` steps of an epoch, each a list of `accumulation_steps` micro-batches.

    Made, and closed, on all ranks together. Raises the first failing rank's error on all of them if one cannot start.
    """

    def __init__(
        self,
        loader: Loader,
        world: World,
        stop: StopRequest,
        watch: Stopwatch,
        *,
        epoch: int,
        start_sample: int,
        steps: int,
        accumulation_steps: int,
    ) -> None:
        self._stop, self._watch = stop, watch
        self._accumulation_steps = accumulation_steps
        self._to_fetch = steps
        self._held: deque[list[Batch]] = deque()
        with agreed(world):
            self._batches = loader.iterate(epoch, start_sample=start_sample)
            for _ in range(STEPS_AHEAD):
                self._fetch()

    def take(self) -> list[Batch]:
        """The next step's batches."""
        return self._held.popleft()

    def refill(self) -> None:
        """After each step, before `StopRequest.check`: fetch the batches of a later step, or note why there are none."""
        try:
            self._fetch()
        except UnitdistError as error:
            self._to_fetch = 0
            self._stop.fail(error)

    def _fetch(self) -> None:
        if self._to_fetch > 0:
            with self._watch.waiting():
                self._held.append([next(self._batches) for _ in range(self._accumulation_steps)])
            self._to_fetch -= 1

    def close(self) -> None:
        """End what the loader prepares ahead."""
        if isinstance(self._batches, Iterator) and hasattr(self._batches, "close"):
            self._batches.close()
