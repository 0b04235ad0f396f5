"""A run killed in mid-epoch and resumed ends as the undisturbed one: the same bits."""

from pathlib import Path

import psutil
import torch

from tests.dist.jobs import assert_same_result, kill_at_step, record, start, wait_for_step
from tests.dist.launching import torchrun, train

CONFIG = str(Path(__file__).with_name("small.yaml"))


def test_killed_and_resumed_run_equals_the_undisturbed_run(sample_data: Path, tmp_path: Path) -> None:
    shared = [
        "--config", CONFIG, f"data.path={sample_data}", f"run.folder={tmp_path}", "checkpoint.every_steps=3", "train.ema_decay=0.9",
        "train.log_every_steps=2", "train.mixup_alpha=0.2", "train.epochs=3", "optim.lr=0.05", "analysis.every_epochs=1",
    ]  # fmt: skip
    undisturbed = train(torchrun(2), *shared, "run.name=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    for step in (8, 20):  # 12 steps an epoch: in the middle of the first, and of the second
        reached = kill_at_step([*shared, "run.name=killed", "--resume", "auto"], tmp_path / "killed", step)
        assert step <= reached < 36
    resumed = train(torchrun(2), *shared, "run.name=killed", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from" in resumed.stdout
    assert_same_result(tmp_path / "killed", tmp_path / "undisturbed")


def test_resume_moves_between_engines_and_world_sizes(sample_data: Path, tmp_path: Path) -> None:
    """10 steps under DDP on 2 ranks, 4 under ZeRO 2 and 4 under ZeRO 3, the rest in one process, against one undisturbed process."""
    shared = ["--config", CONFIG, f"data.path={sample_data}", f"run.folder={tmp_path}"]
    whole = train(torchrun(1), *shared, "run.name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    parts = [
        (2, ["train.max_steps=10"]),
        (2, ["train.max_steps=14", "train.engine=deepspeed", "train.zero_stage=2"]),
        (2, ["train.max_steps=18", "train.engine=deepspeed", "train.zero_stage=3"]),
        (1, []),
    ]
    for ranks, changes in parts:
        done = train(torchrun(ranks), *shared, "run.name=moved", "--resume", "auto", *changes)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout and "; the number of ranks was 2, is 1" in done.stdout
    losses = {
        name: [event["loss"] for event in record(tmp_path / name) if event["event"] == "train"]
        for name in ("whole", "moved")
    }
    assert len(losses["whole"]) == 24
    torch.testing.assert_close(torch.tensor(losses["moved"]), torch.tensor(losses["whole"]), rtol=2e-5, atol=0)


def test_workers_end_with_their_launcher(sample_data: Path, tmp_path: Path) -> None:
    job = start(
        ["--config", CONFIG, f"data.path={sample_data}", f"run.folder={tmp_path}", "run.name=a", "train.epochs=1000"]
    )
    try:
        wait_for_step(job, tmp_path / "a", 2)
        workers = psutil.Process(job.pid).children(recursive=True)
        ranks = [worker for worker in workers if "launch/train.py" in " ".join(worker.cmdline())]
        assert len(ranks) == 2
    finally:
        job.kill()
        job.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert alive == []
