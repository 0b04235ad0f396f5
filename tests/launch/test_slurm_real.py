"""A real SLURM on this machine: submit.py's job on two nodes is preempted, requeued, resumed, and ends as undisturbed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


def wait_until(condition: Callable[[], bool], what: str, log: Path, timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that reaches it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running_slurm(tmp_path_factory.mktemp("slurm") / "state") as surroundings:
        yield environment() | {"SLURM_CONF": surroundings["SLURM_CONF"]}


def submit(slurm: dict[str, str], *arguments: str) -> str:
    """The job's number. The production header: one rank on each of two nodes, a GPU each (a null device)."""
    command = ["--nodes=2", "--gpus-per-node=1", "--partition=debug", "--time=1:00:00", *arguments]
    submitted = subprocess.run(
        [sys.executable, "launch/slurm/submit.py", *command],
        cwd=ROOT,
        env=slurm,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.split()[-1]


def node_states(slurm: dict[str, str]) -> list[str]:
    shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=slurm, capture_output=True, text=True, timeout=30)
    return shown.stdout.split()


def has_reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(event["step"] >= step for event in record_safely(run))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preempted_job_is_requeued_and_ends_as_undisturbed(
    slurm: dict[str, str], sample_data: Path, tmp_path: Path
) -> None:
    shared = [
        "--config",
        CONFIG,
        f"data.path={sample_data}",
        f"run.folder={tmp_path}",
        "optim.lr=0.05",
        "train.epochs=4",
    ]
    undisturbed = train(torchrun(2), *shared, "run.name=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    run = tmp_path / "preempted"
    job = submit(slurm, *shared, "run.name=preempted")
    log = run / f"slurm-{job}.log"
    try:
        wait_until(lambda: has_reached(run, 5), "no step 5", log)
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cancelled_job_stays_cancelled(slurm: dict[str, str], sample_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "cancelled"
    shared = ["--config", CONFIG, f"data.path={sample_data}", f"run.folder={tmp_path}", "train.epochs=500"]
    job = submit(slurm, *shared, "run.name=cancelled")
    log = run / f"slurm-{job}.log"
    wait_until(lambda: has_reached(run, 2), "no step 2", log)
    subprocess.run(["scancel", job], env=slurm, check=True, timeout=30)
    wait_until(lambda: node_states(slurm) == ["idle"], "the nodes are not free", log)
    fields = job_fields(job, slurm)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_srun_starts_the_ranks_itself(slurm: dict[str, str], sample_data: Path, tmp_path: Path) -> None:
    shared = [
        "--config",
        CONFIG,
        f"data.path={sample_data}",
        f"run.folder={tmp_path}",
        "run.name=srun",
        "train.max_steps=2",
    ]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--immediate=60", sys.executable, "launch/train.py"]
    done = subprocess.run([*srun, *shared], cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16 = 2 ranks x" in done.stdout
    assert json.loads((tmp_path / "srun" / "status.json").read_text())["state"] == "finished"
