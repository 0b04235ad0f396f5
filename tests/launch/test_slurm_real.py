"""A real SLURM on this machine: submit.py's job on two nodes is preempted, requeued, resumed, and ends as undisturbed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.jobs import assert_same_result, record_safely
from tests.dist.launching import ROOT, environment, torchrun, train
from tests.launch.slurm_here import running_slurm, why_not

CONFIG = str(ROOT / "tests" / "dist" / "small.yaml")


def job_fields(job: str, slurm: dict[str, str]) -> dict[str, str]:
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job], env=slurm, capture_output=True, text=True, timeout=30
    )
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def wait_until(condition: Callable[[], bool], what: str, log: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preempted_job_is_requeued_and_ends_as_undisturbed(sample_data: Path, tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    shared = [f"data.path={sample_data}", f"run.folder={tmp_path}", "optim.lr=0.05", "train.epochs=4"]
    undisturbed = train(torchrun(2), "--config", CONFIG, *shared, "run.name=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    run = tmp_path / "preempted"
    with running_slurm(tmp_path / "slurm") as slurm:
        # The production header: one rank on each of two nodes, a GPU each (a null device).
        command = ["--config", CONFIG, "--nodes=2", "--gpus-per-node=1", "--partition=debug", "--time=1:00:00"]
        submitted = subprocess.run(
            [sys.executable, "launch/slurm/submit.py", *command, *shared, "run.name=preempted"],
            cwd=ROOT,
            env=environment() | {"SLURM_CONF": slurm["SLURM_CONF"]},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert submitted.returncode == 0, submitted.stderr
        job = submitted.stdout.split()[-1]
        log = run / f"slurm-{job}.log"
        try:
            metrics = run / "metrics.jsonl"
            wait_until(
                lambda: metrics.exists() and any(event["step"] >= 5 for event in record_safely(run)), "no step 5", log
            )
            # What SLURM itself sends ahead of a time limit: --signal=B:USR1@S.
            subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True, timeout=30)
            wait_until(lambda: job_fields(job, slurm).get("Restarts") == "1", "not requeued", log)
            assert json.loads((run / "status.json").read_text())["state"] == "stopped"
            time.sleep(3)  # credentials have whole-second stamps
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, check=True, timeout=30)
            wait_until(lambda: job_fields(job, slurm)["JobState"] == "COMPLETED", "not finished", log)
        finally:
            subprocess.run(["scancel", job], env=slurm, timeout=30)
        assert job_fields(job, slurm)["Restarts"] == "1"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    text = log.read_text()
    assert "asking all ranks to save" in text and "resumed from" in text
    assert_same_result(run, tmp_path / "undisturbed")
