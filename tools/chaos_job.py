"""The training that chaos.py disturbs: its launchers, its ranks, and what it writes."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from two_nodes import TwoNodes

ROOT = Path(__file__).resolve().parent.parent
RESTARTS = 100
GUARD_S = 900.0
"""Longest wait for anything; a guard against hangs, not a measurement."""

SETTINGS = [
    "--config", "demo.yaml", "--resume", "auto", "model.name=cifar_resnet20", "data.image_size_px=32", "data.scale_range_px=[36,48]",
    "data.val_resize_px=36", "data.global_batch_size=16", "data.val_batch_size=80", "optim.lr=0.05", "train.log_every_steps=1",
    "checkpoint.every_steps=3", "analysis.every_epochs=0", "health.stuck_after_s=20", "health.stuck_after_first_s=300",
]  # fmt: skip
"""Small, but with all that has a state: sample order, augmentation, momentum, schedule, running statistics."""


@dataclass(kw_only=True)
class Job:
    """Two ranks of launch/train.py under torchrun, on one node or on two; started again when it has ended unfinished."""

    run: Path
    arguments: list[str]
    output: Path
    nodes: TwoNodes | None = None
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        """Every launcher that is not running: of two nodes one alone may be missing."""
        count = 1 if self.nodes is None else 2
        self.launchers += [self._launch(node) for node in range(len(self.launchers), count)]
        self.launchers = [
            launcher if launcher.poll() is None else self._launch(node) for node, launcher in enumerate(self.launchers)
        ]

    def _launch(self, node: int) -> subprocess.Popen[bytes]:
        self.starts += node == 0
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        if self.nodes is None:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            launcher += [f"--max-restarts={RESTARTS}"]
        else:
            launcher = self.nodes.torchrun(node, max_restarts=RESTARTS)
            environment |= self.nodes.environment(node)
        with open(self.output, "ab") as file:
            return subprocess.Popen(
                [*launcher, "launch/train.py", *self.arguments], cwd=ROOT, env=environment, stdout=file, stderr=file
            )

    def tend(self) -> None:
        """As a scheduler does: what has ended before the run is finished is started again.

        With two nodes the head must not be missing: without it the other launcher cannot go on, so both start anew.
        """
        if self.state() == "finished" or all(launcher.poll() is None for launcher in self.launchers):
            return
        if self.launchers[0].poll() is not None:
            self.kill()
        self.start()

    def wait_for_step(self, step: int) -> None:
        """Until ranks that run now have recorded `step`. Raises TimeoutError, and RuntimeError when the run is finished before."""
        deadline = time.monotonic() + GUARD_S
        while not (self.records_now() and self.step() >= step):
            if self.state() == "finished":
                raise RuntimeError(f"the run was finished before step {step}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} was not reached; see {self.output}")
            self.tend()
            time.sleep(0.1)

    def wait_until_finished(self) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + GUARD_S
        while self.state() != "finished" or any(launcher.poll() is None for launcher in self.launchers):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run was not finished; see {self.output}")
            self.tend()
            time.sleep(0.1)

    def wait_for(self, *, starts: int) -> None:
        """Until the ranks were started `starts` times in all, by torchrun or by us. Raises TimeoutError."""
        deadline = time.monotonic() + GUARD_S
        while self.rank_starts() < starts:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no start number {starts}; see {self.output}")
            self.tend()
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        found = []
        for launcher in self.launchers:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
                try:
                    if "launch/train.py" in process.cmdline() and "RANK" in process.environ():
                        found.append((int(process.environ()["RANK"]), process))
                except psutil.Error:
                    continue
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def kill(self, node: int | None = None) -> None:
        """SIGKILL all processes of the job, or of one of its nodes."""
        for launcher in self.launchers if node is None else [self.launchers[node]]:
            if launcher.poll() is None:
                family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
                for process in family:
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        continue
                psutil.wait_procs(family[1:], timeout=30)
            launcher.wait()

    def records_now(self) -> bool:
        """True once the ranks that run now have written to the record, which a start first cuts back to where it goes on."""
        ranks, record = self.ranks(), self.run / "metrics.jsonl"
        try:
            return len(ranks) == 2 and record.exists() and record.stat().st_mtime > ranks[0].create_time()
        except psutil.NoSuchProcess:
            return False

    def step(self) -> int:
        """The last step of the record, 0 before there is one."""
        return max((event["step"] for event in read_record(self.run)), default=0)

    def state(self) -> str:
        try:
            return str(json.loads((self.run / "status.json").read_text())["state"])
        except (FileNotFoundError, ValueError):
            return "none"

    def rank_starts(self) -> int:
        log = self.run / "logs" / "rank_00000.log"
        return log.read_text().count("=== start ") if log.exists() else 0

    def resumed_steps(self) -> list[int]:
        """The step at which each start went on."""
        return [
            int(step) for step in re.findall(r"^resumed from .* at step (\d+) ", self.output.read_text(), re.MULTILINE)
        ]


def read_record(run: Path) -> list[dict[str, object]]:
    """The events of metrics.jsonl; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
