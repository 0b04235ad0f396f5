"""tools/paper.py: what the paper ran is what the configs say; nothing that was not run shows as a number."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from unitdist.config import Config
from unitdist.config_file import load_config
from unitdist.errors import ConfigError
from unitdist.models.build import build_model

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def paper(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "paper.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=REPOSITORY)


def experiments() -> ModuleType:
    import paper_experiments

    return paper_experiments


def arm_configs(name: str) -> dict[str, Config]:
    experiment = experiments().EXPERIMENTS[name]
    file = REPOSITORY / "configs" / "paper" / experiment.config
    return {arm.name: load_config(file, arm.overrides) for arm in experiment.arms}


def write_cifar10(folder: Path, per_file: int) -> Path:
    """Random images in the binary format of CIFAR-10."""
    generator = np.random.default_rng(0)
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / "cifar-10-batches-bin" / name).write_bytes(records.tobytes())
    return folder


def made_up_results(noise: dict[str, float], epochs: int = 40, done: int = 40, seeds: int = 1) -> dict[str, Any]:
    """Results of fig2 whose moments are a constant plus noise of the given size."""
    generator = np.random.default_rng(0)
    runs: dict[str, Any] = {arm: {} for arm in noise}
    for arm, size in noise.items():
        for seed in range(seeds):
            per_epoch: dict[str, Any] = {"epoch": list(range(1, done + 1)), "lr": [0.05] * 20 + [0.01] * (done - 20)}
            for moment in ("mean", "variance", "skewness", "kurtosis"):
                values = 1 + size * generator.standard_normal((done, 8))
                per_epoch[f"analysis/layers.norm11/unit_{moment}"] = values.tolist()
            run = {"epochs": epochs, "epochs_done": done, "metrics": {"val_top1": 97.5}, "per_epoch": per_epoch}
            runs[arm][str(seed)] = run
    provenance = {"hardware": "a machine", "torch": "2", "commit": "abc", "collected": "2026-11-24"}
    return {"experiment": "fig2", **provenance, "runs": runs}


@pytest.mark.usefixtures("tools")
def test_results_of_the_protocols_are_percent_as_in_the_evaluations_report(tmp_path: Path) -> None:
    import paper_results

    from evaluation.scores import accuracy_summary

    summary = accuracy_summary(np.eye(8)[np.repeat([0, 1], (70, 10))], np.zeros(80, dtype=np.int64))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text(json.dumps({"protocols": {"crops": summary}}))
    assert paper_results._protocol_metrics(tmp_path) == {"crops top1": 87.5, "crops top5": 100.0}


@pytest.mark.usefixtures("tools")
def test_every_arm_of_every_experiment_loads() -> None:
    assert list(experiments().EXPERIMENTS) == [
        "fig2", "table1", "table2", "table3", "table4", "fig3", "table4_mnist", "fig3_mnist",
    ]  # fmt: skip
    for name in experiments().EXPERIMENTS:
        assert arm_configs(name)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", ["table1", "table2", "table4", "fig3"])
def test_cifar_schedules_are_the_papers(name: str) -> None:
    for config in arm_configs(name).values():
        assert (config.optim.lr, config.optim.momentum, config.optim.nesterov, config.optim.weight_decay) == (
            0.05,
            0.9,
            True,
            5e-4,
        )
        assert (config.schedule.milestones_epochs, config.schedule.factor, config.train.epochs) == (
            (61, 121, 161),
            0.2,
            200,
        )
        assert config.data.augmentation == "pad_crop_flip"


@pytest.mark.usefixtures("tools")
def test_batches_nets_and_seeds_are_the_papers() -> None:
    batches = {arm: config.data.global_batch_size for arm, config in arm_configs("table1").items()}
    assert batches == {
        "resnet20_bn": 128, "resnet20_unit": 128, "resnet110_bn": 128, "resnet110_unit": 128, "resnet164_bn": 64, "resnet164_unit": 64,
    }  # fmt: skip
    assert {config.data.global_batch_size for config in arm_configs("table4").values()} == {2}
    assert {config.model.num_classes for config in arm_configs("table2").values()} == {100}
    table = experiments().EXPERIMENTS
    assert [table[name].num_seeds for name in ("table1", "table2", "table3", "table4")] == [5, 5, 1, 3]
    assert {arm.name: arm.paper for arm in table["table1"].arms}["resnet164_unit"] == (94.62,)


@pytest.mark.usefixtures("tools")
def test_micro_batches_have_bn_unitization_and_ten_group_norms() -> None:
    configs = arm_configs("table4")
    groups = [config.model.group_norm_groups for config in configs.values() if config.model.group_norm_groups]
    channels = [config.model.group_norm_channels for config in configs.values() if config.model.group_norm_channels]
    assert groups == channels == [1, 2, 4, 8, 16]
    assert len(configs) == 12
    paper = {arm.name: arm.paper for arm in experiments().EXPERIMENTS["table4"].arms}
    assert (paper["bn"], paper["unit"], paper["gn_groups16"], paper["gn_channels1"]) == (
        (71.5,),
        (81.88,),
        (73.76,),
        (79.54,),
    )


@pytest.mark.usefixtures("tools")
def test_imagenet_and_fig2_are_the_papers() -> None:
    table3 = arm_configs("table3")["unit"]
    assert (table3.model.name, table3.data.global_batch_size, table3.optim.lr) == ("preact_resnet101", 64, 0.01)
    assert (table3.schedule.milestones_epochs, table3.train.epochs) == ((31, 61, 91), 120)
    fig2 = arm_configs("fig2")["bn"]
    assert (fig2.optim.lr, fig2.optim.momentum, fig2.optim.weight_decay, fig2.train.epochs) == (0.05, 0.0, 0.0, 200)
    assert (fig2.analysis.split, fig2.analysis.num_samples, fig2.analysis.layers) == ("train", None, ("layers.norm11",))


@pytest.mark.usefixtures("tools")
def test_fig3_watches_layers_60_to_105() -> None:
    from unitdist.analysis.probe import normalization_layers

    config = arm_configs("fig3")["cifar10"]
    names = normalization_layers(build_model(config.model, image_size_px=32))
    assert len(names) == 110
    assert config.analysis.em_distance_layers == tuple(names[i - 1] for i in (60, 69, 78, 87, 96, 105))


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", ["fig2", "table4_mnist"])
def test_arms_of_one_seed_share_initial_weights(name: str) -> None:
    states = []
    for config in arm_configs(name).values():
        torch.manual_seed(3)
        model = build_model(config.model, image_size_px=28)
        states.append([p for p in model.parameters() if p.dim() > 1])
    for state in states[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(state, states[0], strict=True))


def test_table3_with_nothing_run_shows_no_number_of_ours(tmp_path: Path) -> None:
    done = paper("table", "table3", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("BN", "unitization"))]
    assert len(rows) == 8
    assert all(line.endswith(" 0 of 1") and "not run" in line for line in rows)
    assert "78.12" in rows[0] and "93.33" in rows[-1]
    assert "nothing was run" in done.stdout


def test_plot_with_nothing_run_is_refused(tmp_path: Path) -> None:
    done = paper("plot", "fig2", "--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().startswith("paper.py: fig2: nothing was run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tools")
def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no experiment named 'tabel1'; there are fig2, table1"):
        experiments().find_experiment("tabel1")
    with pytest.raises(ConfigError, match="table1 has no arm 'bn'; its arms are resnet20_bn"):
        experiments().select_arms(experiments().EXPERIMENTS["table1"], ["bn"])


@pytest.mark.usefixtures("tools")
def test_a_wrong_setting_stops_before_any_run(tmp_path: Path) -> None:
    from paper_run import run_experiment

    experiment = experiments().EXPERIMENTS["table1"]
    with pytest.raises(ConfigError, match="optim.lrr"):
        run_experiment(experiment, experiment.arms, [0], tmp_path / "runs", str(tmp_path), ["optim.lrr=1"], None)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("tools")
def test_runs_do_not_outlive_paper_py(tmp_path: Path) -> None:
    """A run left behind would hold its folder, and paper.py started again could not go on with it."""
    from paper_run import command, plan_runs

    experiment = experiments().EXPERIMENTS["table1"]
    (plan,) = plan_runs(experiment, experiment.arms[:1], [0], tmp_path, str(tmp_path), [])
    assert "--end-with-parent" in command(experiment, plan)


@pytest.mark.usefixtures("tools")
def test_two_gpus_take_a_run_each_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the runs: each notes its GPU and leaves only when another one runs beside it."""
    import paper_run

    child = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / f"{sys.argv[2]}.gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while len(list(folder.glob("*.gpu"))) < 2:
    time.sleep(0.02)
"""
    experiment = experiments().EXPERIMENTS["table1"]
    plans = paper_run.plan_runs(experiment, experiment.arms[:2], [0], tmp_path, str(tmp_path), [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        paper_run, "command", lambda _, plan: [sys.executable, "-c", child, str(tmp_path), plan.arm.name]
    )
    assert paper_run.run_all(experiment, plans, jobs=None) == 0
    assert sorted(path.read_text() for path in tmp_path.glob("*.gpu")) == ["0", "1"]
    with pytest.raises(ConfigError, match="3 runs at a time on 2 GPUs"):
        paper_run.run_all(experiment, plans, jobs=3)


@pytest.mark.usefixtures("tools")
def test_stability_finds_the_arm_that_moves_more() -> None:
    from paper_stability import compare

    rows = compare(made_up_results({"bn": 1.0, "unit": 0.1}, seeds=3), first=1)
    assert len(rows) == 8
    for row in rows:
        assert len(row.bn) == len(row.unit) == 3
        assert row.bn == pytest.approx([10 * value for value in row.unit], rel=0.3)
        # Seeds count, not their 24 units: three against three cannot say more than this.
        assert row.p_value == row.smallest_p == pytest.approx(0.1)
    std = next(row for row in rows if (row.moment, row.measure) == ("skewness", "std"))
    assert std.bn == pytest.approx([1.0] * 3, rel=0.15)


@pytest.mark.usefixtures("tools")
def test_stability_of_arms_that_move_alike_is_no_difference() -> None:
    from paper_stability import compare

    results = made_up_results({"bn": 1.0}, seeds=3)
    results["runs"]["unit"] = results["runs"]["bn"]
    assert all(row.p_value == 1.0 for row in compare(results, first=1))


@pytest.mark.usefixtures("tools")
def test_stability_of_one_seed_claims_nothing() -> None:
    from paper_stability import compare

    rows = compare(made_up_results({"bn": 1.0, "unit": 0.1}), first=1)
    assert {(row.p_value, row.smallest_p) for row in rows} == {(1.0, 1.0)}


@pytest.mark.usefixtures("tools")
def test_stability_counts_the_asked_epochs_and_no_unfinished_run(capsys: pytest.CaptureFixture[str]) -> None:
    from paper_stability import compare, rate_stretches
    from paper_table import print_table

    results = made_up_results({"bn": 1.0, "unit": 0.1})
    results["runs"]["bn"]["1"] = results["runs"]["bn"]["0"] | {"epochs_done": 30}
    key = "analysis/layers.norm11/unit_skewness"
    results["runs"]["bn"]["0"]["per_epoch"][key][20:] = [[float(epoch % 2)] * 8 for epoch in range(20)]
    assert rate_stretches(results["runs"]["bn"]["0"]) == [(1, 20), (21, 40)]
    late = next(row for row in compare(results, 21, 40) if (row.moment, row.measure) == ("skewness", "std"))
    assert late.bn == (0.5,)
    print_table(experiments().EXPERIMENTS["fig2"], results)
    printed = capsys.readouterr().out
    assert "21-40" in printed and "0.5000" in printed
    assert "seed 1: 30 of 40 epochs" in printed


@pytest.mark.usefixtures("tools")
def test_stability_of_one_arm_alone_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    from paper_stability import compare
    from paper_table import print_table

    results = made_up_results({"bn": 1.0})
    assert compare(results, first=1) == []
    print_table(experiments().EXPERIMENTS["fig2"], results)
    assert "not run" in capsys.readouterr().out


@pytest.mark.usefixtures("tools")
def test_an_unfinished_run_is_named_and_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    from paper_table import print_table

    run = {"epochs": 200, "epochs_done": 7, "metrics": {"val_top1": 91.0}, "per_epoch": {}}
    results = made_up_results({}) | {"runs": {"resnet20_bn": {"2": run}}}
    print_table(experiments().EXPERIMENTS["table1"], results)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ResNet-20 BN"))
    assert "not run" in line and "0 of 5; seed 2 stopped at epoch 7 of 200" in line and "91.00" not in line


@pytest.mark.usefixtures("tools")
def test_fig2_draws_both_arms_and_their_stability(tmp_path: Path) -> None:
    from paper_plot import plot

    paths = plot(experiments().EXPERIMENTS["fig2"], made_up_results({"bn": 1.0, "unit": 0.1}), tmp_path)
    assert sorted(path.name for path in paths) == [
        "fig2_seed0.png", "fig2_seed0.svg", "fig2_stability.png", "fig2_stability.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)


def test_table_1s_first_row_by_one_command_on_a_stand_in(tmp_path: Path) -> None:
    """The files are random, so the numbers mean nothing; the path from files to table and figure is the real one."""
    data = write_cifar10(tmp_path / "data", per_file=16)
    results = tmp_path / "results"
    command = [
        "run", "table1", "--data", str(data), "--arms", "resnet20_bn", "resnet20_unit", "--seeds", "0", "--runs",
        str(tmp_path / "runs"), "--results", str(results), "--set", "train.epochs=1", "data.global_batch_size=16", "data.val_batch_size=16",
    ]  # fmt: skip
    done = paper(*command)
    assert done.returncode == 0, done.stderr + done.stdout
    runs = json.loads((results / "table1.json").read_text())["runs"]
    for arm in ("resnet20_bn", "resnet20_unit"):
        assert runs[arm]["0"]["epochs_done"] == runs[arm]["0"]["epochs"] == 1
        assert math.isfinite(runs[arm]["0"]["metrics"]["val_top1"])
    again = paper(*command)
    assert again.stdout.count("finished already") == 2
    table = paper("table", "table1", "--results", str(results)).stdout
    line = next(line for line in table.splitlines() if line.startswith("ResNet-20 unitization"))
    assert "92.21" in line and "1 of 5" in line
    assert "not run" in next(line for line in table.splitlines() if line.startswith("ResNet-164 BN"))
    changed = "data.global_batch_size=16 data.val_batch_size=16 train.epochs=1"
    assert f"NOT the experiment: resnet20_bn, seed 0: run with {changed}" in table


def test_mnist_subset_keeps_the_first_images(tmp_path: Path, tools: None) -> None:
    import gzip
    import struct

    from paper_subset import write_mnist_subset

    from unitdist.data.mnist import read_mnist

    generator = np.random.default_rng(1)
    source = tmp_path / "source"
    source.mkdir()
    for prefix, count in (("train", 20), ("t10k", 6)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
            content = gzip.compress(header + generator.integers(0, 10, shape, dtype=np.uint8).tobytes())
            (source / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    target = write_mnist_subset(source, tmp_path / "target", 5)
    whole, part = read_mnist(source, training=True), read_mnist(target, training=True)
    assert np.array_equal(part.images_nhwc, whole.images_nhwc[:5])
    assert np.array_equal(part.labels, whole.labels[:5])
    assert len(read_mnist(target, training=False).labels) == 6
