"""The summary of a failure: which rank came first, which only followed."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from unitdist.train.rank_record import RankRecord, process_state, read_records
from unitdist.wording import counted
from unitdist.world import World

PHASE_ORDER = ("start", "validation", "analysis", "checkpoint", "data", "training")
"""The order of phases at the same number of steps done: of ranks that are stuck, the first in this order keeps the others."""

_SHOWN = 8


def settled_records(folder: Path, world: World, *, start: str, grace_s: float) -> list[RankRecord | None]:
    """Every rank's record, once each has said why it does not go on, or is gone; after `grace_s` at the latest."""
    deadline = time.monotonic() + grace_s
    while True:
        records = read_records(folder, world, start=start)
        waiting = [
            record is None or (record.state == "running" and process_state(record) in ("alive", "unknown"))
            for record in records
        ]
        if not any(waiting) or time.monotonic() > deadline:
            return records
        time.sleep(0.2)


def claims_report(folder: Path, *, start: str) -> bool:
    """True for one of the ranks that notice the failure of this start: it reports for all."""
    try:
        os.close(os.open(folder / "ranks" / f"report_{start}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def write_failure(folder: Path, text: str) -> None:
    """failure.txt: the last failure. Raises OSError."""
    temporary = folder / ".failure.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "failure.txt")


def summarize(
    records: Sequence[RankRecord], *, unheard: Sequence[int], world: World, folder: Path, start: str, now: float
) -> str:
    """The failure in some lines, first cause first. `records` of the ranks that said something, `unheard`: ranks that did not.

    Ranks that vanished or fell silent come first, then errors by time, then, of those that are stuck, the one the least
    far on; ranks that waited for the others, or lost contact, come last. Where all are stuck at one place no rank is the cause.
    """
    silent = sorted((record for record in records if record.state == "running"), key=_progress)
    errors = sorted((record for record in records if record.state == "error"), key=lambda record: record.at)
    stuck = sorted((record for record in records if record.state == "stuck"), key=_progress)
    lost = [record for record in records if record.state == "lost contact"]
    causes = [_of_silent(record, now) for record in silent]
    causes += [
        f"rank {rank}: nothing was heard of it in {folder / 'ranks'} (does its node share the run folder?)"
        for rank in unheard
    ]
    causes += [f"{_who(record)} failed {_at(record)}: {record.reason}" for record in errors]
    first = [] if causes else [record for record in stuck if _progress(record) == _progress(stuck[0])]
    if len(first) == world.size > 1:
        causes += [
            f"all {world.size} ranks are stuck {_at(first[0])}, none of them behind the others; look at the network between them, and "
            "at where each stands"
        ]
    causes += [
        f"{_who(record)} is stuck {_at(record)}, for {record.in_phase_s:.0f} s, at {record.where}" for record in first
    ]
    effects = [
        f"{_who(record)} waited for it {_at(record)}, at {record.where}" for record in stuck if record not in first
    ]
    effects += [f"{_who(record)} lost contact {_at(record)}: {record.reason}" for record in lost]
    if not causes:
        causes = ["no rank gave a reason of its own; look at the network between them"]
    if silent and (stuck or lost):
        causes[0] += f"; the others stood at step {max(record.step for record in stuck + lost)}"
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now))
    lines = [
        f"failure of the start {start} of {counted(world.size, 'rank')}, noticed {moment}",
        f"first cause: {causes[0]}",
    ]
    lines += _shortened([f"also: {cause}" for cause in causes[1:]])
    lines += _shortened([f"then: {effect}" for effect in effects])
    lines += [f"every rank's log, with the stacks of those that were stuck: {folder / 'logs'}"]
    return "\n".join(lines) + "\n"


def _progress(record: RankRecord) -> tuple[int, int]:
    order = PHASE_ORDER.index(record.phase) if record.phase in PHASE_ORDER else len(PHASE_ORDER)
    return record.step, order


def _who(record: RankRecord) -> str:
    return f"rank {record.rank} on {record.host} (pid {record.pid})"


def _at(record: RankRecord) -> str:
    return f"at step {record.step} ({record.phase})"


def _of_silent(record: RankRecord, now: float) -> str:
    what = {
        "gone": "is gone: killed from outside, or crashed",
        "stopped": "is stopped by a signal (SIGSTOP or a debugger)",
        "alive": "does not answer: its interpreter is blocked",
        "unknown": "does not answer: its process is killed, stopped or blocked, or its node is cut off",
    }[process_state(record)]
    return f"{_who(record)} {what}; last heard of {_at(record)}, {max(0.0, now - record.at):.0f} s before"


def _shortened(lines: list[str]) -> list[str]:
    return (
        lines
        if len(lines) <= _SHOWN
        else [*lines[:_SHOWN], f"and {counted(len(lines) - _SHOWN, 'more rank')} likewise"]
    )
