"""unitdist.train.run_folder: one job per folder, found unwritable at the start."""

import os
from pathlib import Path

import pytest

from unitdist.config import Config, RunConfig
from unitdist.errors import ConfigError
from unitdist.train.run_folder import lock_run_folder, open_run_folder


def config(folder: Path) -> Config:
    return Config(run=RunConfig(folder=str(folder), name="a"))


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = open_run_folder(config(tmp_path), resume=None)
    run.last.touch()
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with --resume auto"):
        open_run_folder(config(tmp_path), resume=None)
    (run.last).rename(run.path / "step_00000007.pt")
    with pytest.raises(ConfigError, match=r"already holds a run"):
        open_run_folder(config(tmp_path), resume=None)
    assert open_run_folder(config(tmp_path), resume="auto").path == run.path


def test_resume_auto_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    assert open_run_folder(config(tmp_path), resume="auto").resume_from is None


def test_wrong_resume_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resume: no such checkpoint: nowhere\.pt"):
        open_run_folder(config(tmp_path), resume="nowhere.pt")


def test_unwritable_folder_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.folder: cannot write to .*file/a \(Not a directory\)"):
        open_run_folder(config(tmp_path / "file"), resume=None)


def test_second_job_in_a_folder_names_the_first(tmp_path: Path) -> None:
    holder = lock_run_folder(tmp_path)
    with pytest.raises(ConfigError, match=rf"is in use by host .*, pid {os.getpid()}"):
        lock_run_folder(tmp_path)
    holder.close()
    lock_run_folder(tmp_path).close()
