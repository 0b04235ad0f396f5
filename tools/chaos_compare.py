"""Two runs, bit for bit."""

from pathlib import Path

import torch
from chaos_job import read_record

TIMING = ("images_per_s", "data_wait_share", "seconds", "save_stall_s", "analysis/seconds")


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between last.pt, best.pt and metrics.jsonl of two runs, in words; timings do not count."""
    found = []
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, reference))
        for part in ("model", "optimizer", "epoch", "step", "samples", "metrics"):
            found += [f"{name}: {place}" for place in different(ours[part], theirs[part], part)]
    ours, theirs = (
        [{key: value for key, value in event.items() if key not in TIMING} for event in read_record(folder)]
        for folder in (run, reference)
    )
    if len(ours) != len(theirs):
        found.append(f"metrics.jsonl: {len(ours)} lines against {len(theirs)}")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one != other:
            found.append(f"metrics.jsonl line {number}: {one} against {other}")
    return found


def different(ours: object, theirs: object, place: str) -> list[str]:
    """The places at which two nested values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [found for key in ours for found in different(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [place]
    return [] if ours == theirs else [place]
