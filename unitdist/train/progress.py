"""What rank 0 says while it trains: a bar on a terminal, plain lines elsewhere."""

import sys

from tqdm import tqdm


class Progress:
    """Steps of the whole run with images/s, ETA and learning rate."""

    def __init__(self, *, total_steps: int, done_steps: int, shown: bool) -> None:
        self.shown = shown
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """One line, above the bar where there is one."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def note(self, text: str) -> None:
        """Figures beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def eta(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
