"""unitdist.train.checkpoint: atomic, checked, safe to load; and what a wrong file says."""

import errno
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from unitdist import Unitization2d
from unitdist.errors import CheckpointError, ConfigError
from unitdist.train import checkpoint as checkpoints
from unitdist.train.checkpoint import load_model_state, read_checkpoint, read_file, remove_leftovers, save_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"format": checkpoints.FORMAT, "model": {"weight": torch.arange(1000.0)}, "step": 7})
    return path


def test_what_is_saved_is_read_back(saved: Path) -> None:
    content = read_checkpoint(saved)
    assert content["step"] == 7 and torch.equal(content["model"]["weight"], torch.arange(1000.0))
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_missing_file_names_the_newest_one(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint not found: .*lost\.pt; newest in .*: last\.pt"):
        read_checkpoint(saved.with_name("lost.pt"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_named(saved: Path, share: float) -> None:
    size = saved.stat().st_size
    os.truncate(saved, int(size * share))
    with pytest.raises(CheckpointError, match=rf"last\.pt is damaged or not a checkpoint \({int(size * share)} bytes"):
        read_checkpoint(saved)


def test_flipped_bit_in_a_tensor_is_found(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged: .* differs from its checksum"):
        read_checkpoint(saved)


def test_no_flipped_bit_changes_what_is_loaded(saved: Path) -> None:
    """One bit of every 13th byte in turn, headers and directory of the archive included: refused, or without effect."""
    whole, refused = saved.read_bytes(), 0
    for place in range(0, len(whole), 13):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        saved.write_bytes(data)
        try:
            content = read_checkpoint(saved)
        except CheckpointError:
            refused += 1
        else:
            assert content["step"] == 7 and torch.equal(content["model"]["weight"], torch.arange(1000.0)), place
    assert refused > 0.7 * len(whole) / 13


def test_text_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


def test_foreign_torch_file_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt is not a checkpoint of unitdist's training"):
        read_checkpoint(tmp_path / "a.pt")


class Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize(
    ("protocol", "what"), [(2, "GLOBAL posix.mkdir"), (pickle.DEFAULT_PROTOCOL, "Unsupported operand 149")]
)
def test_code_in_a_checkpoint_never_runs(protocol: int, what: str, tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    torch.save(
        {"format": checkpoints.FORMAT, "model": Payload(str(marker))}, tmp_path / "a.pt", pickle_protocol=protocol
    )
    with pytest.raises(CheckpointError) as refused:
        read_file(tmp_path / "a.pt")
    assert f"a.pt holds code objects, which unitdist never runs ({what}); save the state dict" in str(refused.value)
    assert "weights_only" not in str(refused.value)  # torch's own text advises to run the code
    assert not marker.exists()


def test_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        CheckpointError,
        match=r"cannot write .*last\.pt: No space left on device \(it needs 0 kB, .* are free\); what was saved before is intact",
    ):
        save_checkpoint(saved, {"format": checkpoints.FORMAT, "model": {}, "step": 8})
    monkeypatch.undo()
    assert read_checkpoint(saved)["step"] == 7
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_full_disk_is_named_not_torchs_position(saved: Path) -> None:
    content = {"format": checkpoints.FORMAT, "model": {"weight": torch.zeros(300_000)}, "step": 8}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, usual[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.pt: File too large \(it needs 1\.2 MB, .* are free\)"):
            save_checkpoint(saved, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert read_checkpoint(saved)["step"] == 7
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_leftovers_of_a_killed_save_are_removed(saved: Path) -> None:
    (saved.parent / ".last.pt.123.tmp").write_bytes(b"half")
    remove_leftovers(saved.parent)
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def net(channels: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), Unitization2d(channels, norm_divisor=9))


def test_checkpoint_of_another_model_names_the_difference() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"x\.pt belongs to another model: \d of another shape \(first: 0\.weight is \(8, 3, 3, 3\) there, \(4, 3",
    ):
        load_model_state(net(), net(8).state_dict(), "x.pt")
    with pytest.raises(
        CheckpointError,
        match=r"belongs to another model: 9 missing \(first: 0\.weight\); 1 unknown \(first: fc\.weight\)",
    ):
        load_model_state(net(), {"fc.weight": torch.zeros(2)}, "x.pt")


def test_checkpoint_without_norm_divisors_is_refused() -> None:
    state = {name: value for name, value in net().state_dict().items() if not name.endswith("norm_divisor")}
    with pytest.raises(CheckpointError, match=r"x\.pt has no norm divisors \(first: 1\.norm_divisor\)"):
        load_model_state(net(), state, "x.pt")


def test_unset_norm_divisor_in_a_checkpoint_is_refused() -> None:
    state = net().state_dict() | {"1.norm_divisor": torch.tensor(0)}
    with pytest.raises(CheckpointError, match=r"x\.pt has an unset norm divisor \(first: 1\.norm_divisor\)"):
        load_model_state(net(), state, "x.pt")


def test_folder_that_is_gone_is_a_failed_save(tmp_path: Path) -> None:
    """An error that the writer counts: training goes on."""
    with pytest.raises(
        CheckpointError, match=r"No such file or directory \(it needs 40 kB, an unknown number of bytes"
    ):
        save_checkpoint(tmp_path / "gone" / "last.pt", {"weight": torch.zeros(10_000)})


def test_storage_that_fails_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    torch.save({"step": 1}, path)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zipfile.ZipFile", fails)
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read: Input/output error") as caught:
        read_file(path)
    assert type(caught.value) is CheckpointError
