"""Run an experiment: every arm and seed as a training run of its own, resumable, one per device at a time."""

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paper_experiments import Arm, Experiment
from paper_subset import write_mnist_subset

from unitdist.config_file import load_config
from unitdist.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
COMMIT_FILE = "commit.txt"
"""In each run folder: the commit that the run was last started from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training run: its arm and seed, its folder, its overrides of the experiment's config."""

    arm: Arm
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm.name} seed {self.seed}"


def run_experiment(
    experiment: Experiment,
    arms: tuple[Arm, ...],
    seeds: list[int],
    runs: Path,
    data: str | None,
    settings: list[str],
    jobs: int | None,
) -> int:
    """Train all arms and seeds that are not finished; returns the number of runs that failed.

    Raises ConfigError before anything is trained if one of the runs' configs is wrong.
    """
    if not data:
        raise ConfigError(f"--data: give the folder of {load_config(config_path(experiment)).data.dataset}")
    if experiment.num_train is not None:
        data = str(write_mnist_subset(Path(data), runs / experiment.name / "data", experiment.num_train))
    return run_all(experiment, plan_runs(experiment, arms, seeds, runs, data, settings), jobs)


def plan_runs(
    experiment: Experiment, arms: tuple[Arm, ...], seeds: list[int], runs: Path, data: str, settings: list[str]
) -> list[Plan]:
    """All runs, seed by seed, so that an interrupted experiment has whole comparisons. Checks every config."""
    plans = []
    for seed in seeds:
        for arm in arms:
            folder = run_folder(runs, experiment, arm, seed)
            overrides = [*arm.overrides, f"run.seed={seed}", f"run.folder={folder.parent}", f"run.name={folder.name}"]
            overrides += [f"data.path={data}", *settings]
            load_config(config_path(experiment), overrides)
            plans.append(Plan(arm=arm, seed=seed, folder=folder, overrides=tuple(overrides)))
    return plans


def config_path(experiment: Experiment) -> Path:
    return ROOT / "configs" / "paper" / experiment.config


def run_folder(runs: Path, experiment: Experiment, arm: Arm, seed: int) -> Path:
    return runs / experiment.name / f"{arm.name}_seed{seed}"


def epoch_records(folder: Path) -> list[dict[str, Any]]:
    """The epoch records of a run's metrics.jsonl, in order; none where there is no run. A torn last line is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record.get("event") == "epoch":
            records.append(record)
    return records


def is_finished(plan: Plan, experiment: Experiment) -> bool:
    """Whether the run's last epoch is in its records."""
    records = epoch_records(plan.folder)
    return bool(records) and records[-1]["epoch"] >= load_config(config_path(experiment), plan.overrides).train.epochs


def run_all(experiment: Experiment, plans: list[Plan], jobs: int | None) -> int:
    """Train what is not finished, one run per GPU (without a GPU: `jobs` at a time); returns the number of failures.

    A failed run is reported and does not stop the others; started again, it goes on from its last checkpoint.
    """
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    if gpus and jobs and jobs > len(gpus):
        raise ConfigError(f"--jobs: {jobs} runs at a time on {len(gpus)} GPUs; a GPU takes one run at a time")
    slots: list[str | None] = [*gpus[: jobs or len(gpus)]] or [None] * (jobs or 1)
    waiting: queue.SimpleQueue[Plan] = queue.SimpleQueue()
    for plan in plans:
        if is_finished(plan, experiment):
            print(f"{plan.name}: finished already")
        else:
            waiting.put(plan)
    failed: list[Plan] = []
    workers = [threading.Thread(target=_work, args=(experiment, waiting, failed, slot)) for slot in slots]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(failed)


def _work(experiment: Experiment, waiting: "queue.SimpleQueue[Plan]", failed: list[Plan], gpu: str | None) -> None:
    while True:
        try:
            plan = waiting.get_nowait()
        except queue.Empty:
            return
        plan.folder.mkdir(parents=True, exist_ok=True)
        (plan.folder / COMMIT_FILE).write_text(current_commit() + "\n")
        log = plan.folder / "log.txt"
        print(f"{plan.name}: training, log in {log}", flush=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        with open(log, "a") as file:
            code = subprocess.call(command(experiment, plan), stdout=file, stderr=file, env=environment, cwd=ROOT)
        if code:
            failed.append(plan)
            last = (log.read_text().splitlines() or ["no output"])[-1]
            print(f"{plan.name}: failed with exit code {code}: {last}", file=sys.stderr, flush=True)
        else:
            print(f"{plan.name}: done", flush=True)


def command(experiment: Experiment, plan: Plan) -> list[str]:
    """The command line of one run: what a user would type, but it does not outlive this process (it would hold the folder)."""
    script, config = ROOT / "launch" / "train.py", config_path(experiment)
    return [
        sys.executable,
        str(script),
        "--config",
        str(config),
        "--resume",
        "auto",
        "--end-with-parent",
        *plan.overrides,
    ]


def current_commit() -> str:
    """The repository's commit, with -dirty where files differ from it; "unknown" outside a repository."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
