"""Finished work on disk, so that an interrupted evaluation goes on where it stopped, on any number of ranks.

    OUTPUT/partial/fingerprint.json              what the scores belong to; another network, data or option is refused
    OUTPUT/partial/<id>/<pass>/chunk_00012.npz   scores of one chunk of images at one scale
    OUTPUT/partial/<id>/<pass>.npz               scores of all images: the scale is finished, its chunks are gone

<id> is a digest of the fingerprint: where nodes have an OUTPUT of their own each, a rank can never take up scores that
an earlier evaluation left there.

The folder may be deleted when the report is there.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.views import Pass
from unitdist.errors import ConfigError, DataError

Fingerprint = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of some images in one pass: `image_ids` (B,) int64, `scores_bk` float32, `broken`: id -> reason."""

    image_ids: np.ndarray
    scores_bk: np.ndarray
    broken: dict[int, str]


class PartialScores:
    """The folder OUTPUT/partial/<id>; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def finished(self, plan: Pass) -> bool:
        """Whether all images of this pass are on disk."""
        return self._folder is not None and (self._folder / f"{plan.name}.npz").exists()

    def load(self, plan: Pass, chunk: int | None = None) -> Scored | None:
        """One chunk (None: the whole pass), or None where it is not finished. Raises DataError when the file is damaged."""
        if self._folder is None or not (path := self._path(plan, chunk)).exists():
            return None
        try:
            with np.load(path) as arrays:
                reasons = dict(zip(arrays["broken_ids"].tolist(), arrays["broken_reasons"].tolist(), strict=True))
                return Scored(image_ids=arrays["image_ids"], scores_bk=arrays["scores"], broken=reasons)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and resume again") from None

    def save(self, plan: Pass, scored: Scored, chunk: int | None = None) -> None:
        """Keep one chunk, or the whole pass, whose chunks are then deleted. Written to another name first: never half a file."""
        if self._folder is None:
            return
        path = self._path(plan, chunk)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    image_ids=scored.image_ids,
                    scores=scored.scores_bk,
                    broken_ids=np.array(list(scored.broken), dtype=np.int64),
                    broken_reasons=np.array(list(scored.broken.values()), dtype=np.str_),
                )
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"cannot write {path}: {error.strerror or error}") from None
        if chunk is None:
            shutil.rmtree(self._folder / plan.name, ignore_errors=True)

    def _path(self, plan: Pass, chunk: int | None) -> Path:
        assert self._folder is not None
        return self._folder / (f"{plan.name}.npz" if chunk is None else f"{plan.name}/chunk_{chunk:05d}.npz")


def open_partial(folder: Path, fingerprint: Fingerprint, resume: bool) -> Path:
    """Make the folder ready: keep its scores if `resume` and the fingerprints agree, empty it if not `resume`.

    Returns the folder of this fingerprint's scores. To be called by one process. Raises ConfigError when the scores belong to
    another evaluation, naming the first difference.
    """
    note = folder / "fingerprint.json"
    scores = folder / hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    if resume and note.exists():
        try:
            kept = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"--resume: {note} is damaged; leave --resume out to start again") from None
        for key in sorted(set(kept) | set(fingerprint)):
            if kept.get(key) != fingerprint.get(key):
                raise ConfigError(
                    f"--resume: the scores in {folder} belong to another evaluation: {key} was {kept.get(key)!r}, is now "
                    f"{fingerprint.get(key)!r}; give another --output, or leave --resume out to start again"
                )
        return scores
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {folder}: {error.strerror or error}") from None
    return scores
