"""One checkpoint file: written atomically, checked before it is used, loaded without running code.

Keys of a checkpoint (all plain values and tensors, so `weights_only=True` reads it):

| key | content |
| --- | --- |
| format | "unitdist-1" |
| config | nested dict, as in the YAML file |
| model | state dict with plain names (no `module.`), running statistics and norm divisors included |
| model_ema | state dict of the averaged weights, or None |
| optimizer | {"state": {parameter name: {buffer name: tensor or number}}}, the same for DDP and every ZeRO stage |
| scaler | state of the fp16 loss scaler, or None |
| epoch, step | epochs finished; optimizer steps taken |
| samples | training images of the unfinished epoch already consumed, over all ranks |
| rng | {"seed": int}: every draw is a function of (seed, step, rank) or (seed, epoch, sample), so the seed is all |
| loader | fingerprint of the training data and of the job (resume.py) |
| partial | per-rank sums of the unfinished epoch's training metrics |
| monitor | what the live monitor's next distances refer to, or None |
| class_to_idx | class name -> label |
| metrics | last validation, and the best one |
| versions | of unitdist, torch, Python; world size |
"""

import contextlib
import errno
import os
import re
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitdist.errors import CheckpointError, ConfigError

FORMAT = "unitdist-1"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint file is truncated, altered or unreadable: not what was once written."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write to a temporary name, fsync, rename, fsync the folder: a kill leaves the old file or the new one.

    Raises CheckpointError when the disk is full or the folder cannot be written; the old file then stays.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _operating_system_error(error)
        free = "an unknown number of bytes"
        with contextlib.suppress(OSError):  # of a folder that is gone, or read-only since an error of the disk
            temporary.unlink(missing_ok=True)
            free = readable_bytes(shutil.disk_usage(path.parent).free)
        if cause is None:
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {cause.strerror} (it needs {readable_bytes(bytes_of(checkpoint))}, "
            f"{free} are free); what was saved before is intact"
        ) from error


def _operating_system_error(error: BaseException) -> OSError | None:
    """torch.save turns a full disk into "unexpected pos 704 vs 598"; the reason stands behind it."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


def temporary_name(path: Path) -> Path:
    """The hidden name beside `path` under which it is written first; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames and links in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists: the size of the file but for names and headers."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(bytes_of(value) for value in tree.values())
    return sum(bytes_of(value) for value in tree) if isinstance(tree, list | tuple) else 0


def readable_bytes(count: int) -> str:
    """GB, MB or kB of 1000, with two digits that count."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1000:.3g} kB"


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a kill in the middle of a save leaves behind."""
    for leftover in folder.glob(".*.pt.*.tmp"):
        leftover.unlink(missing_ok=True)


def read_file(path: Path) -> Any:
    """Any `torch.save` file, checked for damage, loaded with `weights_only=True` onto the CPU.

    The archive's own CRC-32 of every member is compared: it travels with the file, and costs half of a SHA-256.
    Raises ConfigError when there is no such file, DamagedCheckpoint when it is truncated, altered or not a torch file,
    CheckpointError when it would run code, or when the storage does not let it be read.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        files = sorted(folder.glob("*.pt"), key=lambda file: file.stat().st_mtime) if folder.is_dir() else []
        hint = f"; newest in {folder}: {files[-1].name}" if files else ""
        raise ConfigError(f"checkpoint not found: {path}{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # that one is a torn archive's seek before its start
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint ({path.stat().st_size} bytes, no readable archive); use another one"
        ) from None
    if altered is not None:
        raise DamagedCheckpoint(f"{path} is damaged: {altered} differs from its checksum; use another checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol"
            )  # what matters of it is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types here; each means that the file is not usable
        if "weights_only" in str(error) or "Unsupported" in str(error):  # torch's own text advises to run the code
            found = re.search(r"GLOBAL \S+|[Uu]nsupported operand \d+", str(error))
            raise CheckpointError(
                f"refused: {path} holds code objects, which unitdist never runs{f' ({found[0]})' if found else ''}; "
                "save the state dict alone, with torch.save's own pickle_protocol"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint: {reason}") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of unitdist's own (see the table above). Raises as `read_file`, and on any other content."""
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of unitdist's training (no format: {FORMAT})")
    return content


def load_model_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load `state` strictly. Raises CheckpointError that names the first names and shapes that differ."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    reshaped = [
        f"{name} is {tuple(state[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    without_divisor = [name for name in missing if name.endswith("norm_divisor")]
    if without_divisor and len(without_divisor) == len(missing) and not unknown and not reshaped:
        raise CheckpointError(
            f"{source} has no norm divisors (first: {without_divisor[0]}); n is part of a Unitization model and must not "
            "be guessed from the test images; fix it with set_norm_divisors(model, image_size) for the training resolution and save again"
        )
    if missing or unknown or reshaped:
        details = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        details += [f"{len(unknown)} unknown (first: {unknown[0]})"] if unknown else []
        details += [f"{len(reshaped)} of another shape (first: {reshaped[0]})"] if reshaped else []
        raise CheckpointError(f"{source} belongs to another model: " + "; ".join(details))
    unset = [
        name
        for name, value in state.items()
        if name.endswith("norm_divisor") and value.numel() == 1 and int(value) == 0
    ]
    if unset:
        raise CheckpointError(
            f"{source} has an unset norm divisor (first: {unset[0]}); it was saved before the first training batch"
        )
    model.load_state_dict(state, strict=True)
