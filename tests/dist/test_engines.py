"""One trainer behind every launcher and engine: the same losses."""

import json
import sys
from pathlib import Path

import pytest

from tests.dist.launching import BIN, ROOT, launch, torchrun, train

CONFIG = str(Path(__file__).with_name("small.yaml"))


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.fixture(scope="module")
def one_process(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[float]]:
    """Arguments that all runs share, and the losses of 20 steps of one plain process."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ["--config", CONFIG, f"data.path={sample_data}", f"run.folder={folder}", "train.max_steps=20"]
    done = train([sys.executable], *shared, "run.name=one")
    assert done.returncode == 0, done.stderr
    reference = losses(folder / "one")
    assert len(reference) == 20 and reference[-1] != reference[0]
    return shared, reference


def check(done, shared: list[str], name: str, reference: list[float], *, engine: str) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"on 2 x cpu, {engine}, fp32" in done.stdout
    folder = Path(next(part for part in shared if part.startswith("run.folder=")).partition("=")[2])
    assert losses(folder / name) == pytest.approx(reference, rel=1e-5)


def test_ddp_on_two_ranks_has_the_losses_of_one_process(one_process) -> None:
    shared, reference = one_process
    check(train(torchrun(2), *shared, "run.name=ddp"), shared, "ddp", reference, engine="ddp")


def test_accelerate_launch_has_the_losses_of_one_process(one_process) -> None:
    shared, reference = one_process
    launcher = [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        str(ROOT / "launch" / "accelerate" / "ddp_cpu.yaml"),
    ]
    check(
        train([*launcher, "--main_process_port", "0"], *shared, "run.name=accelerate"),
        shared,
        "accelerate",
        reference,
        engine="ddp",
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_has_the_losses_of_one_process(one_process, stage: int) -> None:
    shared, reference = one_process
    done = train(
        torchrun(2),
        *shared,
        f"run.name=zero{stage}",
        "train.engine=deepspeed",
        f"train.zero_stage={stage}",
        timeout_s=280,
    )
    check(done, shared, f"zero{stage}", reference, engine="deepspeed")


def test_accumulation_takes_the_same_images(one_process) -> None:
    """The batch statistics are those of a micro-batch, so the losses may differ; the first step's mean loss is close."""
    shared, reference = one_process
    done = train([sys.executable], *shared, "run.name=accumulated", "train.accumulation_steps=2", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "batch 16 = 1 rank x 2 micro-batches x 8 images; statistics over 8 images" in done.stdout
    folder = Path(next(part for part in shared if part.startswith("run.folder=")).partition("=")[2])
    assert losses(folder / "accumulated")[0] == pytest.approx(reference[0], rel=0.05)


def test_launching_deepspeed_with_a_ddp_config_is_an_error(one_process) -> None:
    shared, _ = one_process
    done = launch([sys.executable, "launch/train.py", *shared, "run.name=x"], ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 2
    assert (
        "the launcher asks for DeepSpeed, the config for train.engine: ddp; set train.engine=deepspeed" in done.stderr
    )
    assert "Traceback" not in done.stderr
