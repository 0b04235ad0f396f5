"""Writing checkpoints beside the training: one background thread on rank 0, and what becomes of its failures."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from unitdist.errors import CheckpointError


class CheckpointWriter:
    """Runs one write at a time. One that fails with CheckpointError is told through `tell` and counted; training decides what follows.
    Any other error in a write is a mistake of ours: `gives_up` at once.

    `failed_in_a_row` is how many of the newest saves failed, `lost_steps` the steps whose save failed, `stall_s` the seconds for
    which training stood still for saves.
    """

    def __init__(self, *, asynchronous: bool, max_failed_saves: int, tell: Callable[[str], None]) -> None:
        self.failed_in_a_row, self.stall_s = 0, 0.0
        self.lost_steps: set[int] = set()
        self._step = 0
        self._max_failed_saves, self._tell = max_failed_saves, tell
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._failure: CheckpointError | None = None
        self.gives_up: CheckpointError | None = None
        """The error that ends the run: as many saves in a row have failed as are allowed, or one by a mistake of ours. Once set it stays,
        whatever later saves do while the ranks agree to end."""

    def start(self, write: Callable[[], None], *, step: int) -> None:
        """Call `write` in the background, once the write before it has ended; here and now where that was asked for."""
        self.wait()
        self._step = step
        if self._pool is not None:
            self._pending = self._pool.submit(write)
            return
        self._pending = Future()
        try:
            write()
            self._pending.set_result(None)
        except Exception as error:
            self._pending.set_exception(error)
        self.wait()

    def poll(self) -> None:
        """Take note of a write that has ended; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Does not raise what a write raised; `failure` and `give_up` say it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except CheckpointError as error:
            self._failure = error
            self.lost_steps.add(self._step)
            self.failed_in_a_row += 1
            count, allowed = self.failed_in_a_row, self._max_failed_saves
            self._tell(
                f"{error}; "
                + ("the run is ending" if self.gives_up else f"failed saves in a row: {count} of {allowed} allowed")
            )
            if count == allowed and self.gives_up is None:
                self.gives_up = CheckpointError(
                    f"{count} saves in a row failed (checkpoint.max_failed_saves); the last one: {error}"
                )
        except Exception as error:
            mistake = CheckpointError(
                f"writing the checkpoint of step {self._step} failed with {type(error).__name__}: {error}"
            )
            mistake.__cause__ = error  # so its traceback is in the log
            self._failure = mistake
            self.gives_up = self.gives_up or mistake
            self.lost_steps.add(self._step)
        else:
            self._failure, self.failed_in_a_row = None, 0
            self.lost_steps.discard(self._step)

    @property
    def failure(self) -> CheckpointError | None:
        """Why the newest save failed; None where it did not."""
        return self._failure

    def close(self) -> None:
        """Let the write that is going on end."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()


class Stall:
    """Around what training waits for: adds its seconds to `writer.stall_s`."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._writer.stall_s += time.perf_counter() - self._started
