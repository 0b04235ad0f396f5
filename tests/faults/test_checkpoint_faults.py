"""Damaged, missing, unwritable and hostile checkpoints: what a training does about each, seen from outside."""

import argparse
import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evaluation.checkpoints import load_network
from evaluation.options import EvaluationOptions
from tests.dist.jobs import assert_same_result, record, record_safely
from tests.dist.launching import ROOT, launch, torchrun
from unitdist import load_pretrained
from unitdist.config import Config
from unitdist.config_file import load_config
from unitdist.errors import CheckpointError, ConfigError
from unitdist.train import epoch
from unitdist.train.checkpoint import FORMAT, read_checkpoint
from unitdist.train.loop import train
from unitdist.train.retention import step_files

CONFIG = ROOT / "tests" / "dist" / "small.yaml"


SYNTHETIC = [
    "data.dataset=synthetic", "data.loader=synthetic", "data.synthetic_samples=64", "data.synthetic_classes=16",
    "data.augmentation=none", "data.global_batch_size=8", "data.image_size_px=16", "run.name=a",
]  # fmt: skip
"""8 steps of 8 an epoch, 2 epochs; about 2.3 MB a checkpoint."""


def config(folder: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [*SYNTHETIC, f"run.folder={folder}", *overrides])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 14 MB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happens to and that waits for its saves."""
    return train(
        config(tmp_path_factory.mktemp("undisturbed"), "checkpoint.every_steps=5", "checkpoint.asynchronous=false")
    )


def before_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, object]) -> None:
    """Call actions[step] when the training is about to take optimizer step `step`, counted from 1."""
    real = epoch.train_on

    def train_on(run, batch, micro_step):
        if run.state.step + 1 in actions:
            run.writer.wait()
            actions[run.state.step + 1]()
        return real(run, batch, micro_step)

    monkeypatch.setattr(epoch, "train_on", train_on)


def fill(disk: Path) -> None:
    """The rest of the disk, to the last byte."""
    with open(disk / "filler", "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while True:
                file.write(b"0" * 4096)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_full_disk_is_loud_and_the_run_goes_on(
    undisturbed: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {}

    def note_and_fill() -> None:
        before.update({path.name: path.read_bytes() for path in (small_disk / "a").glob("*.pt")})
        fill(small_disk)

    def compare_and_free() -> None:
        assert {path.name: path.read_bytes() for path in (small_disk / "a").glob("*.pt")} == before
        (small_disk / "filler").unlink()

    before_step(monkeypatch, {5: note_and_fill, 10: compare_and_free})
    capfd.readouterr()
    run = train(
        config(small_disk, "checkpoint.every_steps=2", "checkpoint.max_failed_saves=3")
    )  # saves at 6 and 8 fail
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("unitdist: warning: ")]
    failed = [line for line in warnings if "cannot write the checkpoint" in line]
    assert [
        re.findall(
            r"step_0*(\d+)\.pt: No space left on device \(it needs 2\.\d+ MB, .*failed saves in a row: (\d)", line
        )
        for line in failed
    ] == [[("6", "1")], [("8", "2")]]
    assert before.keys() >= {"last.pt", "step_00000004.pt"}
    ours, theirs = (read_checkpoint(folder / "last.pt") for folder in (run, undisturbed))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert record(run) == record(undisturbed)
    assert read_checkpoint(run / "best.pt")["step"] == 16, "the best epoch whose save did not fail"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_too_many_failed_saves_end_the_run_and_it_resumes(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, {5: lambda: fill(small_disk)})
        with pytest.raises(
            CheckpointError,
            match=r"2 saves in a row failed \(checkpoint\.max_failed_saves\); the last one: cannot write",
        ):
            train(config(small_disk, "checkpoint.every_steps=2", "checkpoint.max_failed_saves=2"))
    run = small_disk / "a"
    assert read_checkpoint(run / "last.pt")["step"] == 4
    with pytest.raises(ConfigError, match=r"has 0 kB free; a checkpoint takes 2\.\d+ MB, and up to 4 lie there"):
        train(config(small_disk, "checkpoint.every_steps=2"), resume="auto")
    (small_disk / "filler").unlink()
    train(config(small_disk, "checkpoint.every_steps=2"), resume="auto")
    assert read_checkpoint(run / "last.pt")["step"] == 16


def test_too_many_failed_saves_end_both_ranks_with_one_message(small_disk: Path) -> None:
    """Rank 0's disk is full from step 5 on; the saves of steps 6 and 8 fail."""
    changes = ["checkpoint.every_steps=2", "checkpoint.max_failed_saves=2", f"run.folder={small_disk}"]
    worker = ROOT / "tests" / "faults" / "spoiled_training.py"
    done = launch([*torchrun(2), str(worker), "full_disk", str(CONFIG), *SYNTHETIC, *changes], timeout_s=290)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if re.match(r"unitdist( \[rank \d\])?: error: ", line)]
    assert len(errors) == 1 and errors[0].startswith(
        "unitdist [rank 0]: error: 2 saves in a row failed (checkpoint.max_failed_saves); the last one: cannot write the checkpoint "
    ), done.stderr[-3000:]
    assert "lost contact" not in done.stderr and "stuck" not in done.stderr
    exits = re.findall(r"^  rank +: (\d) .*\n  exitcode +: (\d+) ", done.stderr, flags=re.MULTILINE)
    assert sorted(exits) == [("0", "1"), ("1", "1")], done.stderr[-3000:]
    assert "traceback : CheckpointError: 2 saves in a row failed" in done.stderr.partition("Root Cause")[2]
    left = (small_disk / "a" / "logs" / "rank_00001.log").read_text()
    assert "CheckpointError: 2 saves in a row failed" in left, "rank 1 raised the same error"
    run = small_disk / "a"
    assert [(step, read_checkpoint(path)["step"]) for step, path in step_files(run)] == [(4, 4), (2, 2)]
    assert read_checkpoint(run / "last.pt")["step"] == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_final_save_that_fails_is_an_error(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(monkeypatch, {16: lambda: fill(small_disk)})
    with pytest.raises(CheckpointError, match=r"step_00000016\.pt: No space left on device"):
        train(config(small_disk, "checkpoint.max_failed_saves=9"))
    assert read_checkpoint(small_disk / "a" / "last.pt")["step"] == 8


def test_mistake_of_ours_in_the_writers_thread_ends_the_run_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a fault put in by a test")

    monkeypatch.setattr("unitdist.train.saving.save_checkpoint", broken)
    with pytest.raises(CheckpointError, match="writing the checkpoint of step 2 failed with KeyError: 'a fault put in"):
        train(config(tmp_path, "checkpoint.every_steps=2", "checkpoint.max_failed_saves=9"))
    run = tmp_path / "a"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    log = (run / "logs" / "rank_00000.log").read_text()
    assert "in broken" in log and log.count("Traceback") == 2
    assert max(event["step"] for event in record_safely(run)) < 8, "not only at the end of the epoch"


def test_read_only_folder_is_found_before_the_data_are_opened(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    wrong_data = load_config(CONFIG, ["data.path=nowhere", f"run.folder={small_disk}", "run.name=a"])
    with pytest.raises(
        ConfigError, match=r"run\.folder: cannot write to .*/a \(Read-only file system\); choose another"
    ):
        train(wrong_data)


def test_too_small_disk_is_found_before_the_data_are_opened(small_disk: Path) -> None:
    wrong_data = load_config(
        CONFIG, ["data.path=nowhere", f"run.folder={small_disk}", "run.name=a", "checkpoint.keep_last=5"]
    )
    with pytest.raises(
        ConfigError, match=r"run\.folder: .* MB free; a checkpoint takes 2\.\d+ MB, and up to 7 lie there"
    ):
        train(wrong_data)


def test_saving_beside_the_training_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    beside = train(config(tmp_path, "checkpoint.every_steps=1"))
    assert_same_result(beside, undisturbed)
    stalls = [event["save_stall_s"] for event in record_safely(beside) if event["event"] == "train"]
    assert len(stalls) == 16 and min(stalls[1:]) > 0


@pytest.mark.parametrize("given", [None, "PATH"])
def test_restart_by_torchrun_goes_on_from_the_newest_checkpoint(
    given: str | None, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["checkpoint.every_steps=5", "checkpoint.asynchronous=false"]
    first = train(config(tmp_path / "first", *settings, "train.max_steps=3")) / "last.pt"
    resume = None if given is None else str(first)
    train(config(tmp_path, *settings, "train.max_steps=7"), resume=resume)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder = train(config(tmp_path, *settings), resume=resume)
    assert [event["step"] for event in record(folder) if event["event"] == "train"][-1] == 16
    ours, theirs = read_checkpoint(folder / "last.pt"), read_checkpoint(undisturbed / "last.pt")
    assert [name for name, value in theirs["model"].items() if not torch.equal(value, ours["model"][name])] == []
    assert not list(folder.glob("abandoned_*"))  # it did not go back to PATH


def test_what_the_config_keeps_is_what_stays(tmp_path: Path) -> None:
    keep = [
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=2",
        "checkpoint.keep_best=2",
        "checkpoint.keep_every_epochs=2",
    ]
    run = train(config(tmp_path, *keep, "train.epochs=4"))
    metrics = read_checkpoint(run / "last.pt")["metrics"]
    best = [entry["step"] for entry in metrics["ranking"]]
    top1 = {event["step"]: event["val_top1"] for event in record_safely(run) if event["event"] == "epoch"}
    assert best == sorted(top1, key=lambda step: (-top1[step], step))[:2]
    assert {step for step, _ in step_files(run)} == {30, 32, *best}
    assert read_checkpoint(run / "best.pt")["step"] == best[0] and read_checkpoint(run / "last.pt")["step"] == 32
    assert [read_checkpoint(path)["epoch"] for path in sorted(run.glob("epoch_*.pt"))] == [2, 4]


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_damaged_newest_checkpoint_is_named_and_the_run_ends_as_undisturbed(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    every = "checkpoint.every_steps=3"
    run = train(config(tmp_path, every, "train.max_steps=11"))
    with open(run / "last.pt", "r+b") as file:  # in place: the step file is the same one
        size = os.fstat(file.fileno()).st_size
        if damage == "torn":
            file.truncate(size // 2)
        else:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
    capfd.readouterr()
    train(config(tmp_path, every), resume="auto")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert "last.pt is damaged" in warnings[0]
    assert warnings[1].endswith("step_00000009.pt, step 9, instead; the steps after it are trained again")
    assert "step_00000011.pt -> damaged_step_00000011.pt" in warnings[2]
    assert_same_result(run, undisturbed)


def test_all_damaged_is_an_error_never_a_fresh_start(tmp_path: Path) -> None:
    run = train(config(tmp_path, "checkpoint.every_steps=3", "train.max_steps=5"))
    for path in run.glob("*.pt"):
        os.truncate(path, 1000)
    before = sorted(path.name for path in run.iterdir())
    for state, then in (("running", "failed"), ("finished", "finished")):
        (run / "status.json").write_text(json.dumps({"state": state, "step": 5, "reason": ""}))
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*last\.pt is damaged"):
            train(config(tmp_path), resume="auto")
        assert sorted(path.name for path in run.iterdir()) == before
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"]) == (then, 5)
        assert ("is whole" in status["reason"]) == (then == "failed")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_code_in_a_file_never_runs_wherever_it_is_loaded(tmp_path: Path) -> None:
    marker, hostile = tmp_path / "it_ran", tmp_path / "hostile.pt"
    torch.save({"format": FORMAT, "model": Payload(marker), "state_dict": Payload(marker)}, hostile)
    run = tmp_path / "a"
    run.mkdir()
    for name in ("last.pt", "model.safetensors"):
        (run / name).write_bytes(hostile.read_bytes())
    (run / "config.json").write_text("{}")
    loads = {
        "resume": lambda: train(config(tmp_path / "new"), resume=str(hostile)),
        "resume auto": lambda: train(config(tmp_path), resume="auto"),
        "evaluation": lambda: load_network(hostile, EvaluationOptions()),
        "pretrained": lambda: load_pretrained(run),
        "export": lambda: runpy.run_path(str(ROOT / "tools" / "export.py"))["export"](
            argparse.Namespace(
                checkpoint=hostile, output=tmp_path / "out", weights="auto", evaluation=None, license="x", onnx=False
            )
        ),
    }
    for name, load in loads.items():
        with pytest.raises((CheckpointError, ConfigError)):
            load()
        assert not marker.exists(), name


def test_nothing_in_the_packages_can_run_what_it_reads() -> None:
    """One reading of a pickle is allowed: data/cifar.py's, whose unpickler builds nothing but plain values; see its tests."""
    forbidden = {
        r"weights_only\s*=\s*False": set(),
        r"pickle\.loads?\(": set(),
        r"torch\.load\((?![^)]*weights_only=True)": set(),
        r"allow_pickle\s*=\s*True": set(),
        r"yaml\.(unsafe_load|full_load)|yaml\.load\((?!value, Loader=_Yaml\))": set(),
        r"(?<![\w.])(eval|exec)\(": set(),
        r"shell\s*=\s*True|os\.system\(|os\.popen\(": set(),
        r"pickle\.Unpickler": {"unitdist/data/cifar.py"},
    }
    files = [path for folder in ("unitdist", "evaluation", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for pattern, allowed in forbidden.items():
        found = {str(path.relative_to(ROOT)) for path in files if re.search(pattern, path.read_text())}
        assert found == allowed, pattern
