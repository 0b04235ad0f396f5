"""What every benchmark needs: interleaved timing, medians with spread, the environment, JSON."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    packages = {}
    for name in ("torch", "triton", "timm"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def time_interleaved(
    steps: Mapping[str, Step], rounds: int, device: torch.device, inner: int = 1
) -> dict[str, list[float]]:
    """Milliseconds per step of each candidate, one number per round; candidates take turns within a round.

    CPU: process time (CPU seconds of all threads), which other programs on the machine disturb least. CUDA: events around
    `inner` steps.
    """
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_once(step, device, inner))
    return times


def _once(step: Step, device: torch.device, inner: int) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / inner
    begin = time.process_time()
    for _ in range(inner):
        step()
    return (time.process_time() - begin) * 1e3 / inner


def summary(values: list[float]) -> dict[str, float]:
    """Median and the range that holds the middle 80 %."""
    ordered = sorted(values)
    edge = len(ordered) // 10
    return {"median": statistics.median(ordered), "low": ordered[edge], "high": ordered[-1 - edge]}


def ratio(times: Mapping[str, list[float]], name: str, baseline: str) -> dict[str, float]:
    """Time of `name` over time of `baseline`, round by round."""
    return summary([a / b for a, b in zip(times[name], times[baseline], strict=True)])


def weighted_total(per_shape: list[tuple[int, dict[str, list[float]]]]) -> dict[str, list[float]]:
    """Sum over shapes of weight * time, round by round."""
    names = per_shape[0][1]
    rounds = len(next(iter(names.values())))
    return {name: [sum(w * times[name][i] for w, times in per_shape) for i in range(rounds)] for name in names}


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the results, if a path was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
