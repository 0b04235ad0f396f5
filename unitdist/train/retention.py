"""The checkpoints of a run folder: their names, which of them stay, and which one a resume takes.

| name | what |
| --- | --- |
| step_00012345.pt | the checkpoint after that optimizer step; the newest `keep_last` and the best `keep_best` stay |
| last.pt | the newest step file under a second name (a hard link; a copy where the file system has none) |
| best.pt | the step file of the highest validation top-1, likewise |
| epoch_0010.pt | after that epoch, likewise; of every `keep_every_epochs`-th epoch, never removed |
| damaged_*.pt | a file that a resume could not read, moved out of the way for you to look at |
| abandoned_*.pt | a step file from after the step that a resume went back to |
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unitdist.config import CheckpointConfig
from unitdist.errors import CheckpointError, ConfigError
from unitdist.train.checkpoint import (
    DamagedCheckpoint,
    read_checkpoint,
    readable_bytes,
    sync_folder,
    temporary_name,
)

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def epoch_file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:04d}.pt"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every step file, newest first."""
    found = [(re.fullmatch(r"step_(\d{8,})\.pt", path.name), path) for path in folder.glob("step_*.pt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def give_name(path: Path, name: Path) -> None:
    """Let `name` be the same file as `path`, replaced in one move: at every moment the old content or the new one.

    Raises OSError.
    """
    temporary = temporary_name(name)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(path, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # rename does nothing where both names are one file already


def remove_old(folder: Path, *, newest_step: int, keep_last: int, best_steps: Iterable[int]) -> None:
    """Remove the step files up to `newest_step` that are neither among the newest `keep_last` nor in `best_steps`."""
    files = [(step, path) for step, path in step_files(folder) if step <= newest_step]
    for step, path in files[keep_last:]:
        if step not in set(best_steps):
            path.unlink(missing_ok=True)


def holds_a_run(folder: Path) -> bool:
    return (folder / "last.pt").exists() or bool(step_files(folder))


def read_newest(folder: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint of `folder` that is whole, its content, and what is wrong with the ones before it.

    (None, None, []) where there are none. last.pt comes first, then the step files, newest first, then epoch_*.pt and best.pt.
    Raises CheckpointError when there are some and none is whole, or when one holds code.
    """
    damages: list[str] = []
    for path in _candidates(folder):
        try:
            return path, read_checkpoint(path), damages
        except DamagedCheckpoint as damage:
            damages.append(str(damage))
    if damages:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damages)}. Nothing was started over them: give another one with "
            "--resume PATH, or start anew with run.name=NAME"
        )
    return None, None, []


def _candidates(folder: Path) -> Iterator[Path]:
    """Every checkpoint of the folder once, whatever its number of names."""
    seen = set()
    epochs = sorted(folder.glob("epoch_*.pt"), reverse=True)
    for path in (folder / "last.pt", *(path for _, path in step_files(folder)), *epochs, folder / "best.pt"):
        if path.exists():
            identity = (path.stat().st_dev, path.stat().st_ino)
            if identity not in seen:
                seen.add(identity)
                yield path


def go_back_to(folder: Path, chosen: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Make the folder tell one history again, that of `chosen`; returns what was moved, for the log.

    Damaged files and step files of a later step are renamed, never deleted; last.pt becomes `chosen`, also where
    that lies elsewhere, best.pt the best that `chosen` knows of. Where `chosen` is last.pt and nothing is newer, nothing happens.
    Raises ConfigError when a file cannot be renamed.
    """
    moved = []
    try:
        for step, path in step_files(folder):
            if step > checkpoint["step"]:
                kind = "abandoned" if _is_whole(path) else "damaged"
                moved.append(_move_aside(path, kind))
        last, best = folder / "last.pt", folder / "best.pt"
        if chosen.resolve() != last.resolve():
            if last.exists() and not _is_whole(last):
                moved.append(_move_aside(last, "damaged"))
            give_name(chosen, last)
        ranking = checkpoint["metrics"].get("ranking", [])
        if moved and best.exists() and not _is_whole(best):
            moved.append(_move_aside(best, "damaged"))
        if ranking and step_file(folder, ranking[0]["step"]).exists() and (moved or not best.exists()):
            give_name(step_file(folder, ranking[0]["step"]), best)
        sync_folder(folder)
    except OSError as error:
        raise ConfigError(f"run.folder: cannot put {folder} in order to resume from {chosen}: {error}") from None
    return moved


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _move_aside(path: Path, kind: str) -> str:
    os.replace(path, path.with_name(f"{kind}_{path.name}"))
    return f"{path.name} -> {kind}_{path.name}"


def most_files(config: CheckpointConfig, *, epochs: int) -> int:
    """Checkpoints that lie in the run folder at most, the one being written included."""
    for_ever = epochs // config.keep_every_epochs if config.keep_every_epochs else 0
    return config.keep_last + config.keep_best + for_ever + 1


def check_space(folder: Path, config: CheckpointConfig, *, checkpoint_bytes: int, epochs: int) -> None:
    """Raises ConfigError when the checkpoints that the config keeps, and the one being written, do not fit on the disk.

    What the folder's checkpoints take already counts as free: they are the ones that will be replaced.
    """
    count = most_files(config, epochs=epochs)
    present = sum(path.stat().st_size for path in _candidates(folder))
    free = shutil.disk_usage(folder).free
    if count * checkpoint_bytes > free + present:
        keys = f"checkpoint.keep_last: {config.keep_last}, keep_best: {config.keep_best}"
        if config.keep_every_epochs:
            keys += f", keep_every_epochs: {config.keep_every_epochs}"
        raise ConfigError(
            f"run.folder: {folder} has {readable_bytes(free)} free; a checkpoint takes {readable_bytes(checkpoint_bytes)}, and up to "
            f"{count} lie there while one is written ({keys}): {readable_bytes(count * checkpoint_bytes)}; make room, keep fewer, "
            "or choose another run.folder"
        )
