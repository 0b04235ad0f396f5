"""The live monitor: what training does to every layer's distribution, measured at the ends of epochs.

It attaches from outside, runs the bare model in evaluation mode on a fixed set of unaugmented images and
leaves no trace in it: no gradient, no hook, no draw from a global generator. Moments and distances are those of
the images of all ranks together. Every method is a collective call: all ranks make it. `agreed` stands around all
reading of images, so that a rank that cannot read one does not leave the others waiting.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitdist.analysis.bounds import alpha_bound
from unitdist.analysis.em_distance import (
    Agreement,
    CriticSettings,
    estimate_em_distances,
    random_directions,
    sliced_em_distance,
)
from unitdist.analysis.moments import Moments, merge_moments, merge_over_ranks, moments_of, no_moments
from unitdist.analysis.picture import draw_layers
from unitdist.analysis.probe import (
    check_layer_names,
    evaluation_mode,
    inverse_norms,
    normalization_layers,
    watch_layers,
)
from unitdist.config import Config
from unitdist.data.batch import Batch, Loader
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.world import World

Metric = float | None | list[float | None]

NUM_DIRECTIONS = 16
"""Directions of the sliced distance."""
POOLED_PX = 4
"""Maps are averaged to at most this side before they are projected; averaging only shortens distances."""
CRITIC_BATCH_SIZE = 128
"""Alg. 3's batch, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One measure: JSON-ready metrics, values for histograms, a picture uint8 (3, H, W), and what it cost."""

    metrics: dict[str, Metric]
    histograms: dict[str, Tensor]
    picture: Tensor
    seconds: float


@dataclass(kw_only=True)
class _LayerSeen:
    """What one layer showed in one measure, on this rank until it is merged."""

    moments: Moments | None = None
    inverse_norms: list[Tensor] = field(default_factory=list)
    projections_nl: list[Tensor] = field(default_factory=list)


class ShiftMonitor:
    """Measures the named layers of a model on `batches`, and their distance to the measure before."""

    def __init__(
        self,
        layer_names: list[str],
        samples: "Samples",
        *,
        every_epochs: int,
        per_unit: bool = False,
        em_distance: "EmDistance | None" = None,
        agreed: Agreement = nullcontext,
    ) -> None:
        self.layer_names = layer_names
        self._agreed = agreed
        self._samples = samples
        self._every_epochs = every_epochs
        self._per_unit = per_unit
        self._em_distance = em_distance
        self._previous: dict[str, Tensor] = {}
        self._directions: dict[str, Tensor] = {}

    def is_due(self, epoch: int) -> bool:
        """Whether the end of `epoch`, counted from 1, is a moment to measure."""
        return epoch % self._every_epochs == 0

    def begin(self, model: nn.Module) -> None:
        """Take the present weights as the reference of the next measure's distances."""
        self._previous = {
            name: _gather_rows(torch.cat(seen.projections_nl)) for name, seen in self._look(model).items()
        }
        if self._em_distance is not None:
            self._em_distance.remember(model)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What the next measure's distances refer to, on the CPU: for a checkpoint taken within an epoch. The same on all ranks."""
        remembered = {} if self._em_distance is None else self._em_distance.remembered()
        return {
            "projections": {name: value.cpu() for name, value in self._previous.items()},
            "weights": {name: value.cpu() for name, value in remembered.items()},
        }

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up a saved reference, as far as it is of the layers that are measured now."""
        for name, value in state["projections"].items():
            if name in self._previous and self._previous[name].shape == value.shape:
                self._previous[name] = value.to(self._previous[name].device)
        if self._em_distance is not None and state["weights"]:
            self._em_distance.remember_state(state["weights"])

    def measure(self, model: nn.Module) -> Shift:
        """Measure `model`; distances are to the last `measure` or `begin`.

        Keys of the metrics are analysis/<layer>/<quantity>; a quantity that is not defined (the bound
        without 0 < min alpha <= max alpha <= 1, the skewness of constant units) is None.
        """
        started = time.perf_counter()
        metrics: dict[str, Metric] = {}
        histograms: dict[str, Tensor] = {}
        rows: dict[str, dict[str, Tensor]] = {}
        for name, seen in self._look(model).items():
            assert seen.moments is not None
            layer = model.get_submodule(name)
            values = _layer_values(layer, merge_over_ranks(seen.moments), seen.inverse_norms)
            projections_nl = _gather_rows(torch.cat(seen.projections_nl))
            numbers = _layer_numbers(layer, values)
            numbers["shift"] = (
                sliced_em_distance(self._previous[name], projections_nl) if name in self._previous else None
            )
            if self._per_unit:
                numbers |= {
                    f"unit_{key}": _json_list(values[key]) for key in ("mean", "variance", "skewness", "kurtosis")
                }
            self._previous[name] = projections_nl
            metrics |= {f"analysis/{name}/{key}": number for key, number in numbers.items()}
            histograms |= {f"analysis/{name}/{key}": v[torch.isfinite(v)].float().cpu() for key, v in values.items()}
            rows[name] = {key: v.cpu() for key, v in values.items()}
        if self._em_distance is not None:
            distances = self._em_distance.estimate(model)
            metrics |= {f"analysis/{name}/em_distance": distance for name, distance in distances.items()}
            metrics["analysis/em_distance"] = sum(distances.values()) / len(distances)
        seconds = time.perf_counter() - started
        metrics["analysis/seconds"] = seconds
        return Shift(metrics=metrics, histograms=histograms, picture=draw_layers(rows), seconds=seconds)

    @torch.no_grad()
    def _look(self, model: nn.Module) -> dict[str, _LayerSeen]:
        seen = {name: _LayerSeen() for name in self.layer_names}
        valid_n = torch.empty(0)

        def see(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
            self._see(seen[name], name, layer, x[valid_n], output[valid_n])

        with self._agreed(), evaluation_mode(model), watch_layers(model, self.layer_names, see):
            for batch in self._samples:
                valid_n = batch.valid.nonzero().flatten()
                model(batch.images)
        silent = [name for name, one in seen.items() if one.moments is None]
        if silent:
            raise ConfigError(
                f"analysis.layers: {', '.join(silent)} did not run in the forward pass; name a layer that does"
            )
        return seen

    def _see(self, seen: _LayerSeen, name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        part = moments_of(output, name) if len(output) else no_moments(output.shape[1], output.device)
        if seen.moments is None or seen.moments.count == 0:
            seen.moments = part
        elif part.count:
            seen.moments = merge_moments(seen.moments, part)
        p_n = inverse_norms(layer, x)
        if p_n is not None:
            seen.inverse_norms.append(p_n)
        pooled_nd = _pooled(output)
        if name not in self._directions:
            self._directions[name] = random_directions(pooled_nd.shape[1], NUM_DIRECTIONS, seed=0).to(output.device)
        seen.projections_nl.append(pooled_nd @ self._directions[name])


class EmDistance:
    """Alg. 3 between the weights it remembers and a model's present ones; then it remembers these."""

    def __init__(
        self,
        old: nn.Module,
        layer_names: list[str],
        train: Loader,
        test: Loader,
        settings: CriticSettings,
        agreed: Agreement = nullcontext,
    ) -> None:
        self._old, self._layer_names, self._train, self._test, self._settings = old, layer_names, train, test, settings
        self._agreed = agreed

    def remember(self, model: nn.Module) -> None:
        """Copy the weights of `model`."""
        self.remember_state(model.state_dict())

    def remember_state(self, state: dict[str, Tensor]) -> None:
        """Copy weights and running statistics from a state dict."""
        self._old.load_state_dict(state)

    def remembered(self) -> dict[str, Tensor]:
        """The weights and running statistics that the next estimate refers to."""
        return self._old.state_dict()

    def estimate(self, model: nn.Module) -> dict[str, float]:
        """Layer name -> estimate since the remembered weights, which the present ones then replace."""
        distances = estimate_em_distances(
            self._old,
            model,
            self._layer_names,
            train=self._train,
            test=self._test,
            settings=self._settings,
            agreed=self._agreed,
        )
        self.remember(model)
        return distances


class Samples:
    """The images of every measure: a subset read once and kept on the device, or the whole split, read each time."""

    def __init__(self, loader: Loader, num_samples: int | None, world: World) -> None:
        self._loader = loader
        self._kept = None if num_samples is None else list(_subset(loader, num_samples, world))

    def __iter__(self) -> Iterator[Batch]:
        yield from self._loader.iterate(0) if self._kept is None else self._kept


def _subset(loader: Loader, num_samples: int, world: World) -> Iterator[Batch]:
    """This rank's share of `num_samples` images in blocks spread evenly over the split (which may be sorted by class)."""
    global_batch_size = loader.per_rank_batch_size * world.size
    wanted = min(num_samples, loader.num_samples)
    num_blocks = -(-wanted // global_batch_size)
    stride = max(loader.num_samples // num_blocks, global_batch_size)
    for block in range(num_blocks):
        batches = loader.iterate(0, block * stride)
        batch = next(batches)
        position_n = world.rank * loader.per_rank_batch_size + torch.arange(len(batch.valid), device=batch.valid.device)
        yield dataclasses.replace(batch, valid=batch.valid & (position_n < wanted - block * global_batch_size))


def build_monitor(
    config: Config, model: nn.Module, world: World, *, device: torch.device, agreed: Agreement = nullcontext
) -> ShiftMonitor | None:
    """The monitor that config.analysis asks for, with `model`'s present weights as its reference; None if never due.

    `model` is the bare module, not a wrapped or compiled one. Raises ConfigError on unknown layer names, with
    the nearest, and where there are too few images; DataError where an image cannot be read.
    """
    if config.analysis.every_epochs == 0:
        return None
    with agreed():
        monitor = _monitor_without_reference(config, model, world, device, agreed)
    monitor.begin(model)
    return monitor


def _monitor_without_reference(
    config: Config, model: nn.Module, world: World, device: torch.device, agreed: Agreement
) -> ShiftMonitor:
    """No collective call: what fails here may fail on one rank alone."""
    analysis = config.analysis
    layer_names = list(analysis.layers) or normalization_layers(model)
    check_layer_names(model, [*layer_names, *analysis.em_distance_layers])
    data = dataclasses.replace(config.data, augmentation="none")
    per_rank_batch_size = -(-config.data.val_batch_size // world.size)
    measured = dataclasses.replace(data, val_split=data.train_split) if analysis.split == "train" else data
    loader = build_val_loader(measured, world, per_rank_batch_size=per_rank_batch_size, device=device)
    if loader.num_samples < 2:
        raise ConfigError(
            f"analysis: {loader.num_samples} images in the {analysis.split} split are too few to measure on"
        )
    em_distance = None
    if analysis.em_distance_layers:
        with torch.random.fork_rng(devices=[]):
            old = build_model(config.model, image_size_px=config.data.image_size_px, sync=False).to(device)
        critic_batch = -(-CRITIC_BATCH_SIZE // world.size)
        train = build_train_loader(data, world, per_rank_batch_size=critic_batch, seed=config.run.seed, device=device)
        test = build_val_loader(data, world, per_rank_batch_size=per_rank_batch_size, device=device)
        settings = CriticSettings(steps=analysis.em_distance_steps, seed=config.run.seed)
        em_distance = EmDistance(old, list(analysis.em_distance_layers), train, test, settings, agreed)
    samples = Samples(loader, analysis.num_samples, world)
    return ShiftMonitor(
        layer_names,
        samples,
        every_epochs=analysis.every_epochs,
        per_unit=analysis.per_unit,
        em_distance=em_distance,
        agreed=agreed,
    )


def _layer_values(layer: nn.Module, moments: Moments, inverse_norms: list[Tensor]) -> dict[str, Tensor]:
    """Quantity -> its values over units (or, for p, over this rank's samples)."""
    values = {
        "mean": moments.mean_c,
        "variance": moments.variance_c,
        "skewness": moments.skewness_c,
        "kurtosis": moments.kurtosis_c,
    }
    if inverse_norms:
        values |= {"alpha": layer.get_parameter("alpha").detach(), "p": torch.cat(inverse_norms)}
    return values


def _layer_numbers(layer: nn.Module, values: dict[str, Tensor]) -> dict[str, Metric]:
    """The scalars of one layer: averages over its units (those where the quantity is defined)."""
    numbers: dict[str, Metric] = {
        "mean": _average(values["mean"]),
        "std": _average(values["variance"].sqrt()),
        "skewness": _average(values["skewness"]),
        "kurtosis": _average(values["kurtosis"]),
    }
    if "alpha" in values:
        alpha_c = values["alpha"]
        p = merge_over_ranks(
            moments_of(values["p"][:, None], "p") if len(values["p"]) else no_moments(1, alpha_c.device)
        )
        numbers |= {
            "alpha_min": float(alpha_c.min()),
            "alpha_mean": float(alpha_c.mean()),
            "alpha_max": float(alpha_c.max()),
            "bound": alpha_bound(alpha_c),
            "p_mean": float(p.mean_c),
            "p_std": float(p.variance_c.sqrt()),
        }
    return numbers


def _average(values: Tensor) -> float | None:
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if finite.numel() else None


def _json_list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _pooled(output: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C * at most 4 * 4) float32 by average pooling; other shapes are flattened."""
    if output.dim() != 4:
        return output.float().flatten(1)
    side_px = (min(output.shape[2], POOLED_PX), min(output.shape[3], POOLED_PX))
    return nn.functional.adaptive_avg_pool2d(output.float(), side_px).flatten(1)


def _gather_rows(rows_nl: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks; ranks may have different numbers of rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_nl
    counts = [torch.zeros(1, dtype=torch.int64, device=rows_nl.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows_nl)], device=rows_nl.device))
    most = int(max(count.item() for count in counts))
    padded = rows_nl.new_zeros(most, rows_nl.shape[1])
    padded[: len(rows_nl)] = rows_nl
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count.item())] for part, count in zip(parts, counts, strict=True)])
