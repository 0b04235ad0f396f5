"""The one door to TensorBoard; what it shows as scalars goes to W&B too where a run asks for that."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from unitdist.config import Config
from unitdist.config_file import config_to_dict
from unitdist.train.wandb_run import WandbRun

HPARAMS_METRICS = ("val/top1", "val/top5", "val/loss", "epoch/train/loss", "epoch/train/top1", "val_ema/top1")
"""Scalars whose last values TensorBoard shows in its HParams tab."""


class Board:
    """Scalars by global step, written by rank 0. A resumed run purges what lies after its step.

    A file that cannot be written (disk full) is told once and given up; `flush`, at an epoch's end, tries a new one. What falls in
    between is missing here, not in metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        resumed_step: int,
        tell: Callable[[str], None],
        wandb: WandbRun | None = None,
    ) -> None:
        self._folder, self._tell = folder, tell
        self._writer: SummaryWriter | None = SummaryWriter(
            str(folder), purge_step=resumed_step + 1 if resumed_step else None
        )
        self._wandb = wandb
        self._finished = False
        # In the run's own file; SummaryWriter.add_hparams would open a folder of its own for every call.
        parts = hparams(hyperparameters(config), dict.fromkeys(HPARAMS_METRICS, 0.0))  # type: ignore[no-untyped-call]
        experiment, start, self._end = parts
        self._add_summary(experiment)
        self._add_summary(start)

    def scalars(self, prefix: str, values: dict[str, Any], step: int) -> None:
        """Every number in `values` under `prefix`/key; what is not a number is left out."""
        numbers = {
            f"{prefix}/{key}" if prefix else key: value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for key, value in numbers.items():
            self._write(partial(SummaryWriter.add_scalar, tag=key, scalar_value=value, global_step=step))
        if self._wandb is not None and numbers:
            self._wandb.scalars(numbers, step)

    def histograms(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._write(partial(SummaryWriter.add_histogram, tag=name, values=value, global_step=step))

    def picture(self, name: str, image_chw: Any, step: int) -> None:
        self._write(partial(SummaryWriter.add_image, tag=name, img_tensor=image_chw, global_step=step))

    def text(self, name: str, text: str) -> None:
        self._write(partial(SummaryWriter.add_text, tag=name, text_string=text))

    def flush(self) -> None:
        if self._writer is None:
            try:
                self._writer = SummaryWriter(str(self._folder))
            except OSError:
                return  # told already
        self._write(SummaryWriter.flush)

    def finish(self) -> None:
        """The run came to its end: the HParams tab shows it as a success."""
        self._add_summary(self._end)
        self._finished = True

    def _add_summary(self, summary: Any) -> None:
        def add(writer: Any) -> None:
            writer.file_writer.add_summary(summary)

        self._write(add)

    def close(self) -> None:
        self._write(SummaryWriter.close)
        if self._wandb is not None:
            self._wandb.close(finished=self._finished)

    def _write(self, call: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            call(self._writer)
        except OSError as error:
            self._writer = None
            self._tell(
                f"cannot write to {self._folder}: {error.strerror}; TensorBoard lacks what follows until the next epoch's end"
            )


def hyperparameters(config: Config) -> dict[str, str | float]:
    """Dotted key -> value of the config for the HParams tab: numbers as they are, the rest as text; unset keys and places are left out."""
    shown: dict[str, str | float] = {}
    for section, values in config_to_dict(config).items():
        for key, value in values.items():
            if value is None or (section, key) in (("run", "folder"), ("data", "path")):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            shown[f"{section}.{key}"] = (
                value if is_number else str(value).lower() if isinstance(value, bool) else str(value)
            )
    return shown
