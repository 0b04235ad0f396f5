"""The faults of chaos.py. Each is done to the job and returns, in words, what became of it."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos_job import GUARD_S, Job

LEFT_FREE = 256 * 1024
"""Bytes that a full disk has left: enough for a line of the record, too little for a checkpoint."""


def kill_rank(job: Job, draw: random.Random) -> str:
    rank, starts = draw.randrange(2), job.rank_starts()
    job.ranks()[rank].kill()
    job.wait_for(starts=starts + 1)
    return f"SIGKILL to rank {rank}; {first_cause(job, f'rank {rank} ')}"


def kill_all(job: Job, draw: random.Random) -> str:
    job.kill()
    return "SIGKILL to every process and launcher"


def lose_node(job: Job, draw: random.Random) -> str:
    """Two nodes: the second one dies with its launcher, and another takes its place."""
    starts = job.rank_starts()
    job.kill(node=1)
    job.wait_for(starts=starts + 1)
    return "SIGKILL to all of the second node, which is replaced"


def stop_rank(job: Job, draw: random.Random) -> str:
    """Stopped for ever, until the watchdog of the other one has ended the job; then killed, as torchrun does after 30 s."""
    rank, starts = draw.randrange(2), job.rank_starts()
    stopped, failure = job.ranks()[rank], job.run / "failure.txt"
    failure.unlink(missing_ok=True)
    stopped.send_signal(signal.SIGSTOP)
    wait(failure.exists, "the watchdog did not name the stopped rank")
    stopped.kill()
    job.wait_for(starts=starts + 1)
    return f"SIGSTOP to rank {rank}; {first_cause(job, f'rank {rank} ')}"


def signal_job(job: Job, draw: random.Random) -> str:
    for launcher in job.launchers:
        launcher.send_signal(signal.SIGTERM)
    return stopped_in_order(job, "SIGTERM to the launchers")


def signal_rank(job: Job, draw: random.Random) -> str:
    rank = draw.randrange(2)
    job.ranks()[rank].send_signal(signal.SIGUSR1)
    return stopped_in_order(job, f"SIGUSR1 to rank {rank}")


def stopped_in_order(job: Job, what: str) -> str:
    for launcher in job.launchers:
        launcher.wait(timeout=GUARD_S)
    if job.state() != "stopped":
        raise AssertionError(f"{what}: the run is {job.state()}, not stopped; see {job.output}")
    return f"{what}: all ranks saved and left"


def torn_checkpoint(job: Job, draw: random.Random) -> str:
    kill_with_two_checkpoints(job)
    files = newest_checkpoints(job.run)
    for file in files:
        os.truncate(file, file.stat().st_size * draw.randrange(5, 95) // 100)
    return f"SIGKILL to all, {names(files)} cut short"


def flipped_bit(job: Job, draw: random.Random) -> str:
    kill_with_two_checkpoints(job)
    files = newest_checkpoints(job.run)
    place = draw.uniform(0.3, 0.7)
    for file in {file.stat().st_ino: file for file in files}.values():
        with open(file, "r+b") as content:
            content.seek(int(place * file.stat().st_size))
            byte = content.read(1)[0]
            content.seek(-1, os.SEEK_CUR)
            content.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return f"SIGKILL to all, one bit flipped in {names(files)}"


def kill_with_two_checkpoints(job: Job) -> None:
    """So that one is left when the newest is damaged: a run whose only checkpoint is damaged rightly refuses to start."""
    wait(lambda: len(list(job.run.glob("step_*.pt"))) >= 2, "there were no two checkpoints")
    job.kill()


def full_disk(job: Job, draw: random.Random) -> str:
    """The file system of the run is full until a save has failed. The run goes on meanwhile."""
    starts, seen = job.rank_starts(), job.output.read_text().count("cannot write the checkpoint")
    ballast = job.run / "ballast"
    try:
        with open(ballast, "wb") as file:
            state = os.statvfs(job.run)
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - LEFT_FREE)
        wait(lambda: job.output.read_text().count("cannot write the checkpoint") > seen, "no save failed")
    finally:
        ballast.unlink()
    if job.rank_starts() != starts:
        raise AssertionError(f"a full disk ended the training; see {job.output}")
    return "disk full until a save failed; training went on"


def cut_network(job: Job, draw: random.Random) -> str:
    assert job.nodes is not None
    starts, seconds = job.rank_starts(), draw.randrange(5, 11)
    job.nodes.cut()
    time.sleep(seconds)
    job.nodes.restore()
    step = job.step()
    job.wait_for_step(step + 1)
    return f"network cut for {seconds} s; " + ("training went on" if job.rank_starts() == starts else "ranks restarted")


def first_cause(job: Job, named: str) -> str:
    """The summary's first cause. Raises AssertionError when that is not who was hit."""
    line = (job.run / "failure.txt").read_text().splitlines()[1]
    if not line.startswith(f"first cause: {named}"):
        raise AssertionError(f"the failure of {named}was blamed on another: {line}")
    return "the summary names it"


def newest_checkpoints(run: Path) -> list[Path]:
    """last.pt and whatever else holds the same step: the same file under another name, or written with it."""
    last = run / "last.pt"
    newest = [file for file in run.glob("*.pt") if file.samefile(last)]
    return sorted(newest)


def names(files: list[Path]) -> str:
    return " and ".join(file.name for file in files)


def wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.1)


ANYWHERE = (kill_rank, signal_rank, kill_all, stop_rank, signal_job)
WITH_CHECKPOINTS = (torn_checkpoint, flipped_bit)
ON_TWO_NODES = (cut_network, lose_node)
ON_TMPFS = (full_disk,)
