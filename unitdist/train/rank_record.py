"""What the ranks say of themselves in ranks/rank_NNNNN.json of the run folder, without collectives.

Read only when something went wrong, or by a person. One small file a rank, replaced at every heartbeat: a job of 1000 ranks
writes some 33 a second at the default `health.stuck_after_s`, and nobody reads them while all is well.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from unitdist.world import World

State = Literal["running", "stuck", "error", "lost contact", "told", "stopped", "finished"]


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One rank at one moment.

    `start` names the start of the job that it belongs to; `machine` is the kernel and pid namespace in which `pid` is meant
    ("" where unknown); `at` is the time of writing (seconds since 1970, this host's clock), `in_phase_s` how long the rank had been
    in `phase`; `where` is the innermost Python frame of the training thread, `reason` what went wrong.
    """

    start: str
    rank: int
    host: str
    machine: str
    pid: int
    state: State
    step: int
    phase: str
    in_phase_s: float
    at: float
    where: str = ""
    reason: str = ""


def record_path(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank_{rank:05d}.json"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record. Raises OSError."""
    path = record_path(folder, record.rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_records(folder: Path, world: World, *, start: str) -> list[RankRecord | None]:
    """Every rank's record of this start, in rank order; None where there is none."""
    records: list[RankRecord | None] = []
    for rank in range(world.size):
        try:
            record = RankRecord(**json.loads(record_path(folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # absent, or another version's
            records.append(None)
            continue
        records.append(record if record.start == start else None)
    return records


def this_machine() -> str:
    """Kernel boot and pid namespace, so that a pid of a record is only looked up where it means that process; "" elsewhere than Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_state(record: RankRecord) -> Literal["alive", "gone", "stopped", "unknown"]:
    """Of the record's process; "unknown" where it runs on another machine. "stopped": by a signal such as SIGSTOP."""
    if not record.machine or record.machine != this_machine():
        return "unknown"
    try:
        stat = Path(f"/proc/{record.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    letter = stat.rpartition(")")[2].split()[0]
    return "gone" if letter in "ZXx" else "stopped" if letter in "Tt" else "alive"


def host_name() -> str:
    return socket.gethostname()
