"""EM distance of layer outputs between two iterations: Algorithm 3's critics, and the sliced distance.

W(P, Q) = sup over 1-Lipschitz f of E f(new) - E f(old). Alg. 3 trains one critic f_w per layer to ascend that
difference, with its weights clipped, so that all f_w share one (unknown) Lipschitz constant K: the
estimates are K * W at best, comparable between epochs and between layers of one shape, and no lengths.
`sliced_em_distance` is a length: the mean 1-D distance over fixed directions, never above W.

Axes: n samples, d units of a flattened output, l directions, c channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitdist.analysis.probe import capture_outputs, evaluation_mode
from unitdist.data.batch import Batch, Loader
from unitdist.errors import ConfigError, TrainingError

Agreement = Callable[[], AbstractContextManager[None]]
"""Makes what stands around reading images: with several ranks an error of one of them is then raised by all. nullcontext: it is not."""


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """Algorithm 3's constants; the optimizer it leaves open is WGAN's RMSprop."""

    steps: int = 1500
    """T: training steps of the critics."""
    lr: float = 5e-5
    """RMSprop's learning rate."""
    clip: float = 0.01
    """Weights are clipped to [-clip, clip] after each step."""
    seed: int = 0
    """Seed of the initial weights, the same for every estimate."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clip <= 0:
            raise ConfigError(
                f"EM distance: the critics need steps >= 1, lr > 0 and clip > 0, got {self.steps}, {self.lr} and {self.clip}"
            )


class Critic(nn.Sequential):
    """f_w: four 3x3 convolutions of 64, 64, 128, 128 maps with strides 2, 1, 2, 1, ReLU, then linear and sigmoid.

    (N, C, H, W) float32 -> (N,) float64 in (0, 1). He initialization from `generator`. A vector is a map of one
    pixel, which has no neighbours: its kernels are 1x1. The sigmoid is float64: clipped weights keep all
    outputs near 1/2, where float32 would round their differences (1e-7 in narrow nets) away.
    """

    def __init__(self, num_channels: int, size_hw: tuple[int, int], generator: torch.Generator) -> None:
        layers: list[nn.Module] = []
        height, width = size_hw
        kernel = 1 if size_hw == (1, 1) else 3
        for num_maps, stride in ((64, 2), (64, 1), (128, 2), (128, 1)):
            layers += [nn.Conv2d(num_channels, num_maps, kernel, stride=stride, padding=kernel // 2), nn.ReLU()]
            num_channels, height, width = num_maps, -(-height // stride), -(-width // stride)
        layers += [nn.Flatten(), nn.Linear(num_channels * height * width, 1)]
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return torch.sigmoid(logits.flatten().double())


def as_map(x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1); images as they are; float32."""
    return x.float() if x.dim() == 4 else x.float().flatten(1)[:, :, None, None]


def build_critics(outputs: dict[str, Tensor], seed: int) -> nn.ModuleList:
    """One critic per output, in their order; layers of one shape start from the same weights, at every estimate."""
    critics = []
    for output in outputs.values():
        map_nchw = as_map(output)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # torch's own initialization draws from the global generator first
            critic = Critic(map_nchw.shape[1], (map_nchw.shape[2], map_nchw.shape[3]), generator)
        critics.append(critic.to(output.device))
    return nn.ModuleList(critics)


def check_same_architecture(old: nn.Module, new: nn.Module) -> None:
    """Raise ConfigError naming the first tensor in which two nets differ by name or shape."""
    old_shapes = {name: tuple(tensor.shape) for name, tensor in old.state_dict().items()}
    new_shapes = {name: tuple(tensor.shape) for name, tensor in new.state_dict().items()}
    for name in [*old_shapes, *(name for name in new_shapes if name not in old_shapes)]:
        if old_shapes.get(name) != new_shapes.get(name):
            raise ConfigError(
                f"the two checkpoints are of different architectures: {name} is {old_shapes.get(name, 'absent')} in the old "
                f"and {new_shapes.get(name, 'absent')} in the new; compare two checkpoints of one run"
            )


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.iterate(epoch)
        epoch += 1


def _average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Mean of the gradients over ranks in one collective: with equal slices, the gradient of the whole batch."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    start = 0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


class _Pair:
    """The two nets, and how to get both nets' outputs of the chosen layers for one batch."""

    def __init__(self, old: nn.Module, new: nn.Module, layer_names: Sequence[str]) -> None:
        self.old, self.new, self.layer_names = old, new, layer_names

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with capture_outputs(self.old, self.layer_names) as old_outputs:
            self.old(batch.images)
        with capture_outputs(self.new, self.layer_names) as new_outputs:
            self.new(batch.images)
        return old_outputs, new_outputs


def _train_critics(
    pair: _Pair, train: Loader, settings: CriticSettings, group: dist.ProcessGroup | None, agreed: Agreement
) -> nn.ModuleList:
    batches = _endless(train)
    with agreed():
        first = next(batches)
    outputs = pair.outputs(first)[0]
    silent = [name for name in pair.layer_names if name not in outputs]
    if silent:
        raise ConfigError(f"EM distance: {', '.join(silent)} did not run in the forward pass; name a layer that does")
    critics = build_critics({name: outputs[name] for name in pair.layer_names}, settings.seed)
    parameters = list(critics.parameters())
    optimizer = torch.optim.RMSprop(parameters, lr=settings.lr)
    batch = first
    for step in range(settings.steps):
        old_outputs, new_outputs = pair.outputs(batch)
        differences = [
            critic(as_map(new_outputs[name])).mean() - critic(as_map(old_outputs[name])).mean()
            for critic, name in zip(critics, pair.layer_names, strict=True)
        ]
        optimizer.zero_grad()
        (-torch.stack(differences).sum()).backward()  # type: ignore[no-untyped-call]
        _average_gradients(parameters, group)
        optimizer.step()
        with torch.no_grad():
            for parameter in parameters:
                parameter.clamp_(-settings.clip, settings.clip)
        if step + 1 < settings.steps:
            with agreed():
                batch = next(batches)
    return critics


@torch.no_grad()
def _difference_on(
    pair: _Pair, critics: nn.ModuleList, test: Loader, group: dist.ProcessGroup | None, agreed: Agreement
) -> Tensor:
    """Mean over all valid samples and ranks of f_w(new) - f_w(old), one number per layer, float64."""
    device = next(critics.parameters()).device
    sums = torch.zeros(len(critics) + 1, dtype=torch.float64, device=device)
    with agreed():
        for batch in test.iterate(0):
            old_outputs, new_outputs = pair.outputs(batch)
            valid_n = batch.valid.double()
            for i, (critic, name) in enumerate(zip(critics, pair.layer_names, strict=True)):
                difference_n = critic(as_map(new_outputs[name])) - critic(as_map(old_outputs[name]))
                sums[i] += (difference_n * valid_n).sum()
            sums[-1] += valid_n.sum()
    if dist.is_initialized():
        dist.all_reduce(sums, group=group)
    return sums[:-1] / sums[-1]


def estimate_em_distances(
    old: nn.Module,
    new: nn.Module,
    layer_names: Sequence[str],
    *,
    train: Loader,
    test: Loader,
    settings: CriticSettings | None = None,
    group: dist.ProcessGroup | None = None,
    agreed: Agreement = nullcontext,
) -> dict[str, float]:
    """Algorithm 3 for all named layers at once: layer name -> estimate of (a multiple of) W(new, old).

    Both nets run in evaluation mode (running statistics), so an output depends on its own sample alone.
    `train` gives the critics' batches (128 unaugmented training images), the estimate is taken on all of
    `test`. Deterministic by `settings.seed` and the loaders; the global generator is untouched. Under
    several ranks (equal per-rank batches) critics and estimates are those of the joint batches; `agreed` stands around the reading.

    Raises ConfigError on unknown layer names, a layer that does not run, different architectures or an empty loader, and
    TrainingError where a layer's outputs are not finite.
    """
    settings = CriticSettings() if settings is None else settings
    check_same_architecture(old, new)
    if train.batches_per_epoch < 1 or test.num_samples < 2:
        raise ConfigError(
            f"EM distance: {train.num_samples} training and {test.num_samples} test images are too few: it needs one full "
            f"training batch ({train.per_rank_batch_size} per rank) and at least 2 test images"
        )
    layer_names = list(dict.fromkeys(layer_names))
    pair = _Pair(old, new, layer_names)
    with evaluation_mode(old), evaluation_mode(new):
        critics = _train_critics(pair, train, settings, group, agreed)
        estimates = _difference_on(pair, critics, test, group, agreed).tolist()
    named = dict(zip(layer_names, estimates, strict=True))
    broken = [name for name, estimate in named.items() if estimate != estimate]
    if broken:
        raise TrainingError(
            f"EM distance: the outputs of {', '.join(broken)} are NaN or infinite; no distance is defined"
        )
    return named


def random_directions(num_units: int, num_directions: int, seed: int) -> Tensor:
    """(d, l) float32 unit vectors, uniform on the sphere, from their own generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    directions_dl = torch.randn(num_units, num_directions, generator=generator)
    lengths_l: Tensor = torch.linalg.vector_norm(directions_dl, dim=0)
    return directions_dl / lengths_l


def sliced_em_distance(projections_old_nl: Tensor, projections_new_nl: Tensor) -> float:
    """Mean over directions of the exact 1-D EM distance of two projected samples of one size, (n, l).

    In one dimension sorting couples optimally. Every projection on a unit vector is 1-Lipschitz, so this is
    a lower bound of W between the samples. Raises ConfigError when the sizes differ or there is no sample.
    """
    if projections_old_nl.shape != projections_new_nl.shape or projections_old_nl.shape[0] < 1:
        raise ConfigError(
            "sliced_em_distance: needs two samples of one size, got "
            f"{tuple(projections_old_nl.shape)} and {tuple(projections_new_nl.shape)}"
        )
    old_nl = projections_old_nl.double().sort(dim=0).values
    new_nl = projections_new_nl.double().sort(dim=0).values
    return float((new_nl - old_nl).abs().mean())
