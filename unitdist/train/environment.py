"""What a run was started on: environment.jsonl in the run folder, one line for each start."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unitdist.version import __version__
from unitdist.world import World

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "triton")
DALI_WHEELS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")


def append_environment(folder: Path, world: World, *, resumed_step: int) -> None:
    """Add this start to folder/environment.jsonl; called by rank 0, whose machine it tells of.

    Keys: started (UTC), resumed_step (0: from the beginning), world_size, local_world_size, hardware, commit (null outside a
    repository), command, versions {name: version}.
    """
    start = {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "resumed_step": resumed_step,
        "world_size": world.size,
        "local_world_size": world.local_size,
        "hardware": hardware(),
        "commit": current_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
    }
    with open(folder / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Name -> version of Python and of the packages that are installed; CUDA and cuDNN as torch was built for them."""
    found: dict[str, Any] = {"Python": platform.python_version(), "unitdist": __version__}
    for name in (*PACKAGES, *DALI_WHEELS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["cuDNN"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {name: str(value) for name, value in found.items() if value is not None}


def hardware() -> str:
    """This node's GPUs, or its CPU, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} a node"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU {model}, {os.cpu_count()} cores a node"


def current_commit() -> str | None:
    """The commit of the code that runs, with -dirty where tracked files differ from it; None outside a repository."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
