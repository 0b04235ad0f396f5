"""The batchnorm arm over several CPU ranks equals one BatchNorm on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

WORKER = Path(__file__).with_name("synced_batch_norm_worker.py")
REPOSITORY = Path(__file__).resolve().parents[2]


def make_case(shape: tuple[int, ...], bounds: list[int]) -> dict[str, torch.Tensor]:
    """A batch with mean/std = 100 in its first channel, cut between the ranks at `bounds`."""
    generator = torch.Generator().manual_seed(len(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = draw(*shape)
    x[:, 0] += 100
    channels = shape[1]
    return {
        "x": x,
        "grad": draw(*shape),
        "weight": draw(channels),
        "bias": draw(channels),
        "bounds": torch.tensor(bounds),
    }


CASES = [make_case((8, 5, 6, 7), [0, 5, 8]), make_case((9, 4), [0, 2, 9]), make_case((6, 3, 4, 4), [0, 6, 6])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes computed."""
    folder = tmp_path_factory.mktemp("synced_batch_norm")
    torch.save(CASES, folder / "cases.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    workers = [
        subprocess.Popen([sys.executable, WORKER, str(rank), "2", folder], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def whole_batch(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch's BatchNorm on the whole batch, in one process."""
    channels, dims = case["x"].shape[1], case["x"].dim()
    layer = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(channels, eps=1e-3, momentum=0.3).double()
    layer.load_state_dict({**layer.state_dict(), "weight": case["weight"], "bias": case["bias"]})
    x = case["x"].clone().requires_grad_()
    layer(x.detach() * 2 + 1)
    y = layer(x)
    (y * case["grad"]).sum().backward()
    result = {"y": y.detach(), "x_grad": x.grad, "weight_grad": layer.weight.grad, "bias_grad": layer.bias.grad}
    result |= dict(layer.named_buffers())
    return result | {"eval": layer.eval()(x.detach()).detach()}


@pytest.mark.parametrize("index", range(len(CASES)), ids=["images", "vectors", "empty rank"])
def test_two_ranks_equal_one_batchnorm_on_the_whole_batch(ranks: list[dict[str, Any]], index: int) -> None:
    expected = whole_batch(CASES[index])
    found = [rank["layer"][index] for rank in ranks]
    for key in ("y", "x_grad", "eval"):
        torch.testing.assert_close(torch.cat([rank[key] for rank in found]), expected[key], rtol=1e-9, atol=1e-9)
    for key in ("weight_grad", "bias_grad"):
        torch.testing.assert_close(found[0][key] + found[1][key], expected[key], rtol=1e-9, atol=1e-9)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found[0][key], expected[key], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1][key], expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mnist_resnet8", "mnist_mlp", "timm:resnet18", "timm:regnetx_002"])
def test_batchnorm_arm_is_synchronized_where_there_are_several_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        net = rank["nets"][name]
        assert net["all synced"] and net["group"] and net["keys"] and not net["alone synced"]
        assert net["pickled"].startswith("SyncedBatchNorm")
        # Both ranks hold the same images, so that the statistics over both are those of one.
        assert net["loss"] == pytest.approx(net["loss alone"], rel=1e-8)
