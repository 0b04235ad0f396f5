"""A rank whose data fails takes the others along: nobody waits in a collective, and all raise the same error at one step.
So in training, validation and the live monitor.

Two processes are started once, play every scenario and save what they saw.
"""

import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from unitdist.analysis.em_distance import CriticSettings
from unitdist.analysis.monitor import EmDistance, Samples, ShiftMonitor
from unitdist.data.batch import Batch
from unitdist.errors import DataError, UnitdistError
from unitdist.train.agreement import agreed
from unitdist.train.batches_ahead import BatchesAhead
from unitdist.train.metrics import Stopwatch
from unitdist.train.stopping import StopRequest
from unitdist.train.validate import validate
from unitdist.world import World

STEPS = 6
FAILING_STEPS = (0, 1, 2, 3, 5)
MONITORED = (("images", 1), ("images", 2), ("train", 1), ("test", 1))
"""Loader that fails, and in which reading of it: the images are read by begin() and by measure()."""


class FailingLoader:
    """Six batches, or fewer and then a DataError, in its `fails_in`-th epoch. Step -1: the epoch cannot be started."""

    num_samples, per_rank_batch_size, batches_per_epoch = 24, 2, STEPS

    def __init__(self, fails_at: int | None, *, fails_in: int = 1) -> None:
        self.fails_at, self._good_epochs = fails_at, fails_in - 1

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        self._good_epochs -= 1
        if self._good_epochs >= 0:
            return self._batches(None)
        if self.fails_at == -1:
            raise DataError(f"unreadable image number {self.fails_at}")
        return self._batches(self.fails_at)

    def _batches(self, fails_at: int | None) -> Iterator[Batch]:
        for step in range(STEPS):
            if step == fails_at:
                raise DataError(f"unreadable image number {step}")
            ids = torch.arange(2)
            yield Batch(images=torch.ones(2, 3), labels=ids, valid=torch.ones(2, dtype=torch.bool), sample_ids=ids)


def train_steps(world: World, stop: StopRequest, loader: FailingLoader, broken_at: dict[int, str]) -> dict[str, Any]:
    """What train/epoch.py does around a step, with an all_reduce as the step."""
    seen: dict[str, Any] = {"steps": 0, "error": "", "speaker": None}
    broken: dict[str, str] = {}
    stop.limit_broken(SimpleNamespace(broken=broken, max_broken=2))  # type: ignore[arg-type]
    try:
        batches = BatchesAhead(
            loader, world, stop, Stopwatch(), epoch=0, start_sample=0, steps=STEPS, accumulation_steps=1
        )
        for step in range(STEPS):
            (batch,) = batches.take()
            dist.all_reduce(batch.images)
            seen["steps"] += 1
            if step in broken_at:
                broken[broken_at[step]] = "empty file"
            batches.refill()
            stop.check()
    except UnitdistError as error:
        seen |= {"error": str(error), "speaker": error.speaker}
    return seen


def validation(world: World, stop: StopRequest, loader: FailingLoader) -> dict[str, Any]:
    engine = SimpleNamespace(
        module=nn.Linear(3, 2), device=torch.device("cpu"), world=world, autocast=torch.no_grad, sum_over_ranks=summed
    )
    try:
        return {"count": validate(engine, loader, stop=stop)["count"]}  # type: ignore[arg-type]
    except UnitdistError as error:
        return {"error": str(error), "speaker": error.speaker}


def monitored(world: World, *, images: FailingLoader, train: FailingLoader, test: FailingLoader) -> dict[str, Any]:
    """What build_monitor and the end of an epoch do, on loaders of ours."""
    torch.manual_seed(0)
    model, old = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    together = partial(agreed, world)
    distance = EmDistance(old, ["0"], train, test, CriticSettings(steps=4), together)
    seen: dict[str, Any] = {"begun": False}
    try:
        monitor = ShiftMonitor(
            ["0"], Samples(images, None, world), every_epochs=1, em_distance=distance, agreed=together
        )
        monitor.begin(model)
        seen["begun"] = True
        seen["metrics"] = len(monitor.measure(model).metrics)
    except UnitdistError as error:
        seen |= {"error": str(error), "speaker": error.speaker}
    return seen


def summed(values: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(values)
    return values


def worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world, seen = World(rank=rank, local_rank=rank, size=2, local_size=2), {}

    def stop() -> StopRequest:
        request = StopRequest(world)
        requests.append(request)
        return request

    requests: list[StopRequest] = []
    for failing in (None, -1, *FAILING_STEPS):
        loader = FailingLoader(failing if rank == 1 else None)
        seen[f"train {failing}"] = train_steps(world, stop(), loader, {})
        if failing != -1:  # a validation's loader does nothing before its first batch
            seen[f"validate {failing}"] = validation(world, stop(), loader)
    for where, fails_in in (("none", 1), *MONITORED):
        loaders = {
            name: FailingLoader(3 if rank == 1 and name == where else None, fails_in=fails_in)
            for name in ("images", "train", "test")
        }
        seen[f"monitor {where} {fails_in}"] = monitored(world, **loaders)
    # Three different images, two on one rank; and the same two met by both ranks, as in two epochs.
    different = {0: "a", 1: "b"} if rank == 0 else {1: "c"}
    same = {0: "a", 2: "b"} if rank == 0 else {1: "b", 3: "a"}
    seen["different"] = train_steps(world, stop(), FailingLoader(None), different)
    seen["same"] = train_steps(world, stop(), FailingLoader(None), same)
    for request in reversed(requests):
        request.close()
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("agreed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("failing", [-1, *FAILING_STEPS])
def test_all_ranks_stop_after_the_last_step_whose_batches_all_of_them_held(ranks: Any, failing: int) -> None:
    expected = {"steps": failing if failing >= 2 else 0, "error": f"unreadable image number {failing}", "speaker": 1}
    assert ranks[0][f"train {failing}"] == ranks[1][f"train {failing}"] == expected


@pytest.mark.parametrize("failing", FAILING_STEPS)
def test_validation_ends_on_all_ranks(ranks: Any, failing: int) -> None:
    expected = {"error": f"unreadable image number {failing}", "speaker": 1}
    assert ranks[0][f"validate {failing}"] == ranks[1][f"validate {failing}"] == expected


@pytest.mark.parametrize(("where", "fails_in"), MONITORED)
def test_monitor_ends_on_all_ranks(ranks: Any, where: str, fails_in: int) -> None:
    expected = {"begun": (where, fails_in) != ("images", 1), "error": "unreadable image number 3", "speaker": 1}
    assert ranks[0][f"monitor {where} {fails_in}"] == ranks[1][f"monitor {where} {fails_in}"] == expected


def test_without_a_failure_all_batches_are_used(ranks: Any) -> None:
    for seen in ranks:
        assert seen["train None"] == {"steps": STEPS, "error": "", "speaker": None}
        assert seen["validate None"] == {"count": 24}
        assert seen["monitor none 1"]["begun"] and seen["monitor none 1"]["metrics"] > 0


def test_broken_images_are_counted_over_all_ranks_and_once_each(ranks: Any) -> None:
    message = "3 unreadable images, more than the 2 that data.max_broken_share allows, first a (empty file)"
    for seen in ranks:
        assert seen["different"] == {"steps": 3, "error": message, "speaker": 0}
        assert seen["same"] == {"steps": STEPS, "error": "", "speaker": None}
