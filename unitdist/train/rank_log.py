"""Every rank's own log: what it prints is written to logs/rank_NNNNN.log in the run folder too."""

import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TextIO, cast

from unitdist.world import World


class _Tee:
    """A text stream that also writes to the log. All else, `isatty` included, is the stream's own."""

    def __init__(self, stream: TextIO, log: "RankLog") -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class RankLog:
    """The rank's log, open from `open` to `close`, with a header for every start of the job; starts are appended.

    Python's stdout and stderr are copied; what native libraries write to their file descriptors goes to the console only
    (torchrun's --log-dir and --tee keep that too).
    """

    def __init__(self, folder: Path, world: World, *, start: str) -> None:
        """`start` names this start of the job, the same on all ranks. Raises OSError."""
        self.path = folder / "logs" / f"rank_{world.rank:05d}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = open(self.path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._failed = False
        self.write(
            f"=== start {start} (torchrun restart {restart}): rank {world.rank} of {world.size} on {socket.gethostname()}, "
            f"pid {os.getpid()} ===\n"
        )
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (cast(TextIO, _Tee(stream, self)) for stream in self._streams)

    def write(self, text: str) -> None:
        """To the log alone. A progress bar's redrawing is left out. A log that cannot be written never ends the training."""
        if "\r" in text:
            return
        try:
            self.file.write(text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._streams[1].write(f"unitdist: warning: cannot write {self.path}: {error.strerror}\n")

    def note(self, line: str) -> None:
        """One line with the time, to the log alone."""
        self.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")

    def __enter__(self) -> "RankLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        sys.stdout, sys.stderr = self._streams
        try:
            self.file.close()
        except OSError as error:  # the last buffer of a full disk
            self._streams[1].write(f"unitdist: warning: cannot write {self.path}: {error.strerror}\n")
