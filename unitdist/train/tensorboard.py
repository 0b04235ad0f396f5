"""The one door to TensorBoard."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars by global step, written by rank 0. A resumed run purges what lies after its step."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)

    def scalars(self, prefix: str, values: dict[str, Any], step: int) -> None:
        """Every number in `values` under `prefix`/key; what is not a number is left out."""
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{prefix}/{key}" if prefix else key, value, step)

    def histograms(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_histogram(name, value, step)

    def picture(self, name: str, image_chw: Any, step: int) -> None:
        self._writer.add_image(name, image_chw, step)

    def text(self, name: str, text: str) -> None:
        self._writer.add_text(name, text)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
