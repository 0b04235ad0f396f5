"""Synchronized statistics on gloo: several processes equal one, with one small all_reduce each way.

Four processes are started once and save what they saw; every test judges one claim.
"""

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from unitdist import Unitization1d, Unitization2d
from unitdist.errors import ConfigError
from unitdist.layers import normalize_and_convolve, overlap
from unitdist.sync import new_sync_group

SHARES = {2: [3, 4], 3: [3, 0, 4], 4: [3, 0, 1, 3]}
CHANNELS = 5
SCOPES = ["image", "pixel", "vectors"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_layer(scope: str, group: dist.ProcessGroup | None, sync: bool) -> nn.Module:
    if scope == "vectors":
        layer: nn.Module = Unitization1d(CHANNELS, process_group=group, sync=sync, dtype=torch.float64)
    else:
        layer = Unitization2d(
            CHANNELS, norm_scope=scope, activation="relu", process_group=group, sync=sync, dtype=torch.float64
        )
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(CHANNELS, seed=seed))
    return layer


def run(layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Two training steps' worth of outputs, gradients and running statistics."""
    seen = {}
    for step in range(2):
        x_step = (x * (step + 1)).requires_grad_()
        y = layer(x_step)
        grads = torch.autograd.grad(y, [x_step, layer.weight, layer.bias, layer.alpha], grad_y)
        seen.update({f"y{step}": y.detach(), **dict(zip(("x", "weight", "bias", "alpha"), grads, strict=True))})
    return {**seen, "running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()}


class CollectiveCounter:
    """Notes the name and number of elements of every collective that torch.distributed starts."""

    def __enter__(self) -> list[tuple[str, int]]:
        self.seen: list[tuple[str, int]] = []
        prefixes = ("all_", "reduce", "broadcast", "gather", "barrier")
        self.originals = {name: getattr(dist, name) for name in dir(dist) if name.startswith(prefixes)}
        for name, function in self.originals.items():
            if callable(function):
                setattr(dist, name, self.counted(name, function))
        return self.seen

    def counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, args[0].numel() if args and isinstance(args[0], Tensor) else -1))
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)


def inputs_of(scope: str) -> tuple[Tensor, Tensor]:
    shape = (7, CHANNELS) if scope == "vectors" else (7, CHANNELS, 3, 4)
    return random(*shape, seed=10) + 3, random(*shape, seed=11)


def check_shares(rank: int, groups: dict[int, dist.ProcessGroup | None], seen: dict[str, Any]) -> None:
    for size, shares in SHARES.items():
        for scope in SCOPES if rank < size else []:
            x, grad_y = inputs_of(scope)
            first = sum(shares[:rank])
            mine = slice(first, first + shares[rank])
            layer = copy.deepcopy(make_layer(scope, groups[size], sync=True))  # a copy keeps its group
            with CollectiveCounter() as collectives:
                seen[f"{scope}{size}"] = run(layer, x[mine], grad_y[mine])
            seen[f"{scope}{size} collectives"] = list(collectives)


def check_other_settings(groups: dict[int, dist.ProcessGroup | None], seen: dict[str, Any]) -> None:
    x, grad_y = inputs_of("image")
    with CollectiveCounter() as collectives:
        unsynchronized = make_layer("image", None, sync=False)
        run(unsynchronized, x, grad_y)
        unsynchronized.eval()(x)
        make_layer("image", None, sync=True).requires_grad_(False)(x).sum()
    seen["no backward"] = list(collectives)
    layer = make_layer("image", None, sync=True).train()
    layer(x)
    with CollectiveCounter() as collectives:
        run_eval = layer.eval()(x.requires_grad_())
        run_eval.sum().backward()
    seen["evaluation"] = list(collectives)
    nobody = Unitization2d(CHANNELS, norm_divisor=4)
    nobody(torch.zeros(0, CHANNELS, 2, 2)).sum().backward()
    seen["nobody"] = [nobody.running_mean.tolist(), nobody.running_var.tolist()]


def check_one_node(rank: int, seen: dict[str, Any]) -> None:
    """Norm and convolution as one node, and both forms inside a compiled graph."""
    share = slice(sum(SHARES[4][:rank]), sum(SHARES[4][: rank + 1]))
    x, _ = inputs_of("image")
    conv = nn.Conv2d(CHANNELS, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(random(3, CHANNELS, 3, 3, seed=30))
        conv.bias.zero_()

    def separate(norm: nn.Module, x: Tensor) -> Tensor:
        return conv(norm(x))

    def together(norm: nn.Module, x: Tensor) -> Tensor:
        return normalize_and_convolve(norm, conv, x)

    forms = {"separate": separate, "together": together}
    forms |= {
        f"compiled {name}": torch.compile(form, fullgraph=True, backend="aot_eager") for name, form in forms.items()
    }
    for name, form in forms.items():
        norm = make_layer("image", None, sync=True)
        norm.set_norm_divisor(12)
        leaves = [x[share].clone().requires_grad_(), *norm.parameters(), *conv.parameters()]
        with CollectiveCounter() as collectives:
            grads = torch.autograd.grad(form(norm, leaves[0]).square().sum(), leaves)
        seen[name] = [*grads, norm.running_mean.clone(), norm.running_var.clone()]
        seen[f"{name} collectives"] = list(collectives)

    events: list[str] = []
    start, backward = overlap.start_sum_over_group, torch.ops.aten.convolution_backward

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def start_noted(*arguments: Any) -> Work:
        events.append("start all_reduce")
        return Work(start(*arguments))

    def backward_noted(*arguments: Any) -> Any:
        events.append("gradient of " + ("input" if arguments[-1][0] else "weight"))
        return backward(*arguments)

    overlap.start_sum_over_group, torch.ops.aten.convolution_backward = start_noted, backward_noted
    together(norm, leaves[0]).sum().backward()
    overlap.start_sum_over_group, torch.ops.aten.convolution_backward = start, backward
    seen["events"] = events


def check_ddp(rank: int, seen: dict[str, Any]) -> None:
    """A synchronized net in DDP, eager and compiled as `train.compile` does it: the network first, DDP around it."""
    share = slice(sum(SHARES[4][:rank]), sum(SHARES[4][: rank + 1]))
    x, _ = inputs_of("image")
    for name in ("ddp", "ddp compiled"):
        torch.manual_seed(0)
        norm = make_layer("image", None, sync=True)
        norm.set_norm_divisor(12)
        net = nn.Sequential(norm, nn.Conv2d(CHANNELS, 3, 3, padding=1, dtype=torch.float64))
        if name == "ddp compiled":
            net.compile(fullgraph=True, backend="aot_eager")
        wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        with CollectiveCounter() as collectives:
            wrapped(x[share]).square().sum().backward()
        seen[name] = [*(parameter.grad for parameter in net.parameters()), norm.running_mean.clone()]
        seen[f"{name} collectives"] = list(collectives)


def check_groups(rank: int, seen: dict[str, Any]) -> None:
    pair = new_sync_group(2)
    seen["pair"] = dist.get_process_group_ranks(pair)
    seen["whole"] = new_sync_group(4)
    try:
        new_sync_group(3)
    except ConfigError as error:
        seen["uneven"] = str(error)
    x = random(2, CHANNELS, 2, 2, seed=rank).float() + 100
    layer = Unitization2d(CHANNELS, process_group=pair)
    layer(x)
    lost = Unitization2d(CHANNELS, norm_divisor=4)
    lost.group_name = "nowhere"
    for name, form in (("eager", lost), ("compiled", torch.compile(lost, fullgraph=True, backend="aot_eager"))):
        try:
            form(x)
        except ConfigError as error:
            seen[f"lost {name}"] = str(error)
    seen["pair statistics"] = (layer.running_mean, layer.running_var, x)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    groups = {2: dist.new_group([0, 1]), 3: dist.new_group([0, 1, 2]), 4: None}
    seen: dict[str, Any] = {}
    check_shares(rank, groups, seen)
    check_other_settings(groups, seen)
    check_one_node(rank, seen)
    check_ddp(rank, seen)
    check_groups(rank, seen)
    torch.save(seen, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sync")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {scope: run(make_layer(scope, None, sync=False), *inputs_of(scope)) for scope in SCOPES}


CASES = [(scope, size) for scope in SCOPES for size in SHARES]


@pytest.mark.parametrize(("scope", "size"), CASES)
@pytest.mark.parametrize("quantity", ["y0", "y1", "x"])
def test_uneven_ranks_give_the_samples_of_one_process(
    ranks: Any, alone: Any, scope: str, size: int, quantity: str
) -> None:
    together = torch.cat([seen[f"{scope}{size}"][quantity] for seen in ranks[:size]])
    torch.testing.assert_close(together, alone[scope][quantity], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("scope", "size"), CASES)
@pytest.mark.parametrize("quantity", ["weight", "bias", "alpha"])
def test_parameter_gradients_add_up_to_one_process(
    ranks: Any, alone: Any, scope: str, size: int, quantity: str
) -> None:
    total = sum(seen[f"{scope}{size}"][quantity] for seen in ranks[:size])
    torch.testing.assert_close(total, alone[scope][quantity], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("scope", "size"), CASES)
@pytest.mark.parametrize("quantity", ["running_mean", "running_var"])
def test_running_statistics_are_those_of_one_process_and_identical(
    ranks: Any, alone: Any, scope: str, size: int, quantity: str
) -> None:
    values = [seen[f"{scope}{size}"][quantity] for seen in ranks[:size]]
    assert all(torch.equal(value, values[0]) for value in values)
    torch.testing.assert_close(values[0], alone[scope][quantity], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("scope", "size"), CASES)
def test_one_small_all_reduce_each_way_and_nothing_else(ranks: Any, scope: str, size: int) -> None:
    step = [("all_reduce", 2 * CHANNELS + 1), ("all_reduce", 2 * CHANNELS)]
    for seen in ranks[:size]:
        assert seen[f"{scope}{size} collectives"] == step * 2


def test_without_backward_there_is_one_collective_and_without_sync_none(ranks: Any) -> None:
    assert all(seen["no backward"] == [("all_reduce", 2 * CHANNELS + 1)] for seen in ranks)


def test_evaluation_needs_no_collective(ranks: Any) -> None:
    assert all(seen["evaluation"] == [] for seen in ranks)


def test_if_nobody_has_a_sample_the_running_statistics_stay(ranks: Any) -> None:
    assert all(seen["nobody"] == [[0.0] * CHANNELS, [1.0] * CHANNELS] for seen in ranks)


def test_sync_groups_are_contiguous_and_the_whole_job_is_the_default_group(ranks: Any) -> None:
    assert [seen["pair"] for seen in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(seen["whole"] is None for seen in ranks)


def test_a_group_size_that_does_not_divide_the_job_is_refused(ranks: Any) -> None:
    assert all("3 ranks: must be >= 1 and divide the 4 ranks" in seen["uneven"] for seen in ranks)


def test_a_group_that_does_not_exist_is_named_by_the_error_compiled_or_not(ranks: Any) -> None:
    for seen in ranks:
        for name in ("lost eager", "lost compiled"):
            assert "process group 'nowhere' does not exist in this process: create it before the model" in seen[name]


def test_groups_have_their_own_statistics_in_float32_at_a_mean_of_100(ranks: Any) -> None:
    for pair in (ranks[:2], ranks[2:]):
        x = torch.cat([seen["pair statistics"][2] for seen in pair]).double()
        for mean, var, _ in (seen["pair statistics"] for seen in pair):
            torch.testing.assert_close(mean.double(), 0.1 * x.mean((0, 2, 3)), rtol=1e-6, atol=0)
            torch.testing.assert_close(var.double(), 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["together", "compiled separate", "compiled together"])
def test_one_node_and_compiled_graphs_equal_the_separate_form_with_synchronization(ranks: Any, form: str) -> None:
    for seen in ranks:
        for have, want in zip(seen[form], seen["separate"], strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-10)
        assert seen[f"{form} collectives"] == seen["separate collectives"]


def test_a_compiled_net_in_ddp_has_the_gradients_and_the_collectives_of_the_eager_one(ranks: Any) -> None:
    for seen in ranks:
        for have, want, everywhere in zip(seen["ddp compiled"], seen["ddp"], ranks[0]["ddp"], strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-10)
            assert torch.equal(want, everywhere)
        assert seen["ddp compiled collectives"] == seen["ddp collectives"]
        assert ("all_reduce", 2 * CHANNELS + 1) in seen["ddp collectives"]


def test_the_backward_message_travels_while_the_weight_gradient_is_computed(ranks: Any) -> None:
    order = ["gradient of input", "start all_reduce", "gradient of weight", "wait"]
    assert all(seen["events"] == order for seen in ranks)
