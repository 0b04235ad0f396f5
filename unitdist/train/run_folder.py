"""The run's folder: config, checkpoints, metrics and logs, owned by one job at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from unitdist.config import Config
from unitdist.errors import ConfigError
from unitdist.train.agreement import warn
from unitdist.train.retention import holds_a_run
from unitdist.world import World


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`path` holds config.yaml, the checkpoints (see `retention`), metrics.jsonl, environment.jsonl and tensorboard/; `resume_from` is the
    checkpoint to continue from, or None; `notes` is what had to be passed over for it."""

    path: Path
    resume_from: Path | None
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"


def open_run_folder(config: Config, *, resume: str | None) -> RunFolder:
    """`run.folder`/`run.name`, made if needed. `resume`: None, "auto" or a checkpoint's path, which becomes `resume_from`.

    With "auto" `retention.read_newest` finds the checkpoint, once the folder is locked.
    Raises ConfigError when the folder cannot be written, or already holds a run and `resume` is None.
    """
    path = Path(config.run.folder) / (config.run.name or "run")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test.{socket.gethostname()}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.folder: cannot write to {path} ({error.strerror}); choose another run.folder") from None
    last = path / "last.pt"
    if resume is None:
        if holds_a_run(path):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume auto, or start another with run.name=NAME, or remove it"
            )
        return RunFolder(path=path, resume_from=None)
    if resume == "auto":
        return RunFolder(path=path, resume_from=None)
    if not Path(resume).is_file():
        raise ConfigError(
            f"--resume: no such checkpoint: {resume}" + (f"; {last} exists (--resume auto)" if last.exists() else "")
        )
    return RunFolder(path=path, resume_from=Path(resume))


def write_status(path: Path, state: str, *, step: int, reason: str = "") -> None:
    """status.json: {"state": "running" | "evaluating" | "stopped" | "finished" | "failed", "step", "reason"},
    replaced atomically by rank 0.

    torchrun turns every worker's exit code into 1, so this is what a scheduler's script reads; "running" with no job means
    that the job was killed.
    """
    temporary = path / ".status.tmp"
    temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason}) + "\n")
    temporary.replace(path / "status.json")


def note_failure(path: Path, world: World, error: Exception, *, step: int) -> None:
    """By rank 0: status.json says "failed". Where the disk is full it cannot, and stderr says that too."""
    if not world.is_main:
        return
    try:
        write_status(path, "failed", step=step, reason=str(error))
    except OSError as second:
        warn(world, f"status.json in {path} still says what it said before: {second}")


@contextlib.contextmanager
def noting_failed_start(path: Path, world: World) -> Iterator[None]:
    """Around what precedes the first step of a start, once the folder is locked: an error is noted in status.json at the step that
    an earlier start reached. A run that was finished stays so: nothing in it has changed."""
    try:
        yield
    except Exception as error:
        before = read_status(path)
        if before.get("state") != "finished":
            note_failure(path, world, error, step=before.get("step", 0))
        raise


def read_status(path: Path) -> dict[str, Any]:
    """status.json as it is; {} where there is none, or half of one: a launcher's script may write it in place."""
    try:
        content: dict[str, Any] = json.loads((path / "status.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content


def finish_status(path: Path, world: World) -> None:
    """status.json from "evaluating" to "finished", by rank 0, once the protocols at the end of training are done."""
    if world.is_main:
        write_status(path, "finished", step=read_status(path)["step"])


def lock_run_folder(path: Path) -> IO[str]:
    """Held by rank 0 while the job lives; the kernel frees it when the process dies, however it dies.

    Raises ConfigError that names the holder.
    """
    file = open(path / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{path} is in use by {holder}; wait for it, or choose another run.name") from None
    file.seek(0)
    file.truncate()
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    file.flush()
    return file
