"""Version, citation, checks and messages: said in several places, meant to be one."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import unitdist
from tests.docs.blocks import ROOT

TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| (`.*?) \|", TROUBLE.partition("## Without a message")[0], re.MULTILINE)


def test_version_is_one() -> None:
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"attr": "unitdist.version.__version__"}}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(
        r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert citation["version"] == unitdist.__version__ == released[0][0] == version("unitdist")
    assert str(citation["date-released"]) == released[0][1]


def test_nobody_asks_for_the_version_of_an_installed_unitdist() -> None:
    """A checkout on a machine without pip (docs/performance.md's measurements) runs by PYTHONPATH alone."""
    files = [file for folder in ("unitdist", "evaluation", "launch", "tools") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [file.name for file in files if re.search(r"version\(.unitdist.\)", file.read_text(encoding="utf-8"))] == []


def test_citation_file_has_what_the_format_asks_for() -> None:
    """Required keys of the Citation File Format 1.2.0, and their kinds."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert isinstance(citation["message"], str) and isinstance(citation["title"], str)
    for authors in (citation["authors"], *(reference["authors"] for reference in citation["references"])):
        assert authors and all(author.keys() & {"name", "family-names"} for author in authors)
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


def test_workflow_and_pre_commit_call_the_one_check() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    calls = [command for command in [*runs, *(hook["entry"] for hook in hooks)] if "check.py" in command]
    options = set(re.findall(r'"(style|types|contract|docs|tests|slow)"', (ROOT / "tools" / "check.py").read_text()))
    assert options == {"style", "types", "contract", "docs", "tests", "slow"}
    asked = {option for command in runs for option in re.findall(r"--(\w+)", command) if "check.py" in command}
    assert asked == options - {"slow"}
    assert len(calls) == 5 and all(set(re.findall(r"--(\w+)", command)) <= options for command in calls)


def test_style_is_the_same_after_the_commands_of_the_readme(tmp_path: Path) -> None:
    """Ruff takes a folder of the root for a module of ours, and then wants other import blocks."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    ours = ("configs", "docs", "evaluation", "launch", "tests", "unitdist")
    for folder in ours:
        (tmp_path / folder).symlink_to(ROOT / folder)
    for left in ("sample_data/train/moon", "sample_small/train/moon", "runs/demo/logs", "exported/demo", "site/assets"):
        (tmp_path / left).mkdir(parents=True)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "tools"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_readme_is_short_and_has_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size < 200_000


def strings_of_the_code() -> str:
    """Every string of the code, placeholders of f-strings as a blank; adjacent literals are one string."""
    found = []
    for folder in ("unitdist", "evaluation", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_are_quoted_from_the_code() -> None:
    strings = strings_of_the_code()
    assert len(MESSAGES) > 12
    for message in MESSAGES:
        for part in re.findall(r"`([^`]+)`", message):
            assert part in strings, f"docs/troubleshooting.md quotes {part!r}, which no code says"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_recipe_opens_with_command_hardware_and_expectation(recipe) -> None:
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"launch/train.py --config recipes/{recipe.name}" in head
    assert (
        "Hardware:" in head
        and "Expected time:" in head
        and "(expected, not measured" in head
        and "Expected top-1:" in head
    )
