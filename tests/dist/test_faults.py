"""Ranks that are killed, stopped or stuck: noticed, named, and nothing counted twice after the restart."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.dist.jobs import assert_same_result, end, ranks_of, start, wait_for_step
from tests.dist.launching import torchrun, train

CONFIG = str(Path(__file__).with_name("small.yaml"))
FAULTY = "tests/dist/faulty_train.py"
HOST = socket.gethostname()
QUICK = ["health.stuck_after_s=5", "health.stuck_after_first_s=100"]


def wait_for_file(path: Path, *, within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} within {within_s} s"
        time.sleep(0.05)
    return path.read_text()


@pytest.fixture
def shared(sample_data: Path, tmp_path: Path) -> list[str]:
    return ["--config", CONFIG, f"data.path={sample_data}", f"run.folder={tmp_path}", "optim.lr=0.05"]


def killed_rank(job: subprocess.Popen, run: Path, rank: int, step: int) -> str:
    """SIGKILL that rank once the record shows `step`; the summary of the failure."""
    (run / "failure.txt").unlink(missing_ok=True)
    wait_for_step(job, run, step)
    ranks_of(job.pid)[rank].kill()
    return wait_for_file(run / "failure.txt", within_s=30)


def test_killed_ranks_are_named_and_restarted_and_nothing_counts_twice(shared: list[str], tmp_path: Path) -> None:
    undisturbed = train(torchrun(2), *shared, "run.name=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    run = tmp_path / "killed"
    arguments = [*shared, "run.name=killed", "--resume", "auto", "checkpoint.every_steps=3"]
    job = start(arguments, max_restarts=3, output=tmp_path / "output")
    try:
        for rank, step in ((1, 4), (0, 16)):
            summary = killed_rank(job, run, rank, step)
            first = summary.splitlines()[1]
            assert first.startswith(f"first cause: rank {rank} on ") and "is gone: killed from outside" in first
            assert f"then: rank {1 - rank} on " in summary and " lost contact at step " in summary
        code = job.wait(timeout=200)
    finally:
        end(job)
    assert code == 0, (tmp_path / "output").read_text()[-3000:]
    assert "resumed from" in (tmp_path / "output").read_text()
    assert "unitdist: first cause: rank 0 on " in (tmp_path / "output").read_text()
    logs = [(run / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1)]
    assert all([log.count(f"(torchrun restart {restart})") for restart in range(3)] == [1, 1, 1] for log in logs)
    assert_same_result(run, tmp_path / "undisturbed")


def test_stopped_rank_is_named_by_the_others(shared: list[str], tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    job = start([*shared, *QUICK, "train.epochs=500", "run.name=stopped"], output=tmp_path / "output")
    try:
        wait_for_step(job, run, 3)
        stopped = ranks_of(job.pid)[1]
        stopped.send_signal(signal.SIGSTOP)
        summary = wait_for_file(run / "failure.txt", within_s=60)
        stopped.kill()  # torchrun would grant it 30 s
        code = job.wait(timeout=60)
    finally:
        end(job)
    assert code == 1
    first, waited = summary.splitlines()[1:3]
    assert first.startswith(f"first cause: rank 1 on {HOST} (pid {stopped.pid}) is stopped by a signal (SIGSTOP")
    assert waited.startswith(f"then: rank 0 on {HOST} ") and "waited for it at step " in waited
    assert "unitdist: first cause: rank 1 on " in (tmp_path / "output").read_text()
    assert "all stacks:" in (run / "logs" / "rank_00000.log").read_text()


@pytest.mark.parametrize("fault", ["sleep", pytest.param("gil", marks=pytest.mark.slow)])
def test_stuck_loader_is_named_with_all_stacks(fault: str, shared: list[str], tmp_path: Path) -> None:
    run = tmp_path / "stuck"
    faulty = {"FAULT": fault, "FAULT_RANK": "1", "FAULT_STEP": "5"}
    job = start([*shared, *QUICK, "run.name=stuck"], script=FAULTY, output=tmp_path / "output", **faulty)
    try:
        code = job.wait(timeout=200)
    finally:
        end(job)
    assert code == 1
    summary = (run / "failure.txt").read_text()
    first = summary.splitlines()[1]
    assert first.startswith("first cause: rank 1 on ")
    if fault == "sleep":
        assert "is stuck at step 5 (data)" in first and "faulty_train.py" in first
    else:
        assert "does not answer: its interpreter is blocked" in first
    assert "rank 0" in summary and "waited for it at step 5 (training)" in summary, summary
    stacks = (run / "logs" / "rank_00001.log").read_text()
    assert "faulty_fetch" in stacks and "train_epoch" in stacks
    assert "sum_over_group" in (run / "logs" / "rank_00000.log").read_text()


def test_error_of_one_rank_ends_the_job_at_once_and_is_the_first_cause(shared: list[str], tmp_path: Path) -> None:
    """The limit of the watchdog is far away: it is not what ends the job."""
    run = tmp_path / "raised"
    faulty = {"FAULT": "raise", "FAULT_RANK": "1", "FAULT_STEP": "5"}
    job = start([*shared, "run.name=raised"], script=FAULTY, output=tmp_path / "output", **faulty)
    try:
        code = job.wait(timeout=120)
    finally:
        end(job)
    assert code == 1
    summary = (run / "failure.txt").read_text().splitlines()
    assert summary[1].endswith("failed at step 5 (data): ValueError: a fault put in by a test")
    assert summary[2].startswith("then: rank 0 on ") and " lost contact at step 5 " in summary[2]
    assert "Traceback" in (run / "logs" / "rank_00001.log").read_text()
    output = (tmp_path / "output").read_text()
    assert "ValueError: a fault put in by a test" in output.partition("Root Cause")[2]
    assert json.loads((run / "ranks" / "rank_00001.json").read_text())["state"] == "error"
