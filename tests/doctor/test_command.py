"""python -m unitdist doctor, as typed: exit codes, JSON, two ranks."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

DOCTOR = ["-m", "unitdist", "doctor"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=280, env=ENVIRONMENT | environment
    )


def test_faults_are_the_exit_code_and_json_holds_them(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run(*DOCTOR, "--json", "--port", str(port), "--data", str(tmp_path / "none"))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "unitdist-doctor-1"
    faults = {finding["area"]: finding for finding in report["findings"] if finding["level"] == "fault"}
    assert report["faults"] == len(faults) and {"port", "data"} <= set(faults)
    assert all(finding["remedy"] for finding in faults.values())
    assert {"Python", "torch", "GPUs", "NCCL", "torchvision", "timm", "accelerate", "DALI", "DeepSpeed", "Triton"} <= {
        finding["area"] for finding in report["findings"]
    }


def test_what_cannot_be_used_leaves_with_2() -> None:
    for arguments, words in (
        (["--port", "70000"], "--port: must be in 1..65535"),
        (["optim.lr=1"], "section.key=value needs --config"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--config", "demo.yaml", "data.paths=x"], "did you mean path"),
    ):
        done = run(*DOCTOR, *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_two_ranks_compare_versions_and_clocks() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(*torchrun, *DOCTOR)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ok +clocks +2 ranks within 0\.\d{3} s$", done.stdout, re.MULTILINE)) == 1
    assert re.search(r"^ok +versions +the same on 2 ranks$", done.stdout, re.MULTILINE)
    assert done.stdout.count("Python ") == 1  # one rank of a node looks at it, rank 0 speaks
