"""unitdist.train.environment: each start of a run leaves a line that says on what."""

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from unitdist.train import environment
from unitdist.world import World


def test_every_start_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--config", "a b.yaml"])
    for step in (0, 40):
        environment.append_environment(tmp_path, World.single(), resumed_step=step)
    first, second = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (first["resumed_step"], second["resumed_step"]) == (0, 40)
    assert first["command"] == "train.py --config 'a b.yaml'" and first["world_size"] == 1
    assert first["versions"]["torch"] == version("torch")
    assert first["versions"]["Python"] == platform.python_version()
    assert first["hardware"].endswith(" a node")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first["started"])


def test_commit_is_recorded_in_a_repository_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.current_commit() is None
    (tmp_path / "code.py").write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "code.py"], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = environment.current_commit()
    assert re.fullmatch(r"[0-9a-f]{12}", commit or "")
    (tmp_path / "code.py").write_text("2")
    assert environment.current_commit() == f"{commit}-dirty"
