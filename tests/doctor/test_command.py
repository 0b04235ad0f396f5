"""python -m unitdist doctor, as typed: exit codes, JSON, two ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unitdist.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_tell_planted_faults_once_and_compare_versions_and_clocks(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [
                sys.executable,
                *torchrun,
                "-m",
                "unitdist",
                "doctor",
                "--json",
                "--port",
                port,
                "--data",
                str(tmp_path / "none"),
            ],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
        )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)  # one rank alone speaks
    findings = {finding["area"]: finding for finding in report["findings"]}
    faults = {area: finding for area, finding in findings.items() if finding["level"] == "fault"}
    assert report["schema"] == "unitdist-doctor-1" and report["faults"] == len(faults)
    assert {"port", "data"} <= set(faults) and all(finding["remedy"] for finding in faults.values())
    assert {
        "Python",
        "torch",
        "GPUs",
        "NCCL",
        "torchvision",
        "timm",
        "accelerate",
        "DALI",
        "DeepSpeed",
        "Triton",
    } <= set(findings)
    assert findings["versions"] == {"area": "versions", "level": "ok", "text": "the same on 2 ranks", "remedy": ""}
    assert findings["clocks"]["level"] == "ok" and findings["clocks"]["text"].startswith("2 ranks within 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port: must be in 1..65535"),
        (["optim.lr=1"], "section.key=value needs --config"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--config", "demo.yaml", "data.paths=x"], "did you mean path"),
    ],
)
def test_what_cannot_be_used_leaves_with_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["unitdist", "doctor", *arguments])
    try:
        code = main()
    except SystemExit as left:  # argparse
        code = int(str(left.code))
    assert code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libcudart.so.13: no such file')", "ImportError: libcudart.so.13: no such file"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV (signal 11)"),
    ],
)
def test_a_torch_that_does_not_import_is_one_fault_on_one_screen(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "unitdist", "doctor", "--config", "demo.yaml", "--data", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith("FAULT    torch "))
    assert words in lines[number] and str(tmp_path / "torch") in lines[number]
    assert lines[number + 1].strip().startswith("-> ") and "--force-reinstall" in lines[number + 1]
    assert lines[-1].startswith("2 faults") and len(lines) < 40  # the other: the data
