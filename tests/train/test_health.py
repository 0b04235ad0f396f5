"""unitdist.train.health: spikes, and whose parameters differ."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unitdist.errors import TrainingError
from unitdist.train.health import LossSpikes, check_same_parameters


def test_spike_is_told_against_the_median_of_the_windows_before() -> None:
    spikes = LossSpikes(2.0)
    assert [spikes.note(5.0) for _ in range(19)] == [None] * 19
    assert spikes.note(100.0) is None  # no 20 windows before it
    assert spikes.note(9.9) is None
    assert spikes.note(10.1) == 5.0
    assert LossSpikes(None).note(1.0) is None


def run_of(ranks: list[nn.Module]) -> SimpleNamespace:
    """As rank 0 sees the job, whose ranks hold these networks."""
    from unitdist.train.health import _sum_of_words

    def gather(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack([_sum_of_words(parameter) for parameter in net.parameters()]) for net in ranks])

    world = SimpleNamespace(size=len(ranks))
    engine = SimpleNamespace(module=ranks[0], gather_over_ranks=gather, world=world)
    health = SimpleNamespace(checksum_every_steps=10)
    return SimpleNamespace(
        engine=engine,
        state=SimpleNamespace(step=40),
        config=SimpleNamespace(health=health),
        folder=SimpleNamespace(path="runs/a"),
    )


def nets(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    others = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(count - 1)]
    for other in others:
        other.load_state_dict(first.state_dict())
    return [first, *others]


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_one_flipped_bit_names_rank_and_parameter(bit: int) -> None:
    ranks = nets(4)
    check_same_parameters(run_of(ranks))  # equal
    with torch.no_grad():
        ranks[2][1].weight.view(-1).view(torch.int32)[5] ^= -(2**31) if bit == 31 else 1 << bit
    with pytest.raises(
        TrainingError, match=r"after step 40 rank 2 differs from the other 3 in the parameters, first in 1\.weight"
    ):
        check_same_parameters(run_of(ranks))


def test_two_ranks_cannot_tell_which_is_right() -> None:
    ranks = nets(2)
    with torch.no_grad():
        ranks[1][0].bias[0] += 1
    with pytest.raises(
        TrainingError,
        match=r"the 2 ranks differ, and no majority says which is right, in the parameters, first in 0\.bias",
    ):
        check_same_parameters(run_of(ranks))
