"""Sums of the training metrics on the device, and the run's record in metrics.jsonl."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TIMING_KEYS = ("images_per_s", "data_wait_share", "seconds", "save_stall_s", "analysis/seconds")
"""Keys of a record that two equal runs do not share."""


class TrainSums:
    """Loss, correct answers and images, summed on the device without a synchronization until they are read.

    `window` is float64 (3,): sum of losses, correct top-1, images of this rank since the last reading; `epoch` holds the
    same over all ranks for the epoch so far, as it was at the last reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.window = torch.zeros(3, dtype=torch.float64, device=device)
        self.epoch = [0.0, 0.0, 0.0]

    def add(self, loss: Tensor, logits_nk: Tensor, labels_n: Tensor) -> None:
        """`loss`: mean over the micro-batch; `labels_n`: hard labels."""
        count = len(labels_n)
        correct = (logits_nk.detach().argmax(1) == labels_n).sum()
        self.window[0] += loss.detach().double() * count
        self.window[1] += correct
        self.window[2] += count

    def fold(self, window_total: Tensor) -> tuple[float, float] | None:
        """Add a window summed over ranks to the epoch and start the next; (mean loss, top-1 in percent) of the window.

        None for a window without an image.
        """
        loss_sum, correct, count = window_total.tolist()
        self.epoch = [self.epoch[0] + loss_sum, self.epoch[1] + correct, self.epoch[2] + count]
        self.window.zero_()
        return (loss_sum / count, 100 * correct / count) if count else None

    def start_epoch(self) -> None:
        self.window.zero_()
        self.epoch = [0.0, 0.0, 0.0]


class Record:
    """metrics.jsonl: one JSON object a line, written by rank 0. A resumed run first drops what came after its step.

    Lines that cannot be written (disk full) are told once and kept for the next attempt.
    """

    def __init__(self, path: Path, *, resumed_step: int, tell: Callable[[str], None]) -> None:
        self.path, self._tell = path, tell
        self._unwritten: list[str] = []
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line torn by a kill: it and what follows it are written again
                if event["step"] <= resumed_step:
                    kept.append(line)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)

    def write(self, event: str, values: dict[str, Any]) -> None:
        first = not self._unwritten
        self._unwritten.append(json.dumps({"event": event, **values}) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # no torn line in the middle
            if first:
                self._tell(
                    f"cannot write to {self.path}: {error.strerror}; its lines are kept until they can be written"
                )
        else:
            self._unwritten = []


def read_record(path: Path) -> list[dict[str, Any]]:
    """All events of a run."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Stopwatch:
    """Seconds of training and, of these, seconds in which the host waited for data."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def timing(self) -> dict[str, float]:
        seconds = self.seconds
        return {
            "images_per_s": round(self.images / seconds, 2),
            "data_wait_share": round(self.waited / seconds, 4),
            "seconds": round(seconds, 3),
        }
