"""The live monitor: what it reports, that it leaves the model alone, and that ranks and restarts change nothing."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from unitdist import Unitization1d, Unitization2d
from unitdist.analysis.moments import moments_of
from unitdist.analysis.monitor import Samples, ShiftMonitor, build_monitor
from unitdist.analysis.picture import CELL_HW, GAP_PX, PANEL_CELLS, PANELS, TITLE_PX, draw_layers
from unitdist.analysis.probe import capture_outputs
from unitdist.config import Config
from unitdist.config_file import config_from_dict
from unitdist.data.batch import Batch
from unitdist.errors import ConfigError, TrainingError
from unitdist.models.build import build_model
from unitdist.world import World


class InMemory:
    """A validation Loader over a tensor, padded with valid=False rows."""

    def __init__(self, images: Tensor, per_rank_batch_size: int, rank: int = 0, size: int = 1) -> None:
        self.images, self.per_rank_batch_size, self.rank, self.size = images, per_rank_batch_size, rank, size
        self.class_to_idx = {"0": 0}
        self.num_samples = len(images)
        self.batches_per_epoch = -(-len(images) // (per_rank_batch_size * size))

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        step = self.per_rank_batch_size * self.size
        for start in range(start_sample, self.num_samples, step):
            ids = torch.arange(start, start + step).chunk(self.size)[self.rank]
            valid = ids < self.num_samples
            ids = ids.clamp(max=self.num_samples - 1)
            yield Batch(images=self.images[ids], labels=ids * 0, valid=valid, sample_ids=ids)

    def fingerprint(self) -> dict[str, int | float | str]:
        return {}

    def close(self) -> None:
        pass


def images(n: int = 30) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(4))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        Unitization2d(3, norm_divisor=36, activation="relu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(3),
    )
    with torch.no_grad():
        model[1].alpha.copy_(torch.tensor([0.25, 0.5, 1.0]))
    return model


def monitor_of(model: nn.Module, *, num_samples: int | None = None, **settings: bool) -> ShiftMonitor:
    samples = Samples(InMemory(images(), 8), num_samples, World.single())
    monitor = ShiftMonitor(["1", "4"], samples, every_epochs=1, **settings)  # type: ignore[arg-type]
    monitor.begin(model)
    return monitor


def test_metrics_are_those_of_the_layer_over_all_valid_samples() -> None:
    model = small_net().eval()
    metrics = monitor_of(model, per_unit=True).measure(model).metrics
    with capture_outputs(model, ["1"]) as outputs:
        model(images())
    expected = moments_of(outputs["1"])
    assert metrics["analysis/1/unit_kurtosis"] == pytest.approx(expected.kurtosis_c.tolist(), rel=1e-6)
    assert metrics["analysis/1/skewness"] == pytest.approx(float(expected.skewness_c.mean()), rel=1e-5)
    assert metrics["analysis/1/alpha_min"] == 0.25
    assert metrics["analysis/1/alpha_max"] == 1.0
    assert metrics["analysis/1/bound"] == 8.0
    assert metrics["analysis/1/shift"] == 0.0
    assert "analysis/4/alpha_min" not in metrics
    json.dumps(metrics, allow_nan=False)


def test_shift_is_the_distance_to_the_measure_before() -> None:
    model = small_net()
    monitor = monitor_of(model)
    with torch.no_grad():
        model[1].bias.add_(2.0)
    first = monitor.measure(model).metrics["analysis/1/shift"]
    second = monitor.measure(model).metrics["analysis/1/shift"]
    assert isinstance(first, float) and first > 0.1
    assert second == 0.0


def test_bound_is_left_out_where_alpha_leaves_the_unit_interval() -> None:
    model = small_net()
    with torch.no_grad():
        model[1].alpha[0] = -0.1
    assert monitor_of(model).measure(model).metrics["analysis/1/bound"] is None


def test_constant_units_are_none_and_no_number() -> None:
    model = small_net()
    with torch.no_grad():
        model[1].weight.zero_()
    metrics = monitor_of(model, per_unit=True).measure(model).metrics
    assert metrics["analysis/1/skewness"] is None
    assert metrics["analysis/1/unit_kurtosis"] == [None, None, None]


def test_a_measure_leaves_no_trace_in_model_and_generators() -> None:
    model = small_net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator_state = torch.get_rng_state()
    monitor_of(model).measure(model)
    assert model.training and model[1].training and model[1].activation == "relu"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_picture_and_histograms_show_every_layer() -> None:
    model = small_net()
    shift = monitor_of(model).measure(model)
    assert shift.picture.dtype == torch.uint8
    assert shift.picture.shape[:2] == (3, TITLE_PX + 2 * CELL_HW[0])
    assert set(shift.histograms) >= {"analysis/1/alpha", "analysis/1/p", "analysis/4/skewness"}
    assert len(shift.histograms["analysis/1/p"]) == 30


def test_picture_has_sorted_values_as_greys_and_hatches_what_a_layer_lacks() -> None:
    values = torch.tensor([1.5, 0.5, -0.5])
    picture = draw_layers({"layer1.norm": {"alpha": values}, "layer1.a_much_longer_name": {"kurtosis": values + 4}})
    first, second = (picture[0, TITLE_PX + row * CELL_HW[0] + 5] for row in range(2))
    panel_px = PANEL_CELLS * CELL_HW[1]
    left = picture.shape[2] - len(PANELS) * (panel_px + GAP_PX)
    alpha = first[left : left + panel_px : CELL_HW[1]].tolist()
    assert alpha == sorted(alpha) and set(alpha) == {0, 128, 255}
    assert second[left : left + panel_px : CELL_HW[1]].tolist() == [0, 255] * (PANEL_CELLS // 2)
    names = picture[0, TITLE_PX:, :left]
    assert bool((names < 128).any())  # written in black on white
    assert left > 60  # the longer name fits


def test_a_subset_is_spread_over_the_split_and_counts_exactly() -> None:
    samples = list(Samples(InMemory(images(30), 4), 7, World.single()))
    ids = torch.cat([batch.sample_ids[batch.valid] for batch in samples]).tolist()
    assert ids == [0, 1, 2, 3, 15, 16, 17]


def test_more_samples_than_there_are_means_all() -> None:
    samples = list(Samples(InMemory(images(30), 4), 1000, World.single()))
    assert sorted(torch.cat([batch.sample_ids[batch.valid] for batch in samples]).tolist()) == list(range(30))


def test_nan_activations_name_the_layer() -> None:
    model = small_net()
    monitor = monitor_of(model)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="^1: .* activations are NaN or infinite"):
        monitor.measure(model)


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = nn.ModuleDict({"used": Unitization1d(2), "unused": Unitization1d(2)})
    model.forward = lambda x: model["used"](x.flatten(1)[:, :2])  # type: ignore[method-assign]
    monitor = ShiftMonitor(["used", "unused"], Samples(InMemory(images(), 8), None, World.single()), every_epochs=1)
    with pytest.raises(ConfigError, match="unused did not run"):
        monitor.measure(model)


def test_every_epochs_says_when() -> None:
    monitor = ShiftMonitor([], Samples(InMemory(images(), 8), 2, World.single()), every_epochs=3)
    assert [epoch for epoch in range(1, 8) if monitor.is_due(epoch)] == [3, 6]


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, local_rank=rank, size=2, local_size=2)
    model = small_net()
    monitor = ShiftMonitor(
        ["1", "4"], Samples(InMemory(images(), 4, rank, 2), 21, world), every_epochs=1, per_unit=True
    )
    monitor.begin(model)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    torch.save(monitor.measure(model).metrics, os.path.join(folder, str(rank)))
    torch.distributed.destroy_process_group()


def test_two_ranks_report_what_one_process_does(tmp_path: Path) -> None:
    mp.start_processes(_rank_main, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    model = small_net()
    monitor = ShiftMonitor(
        ["1", "4"], Samples(InMemory(images(), 8), 21, World.single()), every_epochs=1, per_unit=True
    )
    monitor.begin(model)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    one = monitor.measure(model).metrics
    for metrics in (*ranks, one):
        del metrics["analysis/seconds"]
    assert ranks[0] == ranks[1]
    assert ranks[0].keys() == one.keys()
    for key, value in one.items():
        assert ranks[0][key] == pytest.approx(value, rel=1e-5), key


def synthetic(**analysis: object) -> Config:
    return config_from_dict(
        {
            "model": {"name": "cifar_resnet20", "num_classes": 2},
            "data": {
                "dataset": "synthetic",
                "loader": "synthetic",
                "image_size_px": 8,
                "val_batch_size": 8,
                "synthetic_samples": 128,
                "synthetic_classes": 2,
            },
            "analysis": analysis,
        }
    )


def build(config: Config) -> tuple[nn.Module, ShiftMonitor | None]:
    torch.manual_seed(1)
    model = build_model(config.model, image_size_px=config.data.image_size_px)
    return model, build_monitor(config, model, World.single(), device=torch.device("cpu"))


def test_build_monitor_measures_every_normalization_layer_by_default() -> None:
    model, monitor = build(synthetic(num_samples=8))
    assert monitor is not None
    assert len(monitor.layer_names) == 20
    assert monitor.measure(model).metrics["analysis/stem_norm/shift"] == 0.0


def test_build_monitor_is_none_when_never_due() -> None:
    assert build(synthetic(every_epochs=0))[1] is None


def test_build_monitor_lists_the_nearest_layer() -> None:
    with pytest.raises(ConfigError, match="no layer named 'stem_nrm'.*nearest are stem_norm"):
        build(synthetic(layers=["stem_nrm"]))


def test_em_distance_of_chosen_layers_is_measured_between_measures() -> None:
    config = synthetic(num_samples=8, em_distance_layers=["final_norm"], em_distance_steps=2)
    model, monitor = build(config)
    assert monitor is not None
    assert monitor.measure(model).metrics["analysis/em_distance"] == 0.0
    with torch.no_grad():
        model.get_submodule("final_norm").bias.add_(1.0)
    moved = monitor.measure(model).metrics
    assert moved["analysis/em_distance"] == moved["analysis/final_norm/em_distance"] != 0.0
    assert monitor.measure(model).metrics["analysis/em_distance"] == 0.0
