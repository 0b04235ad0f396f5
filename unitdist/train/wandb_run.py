"""The one door to Weights & Biases: only where run.wandb asks for it."""

import importlib.util
import secrets
from pathlib import Path

from unitdist.config import Config
from unitdist.config_file import config_to_dict
from unitdist.errors import ConfigError

ID_FILE = "wandb_id.txt"


def require_wandb() -> None:
    """Raises ConfigError where run.wandb cannot be had."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.wandb: the package wandb is not installed: pip install wandb, or run.wandb=false")


class WandbRun:
    """Scalars and config in W&B, written by rank 0; a resumed run goes on in the same W&B run, by the id in the run folder.

    Where nothing is to leave the machine: WANDB_MODE=offline, which W&B itself reads; its files then lie in the run folder.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        id_file = folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=config.run.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=config_to_dict(config),
        )
        # Steps of our own: W&B's must only grow, and a resumed run goes back to its checkpoint's.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, finished: bool) -> None:
        """`finished`: False marks the W&B run as failed, until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)


def open_wandb(folder: Path, config: Config) -> WandbRun | None:
    """None where the config does not ask for it."""
    return WandbRun(folder, config) if config.run.wandb else None
