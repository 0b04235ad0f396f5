"""The SLURM job script without SLURM: it is valid shell, and decides rightly when to be requeued."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = [sys.executable, "launch/slurm/submit.py"]
ARGUMENTS = ["--config", "imagenet_r101_unit", "--nodes", "2", "--gpus-per-node", "8"]


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SUBMIT, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of a job whose run folder is run/ beside it."""
    folder = tmp_path_factory.mktemp("job")
    shown = submit(
        *ARGUMENTS, "--partition=gpu", "--sbatch=--account=a", "--dry-run", f"run.folder={folder}", "run.name=run"
    )
    assert shown.returncode == 0, shown.stderr
    (folder / "job.sbatch").write_text(shown.stdout)
    return folder / "job.sbatch"


def test_header_asks_for_what_the_command_says(script: Path) -> None:
    header = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert header == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=48",
        "--time=24:00:00",
        f"--output={script.parent}/run/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@180",
        "--partition=gpu",
        "--account=a",
    ]


def test_script_is_valid_shell(script: Path) -> None:
    text = script.read_text()
    assert "{{" not in text
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    if shutil.which("shellcheck"):
        files = [script, ROOT / "launch" / "slurm" / "ignore-usr1"]
        checked = subprocess.run(["shellcheck", *files], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout


def test_torchrun_gets_what_its_restarts_need(script: Path) -> None:
    text = script.read_text()
    assert 0 < text.index("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n") < text.index("\nsrun ")
    command = text[text.index("\nsrun ") :].split(" &\n")[0]
    for part in (
        "launch/slurm/ignore-usr1",
        "--nproc-per-node=8",
        "--max-restarts=3",
        "--rdzv-conf=read_timeout=600,join_timeout=900",
        '--rdzv-id="$SLURM_JOB_ID.$restart"',
        "--resume auto",
    ):
        assert part in command


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nodes", "3", "--gpus-per-node", "8"], "64 is not a multiple of 24 ranks"),
        (["--nodes", "0", "--gpus-per-node", "8"], "--nodes >= 1"),
        (["--nodes", "2", "--gpus-per-node", "8", "run.folder=with space"], "run.folder: .* characters"),
    ],
)
def test_mistakes_are_found_before_the_queue(arguments: list[str], part: str) -> None:
    refused = submit("--config", "imagenet_r101_unit", *arguments, "--dry-run")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert re.search(part, refused.stderr), refused.stderr


STUBS = {
    # SLURM ends the batch shell after a requeue.
    "scontrol": 'echo "scontrol $*" >> "$CALLS"\ncase "$2" in hostnames) echo n1; echo n2 ;;'
    ' node) echo "NodeName=$4 NodeAddr=10.0.0.7 X=y" ;; esac\n[ "$1" != requeue ] || kill -9 $PPID',
    "scancel": 'echo "scancel $*" >> "$CALLS"; touch "$CALLS.asked"',
    "srun": 'echo "srun $*" >> "$CALLS"\nsh -c "$JOB" >&2',
}


class Job:
    """The job script as SLURM's batch shell, with srun, scontrol and scancel replaced."""

    def __init__(self, script: Path, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        for name, body in STUBS.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        self.run = tmp_path / "run"
        self.calls_file = tmp_path / "calls"
        self.script = tmp_path / "job.sbatch"
        self.script.write_text(script.read_text().replace(str(script.parent), str(tmp_path)))

    def start(self, body: str, **environment: str) -> subprocess.Popen[bytes]:
        slurm = {
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "48",
            "CALLS": str(self.calls_file),
            "STATUS": str(self.run / "status.json"),
            "PATH": f"{self.script.parent}/bin:{os.environ['PATH']}",
            "JOB": body,
        }
        with open(self.script.parent / "log", "ab") as log:
            return subprocess.Popen(
                ["bash", self.script],
                env={**os.environ, **slurm, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self, job: subprocess.Popen[bytes]) -> int:
        try:
            return job.wait(timeout=60)
        finally:
            try:
                os.killpg(job.pid, signal.SIGKILL)  # as SLURM does with what a job leaves behind
            except ProcessLookupError:
                pass

    def requeued(self) -> bool:
        return "scontrol requeue 12" in self.calls_file.read_text().splitlines()


def leaves(state: str, code: int, step: int = 7) -> str:
    return f"""echo '{{"state": "{state}", "step": {step}, "reason": "because"}}' > "$STATUS"; exit {code}"""


@pytest.mark.parametrize(
    ("body", "code", "requeued"),
    [
        pytest.param(leaves("finished", 0), 0, False, id="finished"),
        pytest.param(leaves("finished", 1), 0, False, id="finished, a launcher stumbled afterwards"),
        pytest.param(leaves("stopped", 0), -9, True, id="stopped"),
        pytest.param(leaves("stopped", 1), -9, True, id="stopped, torchrun leaves with 1"),
        pytest.param(leaves("failed", 1), 1, False, id="failed"),
        pytest.param(leaves("running", 1), 1, False, id="killed until max-restarts"),
        pytest.param("exit 2", 2, False, id="bad config"),
        pytest.param("exit 0", 1, False, id="left without a word"),
    ],
)
def test_requeue_follows_what_the_run_left_behind(
    script: Path, tmp_path: Path, body: str, code: int, requeued: bool
) -> None:
    job = Job(script, tmp_path)
    assert job.end(job.start(body)) == code
    assert job.requeued() == requeued
    launched = next(line for line in job.calls_file.read_text().splitlines() if line.startswith("srun "))
    assert "--rdzv-endpoint=10.0.0.7:20084 --rdzv-id=12.0 " in launched and "--cpus-per-task=48" in launched


def test_status_of_an_earlier_run_does_not_count(script: Path, tmp_path: Path) -> None:
    job = Job(script, tmp_path)
    job.run.mkdir()
    (job.run / "status.json").write_text('{"state": "finished", "step": 3, "reason": ""}\n')
    assert job.end(job.start("exit 2")) == 2 and not job.requeued()


def test_requeued_start_has_a_port_and_a_rendezvous_of_its_own(script: Path, tmp_path: Path) -> None:
    job = Job(script, tmp_path)
    job.end(job.start(leaves("finished", 0), SLURM_RESTART_COUNT="3"))
    assert "--rdzv-endpoint=10.0.0.7:20087 --rdzv-id=12.3 " in job.calls_file.read_text()


def test_three_starts_without_a_step_end_the_job(script: Path, tmp_path: Path) -> None:
    job = Job(script, tmp_path)
    codes = [job.end(job.start(leaves("stopped", 0, step=5), SLURM_RESTART_COUNT=str(start))) for start in range(4)]
    assert codes == [-9, -9, -9, 1]  # the first one took five steps


def wait_for(condition: Path) -> None:
    deadline = time.monotonic() + 30
    while not condition.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signal_is_passed_to_the_ranks_and_the_job_is_requeued(script: Path, tmp_path: Path) -> None:
    job = Job(script, tmp_path)
    asked = f"{job.calls_file}.asked"
    running = job.start(f"touch '{asked}.up'; while [ ! -e '{asked}' ]; do sleep 0.05; done; {leaves('stopped', 0)}")
    wait_for(Path(f"{asked}.up"))
    running.send_signal(signal.SIGUSR1)
    assert job.end(running) == -9 and job.requeued()
    assert "scancel --signal=USR1 12" in job.calls_file.read_text()


def test_job_that_slurm_ends_is_not_requeued_by_itself(script: Path, tmp_path: Path) -> None:
    job = Job(script, tmp_path)
    go = tmp_path / "go"
    running = job.start(f"touch '{go}.up'; while [ ! -e '{go}' ]; do sleep 0.05; done; {leaves('stopped', 1)}")
    wait_for(Path(f"{go}.up"))
    running.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    go.touch()
    assert job.end(running) == 1 and not job.requeued()
