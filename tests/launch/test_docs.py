"""The commands of docs/clusters.md: what can run here runs, and what they name exists."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.dist.launching import ROOT, environment
from unitdist.config_file import load_config

PAGE = (ROOT / "docs" / "clusters.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if not line.startswith("#")]
DRY = [command for command in COMMANDS if "--dry-run" in command]


def test_page_has_commands() -> None:
    assert len(COMMANDS) >= 12 and len(DRY) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_files_configs_and_keys_of_a_command_exist(command: str) -> None:
    words = shlex.split(command)
    for word in words:
        if word.startswith("launch/"):
            assert (ROOT / word).is_file(), word
    if "--config" in words:
        script = next(index for index, word in enumerate(words) if word.endswith(("train.py", "submit.py")))
        overrides = [word for word in words[script:] if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        load_config(words[words.index("--config") + 1], overrides)


@pytest.mark.parametrize("command", DRY)
def test_dry_runs_of_the_page_run(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if "simulate" in command:
        shown = re.search(r"^```text\n(.*?)^memory", PAGE, re.MULTILINE | re.DOTALL)
        assert shown and done.stdout.startswith(shown[1])
    else:
        assert done.stdout.startswith("#!/bin/bash")
