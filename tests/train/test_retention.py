"""unitdist.train.retention: names, what stays, and which file a resume takes."""

import os
from pathlib import Path

import pytest
import torch

from unitdist.config import CheckpointConfig
from unitdist.errors import CheckpointError, ConfigError
from unitdist.train import retention
from unitdist.train.checkpoint import FORMAT, read_checkpoint, save_checkpoint
from unitdist.train.retention import (
    check_space,
    epoch_file,
    give_name,
    go_back_to,
    holds_a_run,
    read_newest,
    remove_old,
    step_file,
    step_files,
)


def write(folder: Path, step: int, *, best: int | None = None) -> Path:
    path = step_file(folder, step)
    ranking = [] if best is None else [{"epoch": 1, "step": best, "top1": 50.0}]
    content = {
        "format": FORMAT,
        "step": step,
        "model": {"weight": torch.full((500,), float(step))},
        "metrics": {"ranking": ranking},
    }
    save_checkpoint(path, content)
    give_name(path, folder / "last.pt")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    """In place: every name of the file is damaged."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_newest_and_best_stay_and_epoch_files_are_never_touched(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        write(tmp_path, step)
    give_name(step_file(tmp_path, 3), epoch_file(tmp_path, 1))
    remove_old(tmp_path, newest_step=12, keep_last=2, best_steps=[6])
    assert names(tmp_path) == ["epoch_0001.pt", "last.pt", "step_00000006.pt", "step_00000009.pt", "step_00000012.pt"]
    assert read_checkpoint(epoch_file(tmp_path, 1))["step"] == 3


def test_names_of_one_file_take_no_space(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    give_name(path, tmp_path / "last.pt")  # again
    give_name(path, tmp_path / "best.pt")
    assert path.stat().st_nlink == 3 and names(tmp_path) == ["best.pt", "last.pt", "step_00000003.pt"]


def test_without_hard_links_a_name_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = write(tmp_path, 3)
    assert path.stat().st_nlink == 1 and (tmp_path / "last.pt").read_bytes() == path.read_bytes()
    assert names(tmp_path) == ["last.pt", "step_00000003.pt"]


def test_steps_are_ordered_by_number_and_other_files_ignored(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        step_file(tmp_path, step).touch()
    for other in ("step_x.pt", "damaged_step_00000007.pt", ".step_00000008.pt.1.tmp"):
        (tmp_path / other).touch()
    assert [step for step, _ in step_files(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_folder_without_checkpoints_is_a_fresh_one(tmp_path: Path) -> None:
    assert read_newest(tmp_path) == (None, None, []) and not holds_a_run(tmp_path)


def test_damaged_newest_is_named_and_the_one_before_it_taken(tmp_path: Path) -> None:
    write(tmp_path, 3, best=3)
    give_name(step_file(tmp_path, 3), tmp_path / "best.pt")
    write(tmp_path, 6, best=6)
    give_name(step_file(tmp_path, 6), tmp_path / "best.pt")
    flip_a_bit(tmp_path / "last.pt")
    path, checkpoint, damages = read_newest(tmp_path)
    assert path == step_file(tmp_path, 3) and checkpoint is not None and checkpoint["step"] == 3
    assert len(damages) == 1 and "last.pt is damaged" in damages[0]  # three names, one file
    moved = go_back_to(tmp_path, path, checkpoint)
    assert moved == [
        "step_00000006.pt -> damaged_step_00000006.pt",
        "last.pt -> damaged_last.pt",
        "best.pt -> damaged_best.pt",
    ]
    assert [read_checkpoint(tmp_path / name)["step"] for name in ("last.pt", "best.pt")] == [3, 3]
    assert read_newest(tmp_path)[::2] == (tmp_path / "last.pt", [])


def test_torn_last_alone_leaves_the_newest_step_file(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 6)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").write_bytes(step_file(tmp_path, 6).read_bytes()[:700])
    path, checkpoint, damages = read_newest(tmp_path)
    assert path == step_file(tmp_path, 6) and checkpoint is not None and "last.pt is damaged" in damages[0]
    assert go_back_to(tmp_path, path, checkpoint) == ["last.pt -> damaged_last.pt"]
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 6


def test_lost_last_is_made_again(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "last.pt").unlink()
    path, checkpoint, damages = read_newest(tmp_path)
    assert path is not None and checkpoint is not None and damages == [] and holds_a_run(tmp_path)
    assert go_back_to(tmp_path, path, checkpoint) == []
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (3, 6):
        write(tmp_path, step)
        flip_a_bit(step_file(tmp_path, step))
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint in .* is whole: .*last\.pt is damaged.*step_00000003\.pt is damaged.*--resume PATH",
    ):
        read_newest(tmp_path)


def test_going_back_moves_later_steps_aside(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    moved = go_back_to(tmp_path, step_file(tmp_path, 3), read_checkpoint(step_file(tmp_path, 3)))
    assert moved == [f"step_0000000{step}.pt -> abandoned_step_0000000{step}.pt" for step in (9, 6)]
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert read_checkpoint(tmp_path / "abandoned_step_00000009.pt")["step"] == 9


def test_every_moment_of_a_replacement_has_a_loadable_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each call to the operating system that changes the folder, last.pt is whole."""
    write(tmp_path, 3)
    seen = []

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            result = real(*arguments, **options)
            seen.append((name, read_checkpoint(tmp_path / "last.pt")["step"]))
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "link", "unlink", "fsync"):
        watched(name)
    write(tmp_path, 6)
    remove_old(tmp_path, newest_step=6, keep_last=1, best_steps=[])
    assert {name for name, _ in seen} == {"replace", "link", "unlink", "fsync"}
    assert sorted(step for _, step in seen) == [step for _, step in seen] and {step for _, step in seen} == {3, 6}
    assert seen.index(("fsync", 3)) < seen.index(("replace", 3)), "the data is durable before it has its name"


def test_too_little_space_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_200_000_000})())
    config = CheckpointConfig(keep_every_epochs=10)
    check_space(tmp_path, config, checkpoint_bytes=200_000_000, epochs=29)  # 2 + 1 + 2 + 1 of 0.2 GB
    message = (
        r"run\.folder: .* has 1\.2 GB free; a checkpoint takes 200 MB, and up to 7 lie there while one is written "
        r"\(checkpoint\.keep_last: 2, keep_best: 1, keep_every_epochs: 10\): 1\.4 GB; make room"
    )
    with pytest.raises(ConfigError, match=message):
        check_space(tmp_path, config, checkpoint_bytes=200_000_000, epochs=30)


def test_checkpoints_that_will_be_replaced_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(tmp_path, 3).stat().st_size
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3 * size})())
    check_space(tmp_path, CheckpointConfig(), checkpoint_bytes=size, epochs=1)
    with pytest.raises(ConfigError):
        check_space(tmp_path, CheckpointConfig(keep_last=3), checkpoint_bytes=size, epochs=1)


def test_checkpoint_of_another_folder_becomes_last_before_the_first_save(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, steps in ((ours, (3, 9)), (theirs, (6,))):
        folder.mkdir()
        for step in steps:
            write(folder, step)
    chosen = theirs / "last.pt"
    assert go_back_to(ours, chosen, read_checkpoint(chosen)) == ["step_00000009.pt -> abandoned_step_00000009.pt"]
    path, checkpoint, damages = read_newest(ours)
    assert (path, damages) == (ours / "last.pt", []) and checkpoint is not None and checkpoint["step"] == 6
    assert names(theirs) == ["last.pt", "step_00000006.pt"]
