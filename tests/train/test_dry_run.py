"""train.py --dry-run: what it prints is what the training would do, and it touches neither network nor GPU."""

import re
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unitdist.config import Config
from unitdist.config_file import load_config
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.train.batch_split import split_batch
from unitdist.train.dry_run import build_and_measure, dry_run, estimate_memory, learning_rates, simulated_world

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.name=cifar_resnet20", "data.image_size_px=32", "data.scale_range_px=[36,48]", "data.val_resize_px=36")


def small(*overrides: str) -> Config:
    return load_config("imagenet_r101_unit", [*SMALL, *overrides])


def run_train_py(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    def refuse(*ignored: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(sys, "argv", ["launch/train.py", *arguments])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


def test_report_of_128_ranks_on_any_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--dry-run",
        "--config",
        "imagenet_r101_unit",
        "--simulate-world",
        "128",
        "--simulate-samples",
        "1281167",
    ]
    changes = [*SMALL, "data.global_batch_size=1024", "optim.reference_batch_size=64", "model.stats_batch_size=64"]
    run_train_py(monkeypatch, *arguments, *changes)
    report = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    report = {name: text.strip() for name, text in report.items()}
    assert report["world"] == "128 ranks, 16 nodes x 8; ddp, fp32"
    assert report["batch"].startswith("1024 = 128 ranks x 1 micro-batch x 8 images")
    assert report["statistics"] == "over 64 images: 16 groups of 8 ranks (0-7, ..., 120-127)"
    assert report["data"] == "1,281,167 training images, 10,008 per rank and epoch, 143 left over by turns"
    assert (
        report["learning rate"]
        == "epoch 1: 0.16, epoch 31: 0.032, epoch 61: 0.0064, epoch 91: 0.00128, epoch 120: 0.00128"
    )
    assert report["steps"] == "1,251 per epoch x 120 epochs, 150,120 to run"
    assert not torch.distributed.is_initialized()


def test_simulation_without_dry_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_train_py(monkeypatch, "--config", "demo", "--simulate-world", "8")
    assert left.value.code == 2 and "are for --dry-run" in capsys.readouterr().err


def test_dry_run_works_in_the_batch_shell_of_a_larger_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "16"}.items():
        monkeypatch.setenv(name, value)
    run_train_py(monkeypatch, "--dry-run", "--config", "imagenet_r101_unit", "--simulate-world", "16", *SMALL)
    assert "64 = 16 ranks x 1 micro-batch x 4 images" in capsys.readouterr().out


def test_training_set_is_counted_where_it_is(sample_data: Path) -> None:
    config = small(f"data.path={sample_data}", "data.global_batch_size=40", "model.num_classes=16")
    report = dry_run(config, simulated_world(4, None))
    assert "192 training images, 40 per rank and epoch, 32 left over by turns" in report
    assert "4 per epoch x 120 epochs, 480 to run" in report
    report = dry_run(small("data.path=/nowhere"), simulated_world(4, None))
    assert "nothing at data.path (/nowhere); --simulate-samples N stands for it" in report
    assert "unknown number per epoch, 120 epochs" in report


def test_one_of_anything_is_no_plural() -> None:
    report = dry_run(
        small("data.global_batch_size=1", "data.val_batch_size=1", "train.epochs=1"),
        simulated_world(1, None),
        num_samples=1,
    )
    assert "1 = 1 rank x 1 micro-batch x 1 image; validation 1 image per rank" in report
    assert re.findall(r"\b1 (?!per\b)\w+s\b", report) == []


@pytest.mark.parametrize("norm", ["unitization", "batchnorm"])
def test_activations_are_what_autograd_keeps(norm: str) -> None:
    config = small(f"model.norm={norm}")
    _, per_image = build_and_measure(config)
    model = build_model(config.model, image_size_px=32, sync=False).to(memory_format=torch.channels_last)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    # Vectors of a few channels do not grow with the batch; they are the difference.
    assert per_image == pytest.approx(sum(sizes.values()) / 8, rel=0.01)


def test_memory_follows_engine_precision_and_optimizer() -> None:
    def memory(*overrides: str) -> object:
        config, world = small(*overrides), simulated_world(8, None)
        split = split_batch(config, world)
        return estimate_memory(config, world, split, parameters=1000, state=4800, activations=600)

    plain = vars(memory())
    image = 4 * 3 * 32 * 32
    assert plain == {
        "weights": 4800,
        "gradients": 4000,
        "optimizer": 4000,
        "average": 0,
        "activations": 600 * 8,
        "images": 8 * 3 * image,
    }
    assert vars(memory("train.precision=bf16"))["activations"] == 2400
    assert vars(memory("train.ema_decay=0.99"))["average"] == 4800
    assert vars(memory("optim.name=adamw"))["optimizer"] == 8000
    sharded = vars(memory("train.engine=deepspeed", "train.zero_stage=2"))
    assert (sharded["optimizer"], sharded["gradients"], sharded["weights"]) == (500, 500, 4800)
    assert vars(memory("train.engine=deepspeed", "train.zero_stage=3"))["weights"] == 600


def test_rates_are_told_wherever_the_schedule_turns() -> None:
    cosine = small(
        "schedule.name=cosine", "train.epochs=100", "schedule.warmup_epochs=5", "schedule.milestones_epochs=[]"
    )
    rates = dict(learning_rates(cosine, 64_000))
    assert list(rates) == [1, 6, 26, 51, 76, 100]
    assert rates[1] == 0 and rates[6] == 0.01 and rates[26] > rates[51] > rates[76] > rates[100] > 0
    steps = replace(cosine.schedule, name="step", milestones_epochs=(31, 61), warmup_epochs=0.0)
    assert dict(learning_rates(replace(cosine, schedule=steps), None)) == pytest.approx(
        {1: 0.01, 31: 0.002, 61: 0.0004, 100: 0.0004}
    )


@pytest.mark.parametrize(
    ("ranks", "per_node", "overrides", "part"),
    [
        (12, None, (), "12 ranks cannot be 8 on every node"),
        (0, None, (), "0 ranks"),
        (None, 4, (), "needs --simulate-world"),
        (6, 6, (), "64 is not a multiple of 6 ranks"),
        (8, 8, ("model.stats_batch_size=12",), "cannot be formed from 8 ranks"),
        (8, 8, ("train.engine=deepspeed", "train.precision=fp16"), "fp16 is not offered"),
        (8, 8, ("model.name=cifar_resnet21",), "unknown model"),
    ],
)
def test_mistakes_are_found_before_the_cluster_is_asked(
    ranks: int | None, per_node: int | None, overrides: tuple[str, ...], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        dry_run(small(*overrides), simulated_world(ranks, per_node), num_samples=1000)


@pytest.mark.parametrize(("gpus", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_finetuning_recipe_starts_on_the_gpus_that_its_head_names(gpus: int, steps: int) -> None:
    config = load_config("recipes/finetune_bn.yaml", [f"train.accumulation_steps={steps}"])
    split = split_batch(config, simulated_world(gpus, None))
    assert split.per_rank_batch_size * split.sync_group_size == 64
