"""Jobs that a test watches and disturbs: the record they write, and their processes."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import torch

from tests.dist.launching import ROOT, environment, torchrun

TIMING = ("images_per_s", "data_wait_share", "seconds", "save_stall_s", "analysis/seconds")


def record(run: Path) -> list[dict]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key not in TIMING} for event in events]


def start(
    arguments: list[str],
    *,
    max_restarts: int = 0,
    script: str = "launch/train.py",
    output: Path | None = None,
    **extra: str,
) -> subprocess.Popen:
    """Two ranks of `script` under torchrun, their output in `output`, if any; `extra`: environment variables."""
    command = [*torchrun(2), f"--max-restarts={max_restarts}", script, *arguments]
    with open(output or os.devnull, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(**extra), stdout=file, stderr=file)


def ranks_of(launcher_pid: int) -> list[psutil.Process]:
    """The processes of the ranks, in their order."""
    children = psutil.Process(launcher_pid).children(recursive=True)
    ranks = [child for child in children if "train.py" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def end(job: subprocess.Popen) -> None:
    """Whatever is left of the job."""
    if job.poll() is None:
        for process in reversed([psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]):
            process.kill()
    job.wait()


def wait_for_step(job: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert job.poll() is None, "the job ended before it could be killed"
        if (run / "metrics.jsonl").exists() and any(event["step"] >= step for event in record_safely(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in time")


def kill_at_step(arguments: list[str], run: Path, step: int) -> int:
    """Start the job; SIGKILL all of its processes once the record shows `step`; returns the last step recorded."""
    job = start(arguments)
    try:
        wait_for_step(job, run, step)
    finally:
        processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        for process in reversed(processes):
            process.kill()
        job.wait()
        psutil.wait_procs(processes, timeout=20)
    return max(event["step"] for event in record_safely(run))


def record_safely(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def assert_same_result(run: Path, reference: Path) -> None:
    """Weights, averaged weights, momentum, counters and metrics are the same, bit for bit."""
    for name in ("last.pt", "best.pt"):
        ours = torch.load(run / name, weights_only=True)
        theirs = torch.load(reference / name, weights_only=True)
        for part in ("model", "model_ema") if theirs["model_ema"] else ("model",):
            assert ours[part].keys() == theirs[part].keys()
            different = [key for key, value in ours[part].items() if not torch.equal(value, theirs[part][key])]
            assert different == []
        assert (ours["epoch"], ours["step"], ours["metrics"]) == (theirs["epoch"], theirs["step"], theirs["metrics"])
        for key, value in ours["optimizer"]["state"].items():
            assert torch.equal(value["momentum_buffer"], theirs["optimizer"]["state"][key]["momentum_buffer"])
    assert record(run) == record(reference)
