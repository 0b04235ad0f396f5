"""Algorithm 3 and the sliced distance."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unitdist.analysis.em_distance import (
    Critic,
    CriticSettings,
    estimate_em_distances,
    random_directions,
    sliced_em_distance,
)
from unitdist.analysis.exact_transport import exact_em_distance
from unitdist.data.batch import Batch
from unitdist.errors import ConfigError, TrainingError


class InMemory:
    """A Loader over a tensor; rank r of `size` takes the r-th slice of each global batch."""

    def __init__(self, images: Tensor, per_rank_batch_size: int, rank: int = 0, size: int = 1) -> None:
        self.images, self.per_rank_batch_size, self.rank, self.size = images, per_rank_batch_size, rank, size
        self.class_to_idx = {"0": 0}
        self.num_samples = len(images)
        self.batches_per_epoch = len(images) // (per_rank_batch_size * size)

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        step = self.per_rank_batch_size * self.size
        for start in range(start_sample, self.batches_per_epoch * step, step):
            ids = torch.arange(start, start + step).chunk(self.size)[self.rank]
            yield Batch(images=self.images[ids], labels=ids * 0, valid=ids >= 0, sample_ids=ids)

    def fingerprint(self) -> dict[str, int | float | str]:
        return {}

    def close(self) -> None:
        pass


def net(shift: float, scale: float = 1.0) -> nn.Module:
    """Two layers whose outputs `shift` moves: a map of 2 channels, and its 2 channel means."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(scale * torch.eye(2).view(2, 2, 1, 1))
        model[0].bias.fill_(shift)
        model[3].weight.copy_(torch.eye(2))
        model[3].bias.zero_()
    return model


def wide_net(shift: float) -> nn.Module:
    """`net` with 4 units in the second layer."""
    model = net(shift)
    torch.manual_seed(0)
    model[3] = nn.Linear(2, 4)  # type: ignore[operator]
    return model


def images(n: int = 64) -> Tensor:
    return torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(5))


FAST = CriticSettings(steps=30)


def estimate(new: nn.Module, **changes: object) -> dict[str, float]:
    loader = InMemory(images(), 16)
    settings = CriticSettings(steps=30, **changes)  # type: ignore[arg-type]
    return estimate_em_distances(net(0.0), new, ["0", "3"], train=loader, test=loader, settings=settings)


def test_critic_has_the_shape_of_algorithm_3() -> None:
    critic = Critic(16, (32, 32), torch.Generator().manual_seed(0))
    convolutions = [layer for layer in critic if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (64, (3, 3), (2, 2)),
        (64, (3, 3), (1, 1)),
        (128, (3, 3), (2, 2)),
        (128, (3, 3), (1, 1)),
    ]
    output = critic(torch.randn(3, 16, 32, 32))
    assert output.shape == (3,)
    assert bool(((output > 0) & (output < 1)).all())


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 8)])
def test_critic_takes_any_map(size: tuple[int, int]) -> None:
    assert Critic(3, size, torch.Generator().manual_seed(0))(torch.randn(2, 3, *size)).shape == (2,)


def test_distance_of_a_net_to_itself_is_zero() -> None:
    assert estimate(net(0.0)) == {"0": 0.0, "3": 0.0}


def test_estimates_grow_with_the_shift_and_are_deterministic() -> None:
    small, large = estimate(net(0.2)), estimate(net(1.0))
    for name in ("0", "3"):
        assert 0 < small[name] < large[name]
    assert estimate(net(1.0)) == large
    assert estimate(net(1.0), seed=1) != large


def test_critics_trained_together_equal_critics_trained_alone() -> None:
    loader = InMemory(images(), 16)
    together = estimate(net(0.5))
    for name in ("0", "3"):
        alone = estimate_em_distances(net(0.0), net(0.5), [name], train=loader, test=loader, settings=FAST)
        assert alone[name] == together[name]


def test_layers_may_be_named_in_any_order_and_twice() -> None:
    """They run in the order "0", "3", and their critics differ in shape."""
    loader = InMemory(images(), 16)
    model, moved = wide_net(0.0), wide_net(0.5)
    forth = estimate_em_distances(model, moved, ["0", "3"], train=loader, test=loader, settings=FAST)
    back = estimate_em_distances(model, moved, ["3", "0", "3"], train=loader, test=loader, settings=FAST)
    assert list(back) == ["3", "0"]
    assert back == forth


def test_a_layer_that_does_not_run_is_refused() -> None:
    old, new, loader = net(0.0), net(1.0), InMemory(images(), 16)
    for model in (old, new):
        model.spare = nn.Identity()
        model.forward = model[0].forward  # type: ignore[method-assign,index]
    with pytest.raises(ConfigError, match="spare did not run"):
        estimate_em_distances(old, new, ["0", "spare"], train=loader, test=loader, settings=FAST)


def test_critics_that_would_not_train_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps >= 1"):
        CriticSettings(steps=0)


def test_estimate_leaves_models_and_global_generator_alone() -> None:
    old, new, loader = net(0.0), net(0.5).train(), InMemory(images(), 16)
    before = [parameter.clone() for parameter in new.parameters()]
    generator_state = torch.get_rng_state()
    estimate_em_distances(old, new, ["0", "3"], train=loader, test=loader, settings=FAST)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert new.training
    assert all(parameter.grad is None for parameter in new.parameters())
    assert all(torch.equal(parameter, old) for parameter, old in zip(new.parameters(), before, strict=True))


def test_weights_are_clipped() -> None:
    """With every weight at most c, the difference of two sigmoids is at most what the widest critic allows."""
    assert abs(estimate(net(100.0), clip=1e-6)["0"]) < 1e-6


def test_different_architectures_are_refused_with_the_tensor() -> None:
    loader = InMemory(images(), 16)
    other = nn.Sequential(nn.Conv2d(2, 3, 1))
    with pytest.raises(ConfigError, match=r"0\.weight is \(2, 2, 1, 1\) in the old and \(3, 2, 1, 1\) in the new"):
        estimate_em_distances(net(0.0), other, ["0"], train=loader, test=loader, settings=FAST)


def test_unknown_layer_is_refused() -> None:
    loader = InMemory(images(), 16)
    with pytest.raises(ConfigError, match="no layer named '9'"):
        estimate_em_distances(net(0.0), net(1.0), ["9"], train=loader, test=loader, settings=FAST)


def test_too_small_a_sample_is_refused() -> None:
    few, enough = InMemory(images(8), 16), InMemory(images(), 16)
    with pytest.raises(ConfigError, match="too few"):
        estimate_em_distances(net(0.0), net(1.0), ["0"], train=few, test=enough, settings=FAST)


def test_nan_activations_name_the_layer() -> None:
    with pytest.raises(TrainingError, match="outputs of 0, 3 are NaN or infinite"):
        estimate(net(float("nan")))


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loader = InMemory(images(), 8, rank, 2)
    result = estimate_em_distances(net(0.0), net(0.7), ["0", "3"], train=loader, test=loader, settings=FAST)
    torch.save(result, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_estimate_what_one_process_does(tmp_path: Path) -> None:
    mp.start_processes(_rank_main, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    one = estimate(net(0.7))
    assert ranks[0] == ranks[1]
    for name in ("0", "3"):
        assert ranks[0][name] == pytest.approx(one[name], rel=1e-3)


def test_sliced_distance_of_a_shift_is_the_mean_projection_of_the_shift() -> None:
    x_nd = torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    directions_dl = random_directions(3, 40, seed=1).double()
    shift = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    sliced = sliced_em_distance(x_nd @ directions_dl, (x_nd + shift) @ directions_dl)
    assert sliced == pytest.approx(float((shift @ directions_dl).abs().mean()), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**31))
def test_sliced_distance_never_exceeds_the_exact_one(n: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_nd, y_nd = (torch.randn(n, d, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    directions_dl = random_directions(d, 8, seed).double()
    assert sliced_em_distance(x_nd @ directions_dl, y_nd @ directions_dl) <= exact_em_distance(x_nd, y_nd) * (1 + 1e-6)


def test_sliced_distance_equals_the_exact_one_in_one_dimension() -> None:
    generator = torch.Generator().manual_seed(3)
    x_nd, y_nd = (torch.randn(30, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    assert sliced_em_distance(x_nd, y_nd) == pytest.approx(exact_em_distance(x_nd, y_nd), rel=1e-12)


def test_sliced_distance_needs_samples_of_one_size() -> None:
    with pytest.raises(ConfigError, match="one size"):
        sliced_em_distance(torch.zeros(3, 2), torch.zeros(4, 2))
