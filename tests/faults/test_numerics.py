"""Losses and gradients that are not finite, losses that jump, weights that differ: injected from outside into real runs."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.jobs import record_safely
from tests.dist.launching import ROOT, launch, torchrun
from tests.dist.launching import train as launch_training
from tests.faults.test_checkpoint_faults import CONFIG, SYNTHETIC, config
from unitdist.errors import ConfigError, TrainingError
from unitdist.train import epoch
from unitdist.train.checkpoint import read_checkpoint, read_file, save_checkpoint
from unitdist.train.deepspeed_engine import check_supported
from unitdist.train.loop import train
from unitdist.train.nonfinite_batch import replay

SPOILED = ROOT / "tests" / "faults" / "spoiled_training.py"


def spoil_images(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """At these steps, counted from 1, one pixel of the batch is infinite."""
    real = epoch.take_step

    def take_step(run, watcher, batches):
        if run.state.step + 1 in steps:
            images = batches[0].images.clone()  # the synthetic loader hands out one tensor again and again
            images[0, 0, 0, 0] = math.inf
            batches = [dataclasses.replace(batches[0], images=images)]
        real(run, watcher, batches)

    monkeypatch.setattr(epoch, "take_step", take_step)


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """At this step one element of the gradient is a nan; the loss is finite."""
    real = epoch.train_on

    def train_on(run, batch, micro_step):
        loss = real(run, batch, micro_step)
        if run.state.step + 1 == step:
            next(iter(run.engine.module.parameters())).grad[0, 0, 0, 0] = math.nan
        return loss

    monkeypatch.setattr(epoch, "train_on", train_on)


def weights(run: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return read_checkpoint(run / name)["model"]


def test_stop_names_the_step_and_saves_a_batch_that_replays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_images(monkeypatch, 5)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 5 \(epoch 1, lr 0\.0001\); its batch is in .*lower optim\.lr"
    ):
        train(config(tmp_path, "checkpoint.every_steps=2", "train.log_every_steps=8"))
    run = tmp_path / "a"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    kept = read_file(run / "nonfinite" / "step_00000005" / "rank_0000.pt")
    assert (kept["step"], kept["rank"], kept["epoch"]) == (5, 0, 1) and math.isnan(kept["loss"])
    batch = kept["batches"][0]
    assert batch["images"].shape == (8, 3, 16, 16) and len(set(batch["sample_ids"].tolist())) == 8
    assert all(torch.equal(value, kept["model"][name]) for name, value in weights(run).items()), (
        "the state before the step"
    )
    command = [sys.executable, "tools/replay_batch.py", str(run / "nonfinite" / "step_00000005")]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True).stdout
    assert "replayed:    loss nan; norm of the gradient nan" in report
    assert (
        "first module whose output is not finite: stem" in report and "the images themselves are not finite" in report
    )


def test_sound_batch_replays_to_the_loss_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradient(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"the gradient is not finite \(the loss is\) at step 3 "):
        train(config(tmp_path))
    folder = tmp_path / "a" / "nonfinite" / "step_00000003"
    kept, report = read_file(folder / "rank_0000.pt"), replay(folder)
    now = float(report.split("replayed:    loss ")[1].split(";")[0])
    assert now == pytest.approx(kept["loss"], rel=1e-5)
    assert report.endswith("first module whose output is not finite: none")


def test_skip_leaves_out_the_update_and_nothing_is_poisoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil_images(monkeypatch, 5, 6)
    run = train(
        config(
            tmp_path,
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=9",
            "health.on_nonfinite=skip",
            "train.ema_decay=0.9",
        )
    )
    lines = [line for line in capfd.readouterr().err.splitlines() if "the loss is nan at step" in line]
    assert [line.rpartition("; ")[2] for line in lines] == [
        "its update is skipped (1 in a row)",
        "its update is skipped (2 in a row)",
    ]
    events = record_safely(run)
    assert [event["step"] for event in events if event["event"] == "nonfinite"] == [5, 6]
    assert [event["step"] for event in events if event["event"] == "train"] == [1, 2, 3, 4, *range(7, 17)]
    before, after = weights(run, "step_00000004.pt"), weights(run, "step_00000006.pt")
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "statistics and weights as before"
    last = read_checkpoint(run / "last.pt")
    assert last["step"] == 16 and all(bool(value.isfinite().all()) for value in last["model"].values())
    assert all(bool(value.isfinite().all()) for value in last["model_ema"].values())


def test_too_many_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_images(monkeypatch, 3, 4, 5)
    with pytest.raises(
        TrainingError, match=r"at step 5 .*2 steps before it were skipped, which health\.max_in_a_row allows"
    ):
        train(config(tmp_path, "health.on_nonfinite=skip", "health.max_in_a_row=2"))


def test_rollback_takes_the_checkpoints_weights_and_goes_on_behind_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil_images(monkeypatch, 7)
    keep = ["checkpoint.every_steps=7", "checkpoint.keep_last=9"]
    changes = ["health.on_nonfinite=rollback", "train.max_steps=7"]
    train(config(tmp_path, "checkpoint.every_steps=4", "train.max_steps=4"))
    run = train(config(tmp_path, *keep, *changes), resume="auto")
    warned = [line for line in capfd.readouterr().err.splitlines() if "rolled back to the weights of step 4" in line]
    assert len(warned) == 1 and "the images of steps 5 to 7 are left out" in warned[0]
    old, new = read_checkpoint(run / "step_00000004.pt"), read_checkpoint(run / "last.pt")
    assert new["step"] == 7 and new["samples"] == 7 * 8
    assert all(torch.equal(value, new["model"][name]) for name, value in old["model"].items())
    for name, buffers in old["optimizer"]["state"].items():
        assert torch.equal(buffers["momentum_buffer"], new["optimizer"]["state"][name]["momentum_buffer"])


def test_rollback_cannot_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_images(monkeypatch, *range(5, 17))
    with pytest.raises(
        TrainingError, match=r"at step 7 .*rolled back to .*last\.pt 2 times, which health\.max_in_a_row allows"
    ):
        train(config(tmp_path, "checkpoint.every_steps=4", "health.on_nonfinite=rollback", "health.max_in_a_row=2"))


def test_without_judging_each_step_the_log_step_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_images(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 8 "):
        train(config(tmp_path, "health.every_step=false", "train.log_every_steps=8"))
    assert not (tmp_path / "a" / "last.pt").exists()
    with pytest.raises(ConfigError, match=r"health\.on_nonfinite: skip needs health\.every_step: true"):
        config(tmp_path, "health.every_step=false", "health.on_nonfinite=skip")


def test_poisoned_statistics_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(run, watcher, batches, real=epoch.take_step):
        real(run, watcher, batches)
        if run.state.step + 1 == 6:
            next(value for name, value in run.engine.module.named_buffers() if name.endswith("running_var"))[0] = (
                math.inf
            )

    monkeypatch.setattr(epoch, "take_step", poison)
    with pytest.raises(TrainingError, match=r"model\..*running_var is not finite at step 6; nothing was saved over"):
        train(config(tmp_path, "checkpoint.every_steps=2"))
    assert read_checkpoint(tmp_path / "a" / "last.pt")["step"] == 4


def test_two_ranks_skip_the_step_together_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """One job: rank 1's batch of step 3 is spoilt, a bit of one of its weights flips after step 5."""
    changes = [
        "health.on_nonfinite=skip",
        "health.checksum_every_steps=2",
        "checkpoint.every_steps=4",
        "model.sync_group=none",
    ]
    done = launch(
        [*torchrun(2), str(SPOILED), "pixel", str(CONFIG), *SYNTHETIC, f"run.folder={tmp_path}", *changes],
        timeout_s=290,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("unitdist [rank 0]: ")]
    assert len([line for line in done.stderr.splitlines() if line.startswith("unitdist [rank")]) == len(said) == 2, (
        done.stderr[-3000:]
    )
    assert (
        "warning: the loss is nan on rank 1 at step 3 " in said[0] and "its update is skipped (1 in a row)" in said[0]
    )
    assert (
        "error: after step 6 the 2 ranks differ, and no majority says which is right, in the parameters, first in stem"
        in said[1]
    )
    run = tmp_path / "a"
    parts = [read_file(path) for path in sorted((run / "nonfinite" / "step_00000003").iterdir())]
    assert [(part["rank"], math.isfinite(part["loss"])) for part in parts] == [(0, True), (1, False)]
    assert "the images themselves are not finite" in replay(run / "nonfinite" / "step_00000003")
    last = read_checkpoint(run / "last.pt")
    assert last["step"] == 4 and all(bool(value.isfinite().all()) for value in last["model"].values())


def test_two_ranks_roll_back_together_and_go_on_as_the_docs_say(tmp_path: Path) -> None:
    """A gradient of rank 1 alone is spoilt at step 7; the newest checkpoint is of step 4. The run that follows is, bit for bit, one
    that resumes the weights, optimizer and averaged weights of step 4 as if they were those of step 7."""
    changes = ["checkpoint.every_steps=4", "train.ema_decay=0.9", "health.checksum_every_steps=1"]
    settings = [*SYNTHETIC, *changes, "health.on_nonfinite=rollback"]
    keep = "checkpoint.keep_last=9"
    done = launch(
        [*torchrun(2), str(SPOILED), "gradient", str(CONFIG), *settings, keep, f"run.folder={tmp_path}"], timeout_s=290
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("unitdist [rank")]
    assert len(said) == 1 and said[0].startswith("unitdist [rank 0]: warning: the gradient is not finite (the loss is)")
    assert "rolled back to the weights of step 4" in said[0] and "the images of steps 5 to 7 are left out" in said[0]
    run, kept = tmp_path / "a", tmp_path / "a" / "nonfinite" / "step_00000007"
    assert [event["step"] for event in record_safely(run) if event["event"] == "train"] == [*range(1, 7), *range(8, 17)]

    parts, report = [read_file(path) for path in sorted(kept.iterdir())], replay(kept)
    assert [math.isfinite(part["loss"]) for part in parts] == [True, True]
    assert all(math.isnan(part["gradient_norm"]) for part in parts), "the reduced gradient is every rank's"
    now = float(report.split("replayed:    loss ")[1].split(";")[0])
    assert now == pytest.approx(sum(part["loss"] for part in parts) / 2, rel=1e-5)
    assert report.endswith("first module whose output is not finite: none"), (
        "the batch is sound, the fault came from outside"
    )

    start = read_checkpoint(run / "step_00000004.pt") | {"step": 7, "samples": 7 * 8}
    save_checkpoint(tmp_path / "start.pt", start)
    expected = tmp_path / "expected"
    resume = ["--config", str(CONFIG), *settings, f"run.folder={expected}", "--resume", str(tmp_path / "start.pt")]
    resumed = launch_training(torchrun(2), *resume, timeout_s=290)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ours, theirs = read_checkpoint(run / "last.pt"), read_checkpoint(expected / "a" / "last.pt")
    assert (ours["step"], ours["metrics"]) == (16, theirs["metrics"])
    for part in ("model", "model_ema"):
        assert [name for name, value in theirs[part].items() if not torch.equal(value, ours[part][name])] == []
    for name, buffers in theirs["optimizer"]["state"].items():
        assert torch.equal(buffers["momentum_buffer"], ours["optimizer"]["state"][name]["momentum_buffer"]), name


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_step_that_cannot_be_judged_can_only_stop(tmp_path: Path, policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"health\.on_nonfinite: {policy} .* train\.cuda_graph=false"):
        config(tmp_path, f"health.on_nonfinite={policy}", "train.cuda_graph=true")
    with pytest.raises(ConfigError, match=rf"health\.on_nonfinite: {policy} .* train\.engine=ddp"):
        check_supported(config(tmp_path, f"health.on_nonfinite={policy}", "train.engine=deepspeed"))


def test_error_of_the_start_is_in_log_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a fault put in by a test")

    monkeypatch.setattr("unitdist.train.build_run.build_monitor", broken)
    run = tmp_path / "a"
    run.mkdir()
    (run / "status.json").write_text('{"state": "starting", "step": 3, "reason": ""}\n')
    with pytest.raises(ValueError, match="a fault put in"):
        train(config(tmp_path))
    out = capsys.readouterr().out
    assert "steps to run" in out, "what will be run is said before the monitor's first look, which may take minutes"
    assert ("takes a first look" in out) == (config(tmp_path).analysis.every_epochs > 0)
    status = json.loads((run / "status.json").read_text())
    assert status == {"state": "failed", "step": 3, "reason": "a fault put in by a test"}
    assert "at step 0 (start): ValueError: a fault put in by a test" in (run / "failure.txt").read_text()
    assert (run / "logs" / "rank_00000.log").read_text().count("Traceback") == 1


def test_monitors_images_that_one_rank_cannot_read_end_the_start_of_both_with_one_message(tmp_path: Path) -> None:
    settings = [*SYNTHETIC, "analysis.every_epochs=1", f"run.folder={tmp_path}"]
    done = launch([*torchrun(2), str(SPOILED), "monitor", str(CONFIG), *settings], timeout_s=290)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("unitdist")]
    assert said == ["unitdist [rank 1]: error: unreadable image, put in by a test"], done.stderr[-3000:]
    run = tmp_path / "a"
    status = json.loads((run / "status.json").read_text())
    assert status == {"state": "failed", "step": 0, "reason": "unreadable image, put in by a test"}
    first = (run / "failure.txt").read_text().splitlines()[1]
    assert first.startswith("first cause: rank 1 on ") and first.endswith("(start): unreadable image, put in by a test")
