"""Jobs over two nodes as each launcher starts them, here both on this machine with one rank each."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import BIN, ROOT, environment, launch

LAUNCH = ROOT / "launch"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def srun_tasks(port: str) -> list[tuple[list[str], dict[str, str]]]:
    """Two tasks of one step on one node, without torchrun."""
    step = {"SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"} for rank in ("0", "1")]
    return [([sys.executable], step | rank) for rank in ranks]


def accelerate_nodes(port: str) -> list[tuple[list[str], dict[str, str]]]:
    config = str(LAUNCH / "accelerate" / "ddp_2nodes.yaml")
    here = ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    command = [str(BIN / "accelerate"), "launch", "--config_file", config, *here]
    return [([*command, f"--machine_rank={node}"], {}) for node in (0, 1)]


def deepspeed_nodes(port: str, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    hostfile = folder / "hostfile"
    hostfile.write_text((LAUNCH / "deepspeed" / "hostfile").read_text().replace("slots=8", "slots=1"))
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--master_addr=127.0.0.1"]
    return [([*command, f"--master_port={port}", f"--node_rank={node}"], {}) for node in (0, 1)]


@pytest.mark.parametrize(
    "launcher", ["srun", "mpirun", "accelerate", pytest.param("deepspeed", marks=pytest.mark.slow)]
)
def test_two_nodes_are_one_training(launcher: str, sample_data: Path, tmp_path: Path) -> None:
    port = free_port()
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    nodes = {
        "mpirun": lambda: [(["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable], {})],
        "srun": lambda: srun_tasks(port),
        "accelerate": lambda: accelerate_nodes(port),
        "deepspeed": lambda: deepspeed_nodes(port, tmp_path),
    }[launcher]()
    small = [
        "--config",
        "tests/dist/small.yaml",
        f"data.path={sample_data}",
        f"run.folder={tmp_path}",
        "run.name=small",
    ]
    jobs = [
        subprocess.Popen(
            [*command, "launch/train.py", *small, "train.max_steps=2"],
            cwd=ROOT,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, extra in nodes
    ]
    try:
        outputs = [job.communicate(timeout=200)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert not any(job.returncode for job in jobs), "\n".join(outputs)[-4000:]
    assert "2 ranks x" in "\n".join(outputs)
    assert json.loads((tmp_path / "small" / "status.json").read_text()) == {
        "state": "finished",
        "step": 2,
        "reason": "",
    }


@pytest.mark.parametrize(
    ("surroundings", "part"),
    [
        ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4"}, "start with srun python ..., or"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "4 lonely trainings",
        ),
    ],
)
def test_lonely_training_is_refused_in_one_line(surroundings: dict[str, str], part: str) -> None:
    refused = launch([sys.executable, "launch/train.py", "--config", "demo.yaml"], timeout_s=100, **surroundings)
    assert refused.returncode == 2
    assert part in refused.stderr and len(refused.stderr.splitlines()) == 1
