"""How far the evaluation is: a bar with ETA on a terminal, a plain line now and then elsewhere; rank 0 only, but for `say`."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Images of this rank; the other ranks have as many, but for one chunk."""

    def __init__(self, *, shown: bool) -> None:
        self.done = 0
        self._shown = shown
        self._total = 0
        self._bar: tqdm[None] | None = None
        self._started = self._last_line = time.monotonic()

    def start(self, total: int) -> None:
        """`total` images are to be scored by this rank."""
        self._total = total
        self._started = self._last_line = time.monotonic()
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="img", desc="evaluating", dynamic_ncols=True)

    def advance(self, images: int) -> None:
        """`images` more are done."""
        self.done += images
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(images)
        elif self._shown and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = self.done / (now - self._started)
            self.say(f"{self.done}/{self._total} images of this rank, {rate:.1f} images/s, {(self._total - self.done) / rate:.0f} s left")

    def say(self, line: str) -> None:
        """One line for the user, of any rank, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
