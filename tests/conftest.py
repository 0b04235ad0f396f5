"""Fixtures that several rooms use."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample data set, 16 classes with 12 training and 5 validation JPEGs each. Do not change its files."""
    folder = tmp_path_factory.mktemp("sample_data")
    script = REPOSITORY / "tools" / "make_sample_data.py"
    counts = ["--train-per-class", "12", "--val-per-class", "5"]
    subprocess.run([sys.executable, script, "--output", folder, "--quiet", *counts], check=True, timeout=120)
    return folder
