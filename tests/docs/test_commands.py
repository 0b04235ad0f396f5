"""Every code block of the documentation runs here, or says why not; what it names exists in any case."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.dist.launching import environment
from tests.docs.blocks import (
    INDENTED_COMMAND,
    LANGUAGES,
    OVERRIDE,
    PAGES,
    ROOT,
    Block,
    blocks,
    commands_of,
    inline_commands,
)
from unitdist.config_file import load_config

BLOCKS = blocks()
SHELL = [block for block in BLOCKS if block.language == "sh"]
SNIPPET = re.compile(r'--8<-- "(docs/examples/\w+\.py)"\n')
TESTED_EXAMPLES = {f"docs/examples/{name}.py" for name in ("plain_loop", "accelerate_loop", "lightning_module")}
OUR_SCRIPT = re.compile(r"(?:launch|tools|evaluation|docs/examples)/[\w/]+\.(?:py|sh)")
OTHERS = set("cd git kubectl mkdocs pip pre-commit python3 scancel sbatch tensorboard . kill".split())
"""First words of commands that are not ours."""
LAUNCHERS = {"accelerate", "deepspeed", "mpirun", "python", "sh", "srun", "torchrun"}


def runs_here(language: str) -> list[str]:
    return sorted({block.page for block in BLOCKS if block.language == language and block.mark in (None, "slow")})


def test_every_block_names_its_language_and_every_command_stands_in_one() -> None:
    assert len(SHELL) > 20
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.place}: ```{block.language}: one of {sorted(LANGUAGES)}"
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert INDENTED_COMMAND.findall(text) == [], f"{page}: put the command between ```sh and ```"


def test_every_mark_is_kept() -> None:
    """A mark that stands before nothing would be read as true; a test that is named has to exist."""
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marks = len(re.findall(r"^<!-- (?:needs|tested|slow)\b.*-->$", text, re.MULTILINE))
        kept = [block for block in BLOCKS if block.page == str(page.relative_to(ROOT)) and block.mark]
        assert marks == len(kept), f"{page}: a mark stands directly before its block"
        for block in kept:
            assert block.what or block.mark == "slow", f"{block.place}: what does it need?"
            if block.mark == "tested":
                assert f"def {block.what}(" in sources, f"{block.place}: no test {block.what}"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_scripts_options_and_configs_of_every_command_exist(block: Block) -> None:
    for words in block.commands:
        if words[0] == "make":
            assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in words[1:]), words
        elif words[0] in LAUNCHERS:
            check_launch(words, block.place)
        else:
            assert words[0] in OTHERS, f"{block.place}: unknown command {words[0]}"


def test_commands_in_sentences_exist_too() -> None:
    commands = inline_commands()
    assert len(commands) > 20
    for page, command in commands:
        for words in commands_of(command):
            check_launch([word for word in words if word != "..."] + ["..."], f"{page}: `{command}`")


def check_launch(words: list[str], place: str) -> None:
    script = next((position for position, word in enumerate(words) if OUR_SCRIPT.fullmatch(word)), None)
    if script is None:
        module = words[words.index("-m") + 1] if "-m" in words else ""
        if module.startswith("unitdist"):
            path = ROOT / (module.replace(".", "/") + ".py")
            assert path.is_file() or (path.with_suffix("") / "__main__.py").is_file(), f"{place}: no module {module}"
        else:
            assert module in ("venv", "pytest") or "..." in words or words[1].endswith("example.py"), (
                f"{place}: {words}"
            )
        return
    assert (ROOT / words[script]).is_file(), f"{place}: no file {words[script]}"
    given = words[script + 1 :]
    if "--config" in given and words[script].startswith("launch/"):
        load_config(given[given.index("--config") + 1], [word for word in given if OVERRIDE.fullmatch(word)])
    options = [word.partition("=")[0] for word in given if word.startswith("--")]
    if options and words[script].endswith(".py"):
        verb = given[0] if re.fullmatch(r"[a-z]+(?:-[a-z]+)?", given[0]) else ""
        known = known_options(words[script], verb)
        for option in options:
            assert option in known, f"{place}: {words[script]} {verb} has no option {option}"


@cache
def known_options(script: str, verb: str) -> frozenset[str]:
    """What the script's own --help names."""
    shown, before = io.StringIO(), (list(sys.argv), list(sys.path))
    sys.argv = [script, *([verb] if verb else []), "--help"]
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    assert left.value.code == 0, f"{script} {verb} --help"
    return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


@pytest.fixture
def clone(sample_data: Path, tmp_path: Path) -> Path:
    """A folder like a clone of the repository, in which what commands write stays apart."""
    for name in ("configs", "docs", "evaluation", "launch", "tests", "tools", "unitdist"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", runs_here("python"))
def test_python_blocks_of_a_page_run_in_their_order(page: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    names: dict[str, object] = {}
    for block in BLOCKS:
        if block.page != page or block.language != "python" or block.mark is not None:
            continue
        snippet = SNIPPET.fullmatch(block.text)
        if snippet:
            assert snippet[1] in TESTED_EXAMPLES, block.place
        else:
            exec(compile(block.text, block.place, "exec"), names)


@pytest.mark.parametrize("page", runs_here("sh"))
def test_shell_blocks_of_a_page_run_in_their_order(page: str, clone: Path) -> None:
    bin_folder = str(Path(sys.executable).parent)
    surroundings = environment(PATH=bin_folder + os.pathsep + os.environ["PATH"], PYTHONPATH=str(ROOT))
    for block in BLOCKS:
        if block.page != page or block.language != "sh" or block.mark is not None:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=clone,
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("example", sorted(TESTED_EXAMPLES))
def test_examples_run_as_they_stand(example: str, tmp_path: Path) -> None:
    if "lightning" in example:
        pytest.importorskip("lightning", reason="lightning is not installed (it is in the extra `dev`)")
    done = subprocess.run(
        [sys.executable, str(ROOT / example)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses and all(0 < loss < 10 for loss in losses)
    assert 25 <= len((ROOT / example).read_text().splitlines()) <= 45
