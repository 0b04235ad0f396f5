"""Runs the project's checks: `python tools/check.py [--style] [--types] [--contract] [--docs] [--tests [--slow]]` (none named: all).

`make test` is `--tests`: everything that needs no GPU, on all cores, but for the tests marked slow.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("style", "types", "contract", "docs", "tests", "slow"):
        parser.add_argument(f"--{name}", action="store_true")
    chosen = parser.parse_args()
    every = not (chosen.style or chosen.types or chosen.contract or chosen.docs or chosen.tests)
    commands = []
    if chosen.style or every:
        commands += [["ruff", "check", "."], ["ruff", "format", "--check", "."]]
    if chosen.types or every:
        commands.append(["mypy"])
    if chosen.contract or every:
        commands.append(["lint-imports"])
    if chosen.docs or every:
        commands.append(["mkdocs", "build", "--strict", "--quiet"])
    if chosen.tests or every:
        marks = "not gpu" if chosen.slow else "not gpu and not slow"
        workers = str(max(2, (os.cpu_count() or 2)))
        commands.append(["pytest", "-n", workers, "--dist", "loadfile", "-m", marks, "--durations", "15"])
    # One thread a process: the tests' ranks share the cores, and oversubscription costs more than it brings.
    environment = {
        "OMP_NUM_THREADS": "1",
        "NO_MKDOCS_2_WARNING": "1",  # advertising for another tool
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        **os.environ,
    }
    if chosen.tests or every:
        build_deepspeed_extension(environment)
    failed = [
        " ".join(command)
        for command in commands
        if subprocess.run(
            [sys.executable, "-m", *command]
            if command[0] != "lint-imports"
            else [str(Path(sys.executable).parent / "lint-imports")],
            cwd=ROOT,
            env=environment,
        ).returncode
    ]
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


def build_deepspeed_extension(environment: dict[str, str]) -> None:
    """DeepSpeed compiles a small extension at its first use on a CPU. Once, here: a rank killed while it compiles would
    leave a lock on which every later run hangs."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "DS_ACCELERATOR": "cpu"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
