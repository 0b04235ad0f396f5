"""A thread on every rank that notices when the rank no longer gets on, and ends the job instead of a silent hang.

All ranks wait for each other in every step, so a rank that is stuck stops all of them, and each notices by its own clock. Each
that still can writes its stacks into its log and says where it stands (rank_record); one of them names the first cause
(failure_summary). A rank that is stopped, or whose interpreter is blocked by native code, is named by the others; in the second
case a timer of faulthandler, which needs no interpreter, writes its stacks and ends it.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unitdist.config import HealthConfig
from unitdist.errors import TrainingError, UnitdistError
from unitdist.train.failure_summary import claims_report, settled_records, summarize, write_failure
from unitdist.train.rank_log import RankLog
from unitdist.train.rank_record import RankRecord, State, host_name, this_machine, write_record
from unitdist.train.stopping import Stopped
from unitdist.world import World


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where the training thread is, since when (monotonic clock), and how long it may stay (None: as long as it likes)."""

    phase: str
    step: int
    since: float
    limit_s: float | None


class Watchdog:
    """Of one rank: made by the training thread, which then says by `enter` what it does next."""

    def __init__(self, config: HealthConfig, world: World, folder: Path, log: RankLog, *, start: str) -> None:
        """`start` names this start of the job, the same on all ranks. Raises OSError when `folder` cannot be written."""
        self._config, self._world, self._folder, self._log, self._start = config, world, folder, log, start
        self._thread_id = threading.get_ident()
        self._finished_phases: set[str] = set()
        self._machine = this_machine()
        self._warned = False
        self._lock = threading.Lock()
        self._leaver: Literal["training", "watchdog"] | None = None
        """The thread that was the first to leave: what it says is the rank's last word."""
        self.mark = Mark(phase="start", step=0, since=time.monotonic(), limit_s=config.stuck_after_first_s)
        limit_s = config.stuck_after_s
        self._tick_s = 1.0 if limit_s is None else min(1.0, limit_s / 10)
        self._beat_s = 30.0 if limit_s is None else min(30.0, max(1.0, limit_s / 10))
        self.grace_s = 10.0 if limit_s is None else min(10.0, max(3.0, limit_s / 10))
        """How long a rank that noticed a failure waits for what the others say."""
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        if world.is_main:
            for old in (folder / "ranks").glob("report_*"):
                old.unlink(missing_ok=True)
        write_record(folder, self._record("running"))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int, *, watched: bool = True, first: bool = False) -> None:
        """The training thread now begins `phase` of optimizer step `step`. `watched` False: it may take as long as it likes.

        `first`: what it does is done for the first time (compilation for another image size, say), though the phase is not new.
        """
        self._finished_phases.add(self.mark.phase)
        config = self._config
        first = first or phase not in self._finished_phases
        limit_s = config.stuck_after_first_s if first else config.stuck_after_s
        self.mark = Mark(phase=phase, step=step, since=time.monotonic(), limit_s=limit_s if watched else None)

    def again(self) -> None:
        """One more part of the same phase, such as a batch of the validation."""
        self.enter(self.mark.phase, self.mark.step)

    def close(self) -> None:
        """The training thread has left; it is no longer watched."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def finished(self) -> None:
        """All that this watches is done: what still closes, such as an upload to W&B, takes as long as it likes."""
        self._unwatch()
        if self._leaves("training"):
            self._say("finished")

    def _leaves(self, thread: Literal["training", "watchdog"]) -> bool:
        """True for the first that asks."""
        with self._lock:
            first = self._leaver is None
            self._leaver = self._leaver or thread
        return first

    def _unwatch(self) -> None:
        self.mark = Mark(phase=self.mark.phase, step=self.mark.step, since=self.mark.since, limit_s=None)

    def failed(self, error: Exception, *, lost_contact: bool) -> None:
        """The training thread leaves with `error`: into the log with its traceback, the rank's record, and the summary.

        `lost_contact`: the error only says that another rank has gone. Then this waits up to `grace_s` for what the
        others say, and one of the ranks prints the summary. Else the rank that failed writes it at once. A second call is
        ignored. Where the watchdog is leaving already, this waits until it has ended the process.
        """
        if not self._leaves("training"):
            if self._leaver == "watchdog":
                self._thread.join()
            return
        self._unwatch()
        self._log.note(f"leaving at step {self.mark.step} ({self.mark.phase})")
        self._log.write("".join(traceback.format_exception(error)))
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].partition(" This is typically")[0]
        if not isinstance(error, UnitdistError):
            reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, Stopped):
            self._say("stopped", reason)
        elif lost_contact:
            self._say("lost contact", reason)
            self._report()
        elif isinstance(error, UnitdistError) and error.speaker not in (None, self._world.rank):
            self._say("told", reason)
        else:
            self._say("error", reason)
            self._write_summary(self._summary([self._record("error", reason)], unheard=[]))

    def _watch(self) -> None:
        beaten = 0.0
        while not self._closed.wait(self._tick_s):
            mark, now = self.mark, time.monotonic()
            limit_s = None if self._config.stuck_after_s is None else mark.limit_s
            if limit_s is None:
                faulthandler.cancel_dump_traceback_later()
            elif now - mark.since > limit_s:
                self._leave_stuck(limit_s)
            else:
                # Fires only if this thread is not let run for so long.
                patience = limit_s + self.grace_s + 2
                faulthandler.dump_traceback_later(patience, exit=True, file=self._log.file)
            if now - beaten >= self._beat_s:
                beaten = now
                self._say("running")

    def _leave_stuck(self, limit_s: float) -> None:
        if not self._leaves("watchdog"):
            return
        mark = self.mark
        self._log.note(
            f"stuck at step {mark.step} ({mark.phase}) for more than {limit_s:g} s (health.stuck_after_s); all stacks:"
        )
        faulthandler.dump_traceback(file=self._log.file, all_threads=True)
        self._say("stuck", f"no progress for {limit_s:g} s")
        self._report()
        sys.stdout.flush()
        os._exit(TrainingError.exit_code)

    def _report(self) -> None:
        """One rank waits for the others' words, names the first cause on stderr and in failure.txt."""
        try:
            mine = claims_report(self._folder, start=self._start)
        except OSError as error:
            self._warn(error)
            mine = self._world.is_main
        if mine:
            records = settled_records(self._folder, self._world, start=self._start, grace_s=self.grace_s)
            known = [record for record in records if record is not None]
            text = self._summary(known, unheard=[rank for rank, record in enumerate(records) if record is None])
            print("".join(f"unitdist: {line}\n" for line in text.splitlines()), end="", file=sys.stderr, flush=True)
            self._write_summary(text)

    def _summary(self, records: list[RankRecord], *, unheard: list[int]) -> str:
        return summarize(
            records, unheard=unheard, world=self._world, folder=self._folder, start=self._start, now=time.time()
        )

    def _write_summary(self, text: str) -> None:
        try:
            write_failure(self._folder, text)
        except OSError as error:
            self._warn(error)

    def _say(self, state: State, reason: str = "") -> None:
        with self._lock:
            if state == "running" and self._leaver is not None:
                return
            try:
                write_record(self._folder, self._record(state, reason))
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        """A disk that is full for a while must not end the training, nor hide a failure."""
        if not self._warned:
            self._warned = True
            print(
                f"unitdist: warning: {self._folder / 'ranks'} cannot be written: {error}", file=sys.stderr, flush=True
            )

    def _record(self, state: State, reason: str = "") -> RankRecord:
        mark = self.mark
        return RankRecord(
            start=self._start,
            rank=self._world.rank,
            host=host_name(),
            machine=self._machine,
            pid=os.getpid(),
            state=state,
            step=mark.step,
            phase=mark.phase,
            in_phase_s=round(time.monotonic() - mark.since, 1),
            at=round(time.time(), 3),
            where="" if state in ("running", "finished") else self._where(),
            reason=reason,
        )

    def _where(self) -> str:
        """The innermost Python frame of the training thread, and of unitdist's own code around it."""
        frame = sys._current_frames().get(self._thread_id)
        if frame is None:
            return "an unknown place"
        stack = traceback.extract_stack(frame)
        own = [entry for entry in stack if "unitdist" in Path(entry.filename).parts[-3:]]
        places = [stack[-1], *(entry for entry in own[-1:] if entry is not stack[-1])]
        return " under ".join(f"{Path(entry.filename).name}:{entry.lineno} in {entry.name}" for entry in places)
