"""A launch that is refused: told once on each node, with exit code 2 everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "launch/train.py": ["--config", "demo.yaml"],
    "evaluation/multi_scale.py": ["--checkpoint", "x.pt", "--data", "y"],
}


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("3", 0)])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_refused_launch_is_told_by_the_first_process_of_a_node(script: str, local_rank: str, lines: int) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "many", "LOCAL_RANK": local_rank}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *SCRIPTS[script]],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **told},
    )
    assert done.returncode == 2
    assert done.stderr.count("unitdist: error: the environment's WORLD_SIZE must be a whole number") == lines, (
        done.stderr
    )
