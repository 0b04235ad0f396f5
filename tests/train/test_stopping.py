"""unitdist.train.stopping: the first signal is a request, its repeats are not, a later one is an order."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.jobs import assert_same_result
from tests.dist.launching import ROOT
from unitdist.config_file import load_config
from unitdist.train import loop
from unitdist.train.loop import train
from unitdist.train.run_folder import finish_status
from unitdist.train.stopping import REPEAT_S, Stopped, StopRequest
from unitdist.world import World


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_met_at_the_next_check_and_its_repeats_change_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    request = StopRequest(World.single())
    try:
        request.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=number.name):
            request.check()
    finally:
        request.close()
    assert signal.getsignal(number) == before


def test_a_later_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal; from unitdist.train import stopping; from unitdist.world import World; stopping.REPEAT_S = 0.0\n"
        "request = stopping.StopRequest(World.single())\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "import ctypes; ctypes.CDLL(None).sleep(100); print('still here')"  # as in a collective: no Python runs
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 128 + signal.SIGUSR1 and "still here" not in done.stdout
    assert REPEAT_S < 30


def test_a_run_stopped_in_validation_validates_again(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [f"data.path={sample_data}", f"run.folder={tmp_path}", "train.epochs=2", "data.global_batch_size=64"]
    small = ROOT / "tests" / "dist" / "small.yaml"
    train(load_config(small, [*shared, "run.name=undisturbed"]))
    run = load_config(small, [*shared, "run.name=stopped"])
    validate = loop.validate

    def told_to_stop(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", told_to_stop)
        with pytest.raises(Stopped, match=r"stopped at step 3 \(SIGTERM\), saved; go on with --resume auto"):
            train(run)
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "stopped"
    train(run, resume="auto")
    assert_same_result(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_signal_before_the_first_step_is_met_there_and_changes_nothing(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 0, and at the start of the second epoch, whose first one is validated already."""
    shared = [f"data.path={sample_data}", f"run.folder={tmp_path}", "train.epochs=2", "data.global_batch_size=64"]
    small = ROOT / "tests" / "dist" / "small.yaml"
    train(load_config(small, [*shared, "run.name=undisturbed"]))
    run = load_config(small, [*shared, "run.name=stopped"])
    build_run = loop.build_run

    def told_to_stop(*args: Any) -> Any:
        built = build_run(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return built

    for step in (0, 3):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "build_run", told_to_stop)
            with pytest.raises(Stopped, match=rf"stopped at step {step} \(SIGTERM\)"):
                train(run, resume="auto")
        assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "stopped"
        if step == 0:
            train(load_config(small, [*shared, "run.name=stopped", "train.max_steps=3"]), resume="auto")
    train(run, resume="auto")
    assert_same_result(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_run_is_not_finished_before_its_protocols_are(sample_data: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.path={sample_data}",
        f"run.folder={tmp_path}",
        "run.name=a",
        "train.max_steps=1",
        "evaluation.protocols=[single]",
    ]
    folder = train(load_config(ROOT / "tests" / "dist" / "small.yaml", overrides))
    assert json.loads((folder / "status.json").read_text()) == {"state": "evaluating", "step": 1, "reason": ""}
    finish_status(folder, World.single())
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
