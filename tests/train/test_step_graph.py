"""`train.cuda_graph` without a GPU: everything but the recording itself.

On the CPU a recorder that repeats the work stands for CUDA's: like a graph it does nothing while it records, and then does the
same work on the same tensors at every call. tests/gpu/test_step_graph_gpu.py has the real one.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.jobs import assert_same_result
from tests.dist.launching import ROOT
from unitdist.config import Config, ModelConfig, OptimConfig, TrainConfig
from unitdist.config_file import load_config
from unitdist.errors import ConfigError, TrainingError
from unitdist.layers import node
from unitdist.models.build import build_model
from unitdist.train import engine as engines
from unitdist.train import epoch, step_graph
from unitdist.train.dry_run import dry_run
from unitdist.train.ema import WeightAverage
from unitdist.train.engine import Engine
from unitdist.train.epoch import compute_whole_step
from unitdist.train.loop import train
from unitdist.train.metrics import TrainSums
from unitdist.train.optim import build_optimizer
from unitdist.train.step_graph import WARM_UP_STEPS, StepGraph
from unitdist.world import World

SMALL = ROOT / "tests" / "dist" / "small.yaml"


class RepeatingRecorder:
    """Stands for CudaRecorder; notes what was asked of it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.events: list[str] = []

    def run(self, work: Callable[[], None]) -> None:
        self.events.append("run")
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.events.append("record")

        def replay() -> None:
            self.events.append("replay")
            work()

        return replay


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[RepeatingRecorder]:
    """Recorders that a run on the CPU made, in the place of CUDA's."""
    made: list[RepeatingRecorder] = []

    def make(device: torch.device) -> RepeatingRecorder:
        made.append(RepeatingRecorder(device))
        return made[-1]

    monkeypatch.setattr(epoch, "CudaRecorder", make)
    monkeypatch.setattr(engines, "check_device", lambda config: None)
    return made


# Two epochs of 12 steps and a rest; mixup makes every step's inputs different.
DATA = [
    "data.dataset=synthetic", "data.loader=synthetic", "data.augmentation=none", "data.synthetic_samples=100",
    "data.synthetic_classes=16", "data.global_batch_size=8", "data.image_size_px=16", "train.mixup_alpha=0.5",
]  # fmt: skip


def run_of(folder: Path, name: str, *overrides: str, resume: str | None = None) -> Path:
    shared = [f"run.folder={folder}", f"run.name={name}", "evaluation.every_epochs=2", *DATA]
    return train(load_config(SMALL, [*shared, *overrides]), resume=resume)


# The rate changes at every step; small.yaml reads the sums at every step.
EVERYTHING = [
    "schedule.name=cosine", "schedule.warmup_epochs=0.5", "optim.clip_norm=1.0", "optim.lr=0.01", "train.ema_decay=0.9",
]  # fmt: skip
GRAPH = "train.cuda_graph=true"


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("eager"), "eager", *EVERYTHING)


def test_a_run_of_replayed_steps_equals_an_eager_one_bit_for_bit(
    tmp_path: Path, eager: Path, recorders: list[RepeatingRecorder]
) -> None:
    assert_same_result(run_of(tmp_path, "replayed", GRAPH, *EVERYTHING), eager)
    assert recorders[0].events == ["run"] * WARM_UP_STEPS + ["record"] + ["replay"] * (24 - WARM_UP_STEPS)


def test_a_run_resumed_within_an_epoch_records_again_and_equals_an_undisturbed_eager_one(
    tmp_path: Path, eager: Path, recorders: list[RepeatingRecorder]
) -> None:
    run_of(tmp_path, "resumed", GRAPH, *EVERYTHING, "train.max_steps=7")
    assert_same_result(run_of(tmp_path, "resumed", GRAPH, *EVERYTHING, resume="auto"), eager)
    assert [recorder.events.count("record") for recorder in recorders] == [1, 1]
    assert len(recorders[1].events) == 1 + 24 - 7


def test_adamw_counts_its_steps_on_the_device_and_resumes(tmp_path: Path, recorders: list[RepeatingRecorder]) -> None:
    options = ["optim.name=adamw", "optim.lr=1e-4", "train.epochs=1"]
    run_of(tmp_path, "replayed", GRAPH, *options, "train.max_steps=5")
    runs = {
        "replayed": run_of(tmp_path, "replayed", GRAPH, *options, resume="auto"),
        "eager": run_of(tmp_path, "eager", *options),
    }
    losses = {}
    for name, run in runs.items():
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = torch.tensor([event["loss"] for event in events if event["event"] == "train"])
        state = torch.load(run / "last.pt", weights_only=True)["optimizer"]["state"]
        assert {values["step"].item() for values in state.values()} == {12.0}
    assert len(losses["eager"]) == 12
    torch.testing.assert_close(
        losses["replayed"], losses["eager"], rtol=2e-5, atol=0
    )  # the fused form rounds otherwise


def test_inputs_lie_at_fixed_addresses_and_other_shapes_begin_anew() -> None:
    seen: list[tuple[int, float]] = []
    recorder = RepeatingRecorder()
    graph = StepGraph(lambda x: seen.append((x.data_ptr(), x.sum().item())), recorder)
    for value in range(6):
        graph.run(torch.full((2, 3), float(value)))
    assert len({address for address, _ in seen}) == 1
    assert [total for _, total in seen] == [0, 6, 12, 18, 24, 30]
    assert recorder.events == ["run"] * 3 + ["record"] + ["replay"] * 3
    for value in range(5):
        graph.run(torch.full((1, 2), float(value)))
    assert [total for _, total in seen[6:]] == [0, 2, 4, 6, 8]
    assert recorder.events[7:] == ["run"] * 3 + ["record"] + ["replay"] * 2


def test_a_step_that_cannot_be_recorded_says_why_and_memory_that_ran_out_stays_that() -> None:
    for error, expected in (
        (RuntimeError("operation not permitted when stream is capturing\nmore"), TrainingError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ):

        def refuse(work: object, error: Exception = error) -> None:
            raise error

        recorder = RepeatingRecorder()
        recorder.record = refuse  # type: ignore[method-assign, assignment]
        graph = StepGraph(lambda x: None, recorder)
        for _ in range(WARM_UP_STEPS):
            graph.run(torch.zeros(1))
        with pytest.raises(expected, match=r"stream is capturing\); set train.cuda_graph=false|out of memory"):
            graph.run(torch.zeros(1))


class NoHost(TorchDispatchMode):
    """Fails where the host reads a tensor, makes one from its own numbers, or a shape depends on data.

    It looks into the operators of this package; what torch's own C++ does inside one operation it does not see.
    """

    forbidden = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "unique",
        "lift_fresh",
        "equal",
    )
    ours = {op._opoverload: op._init_fn for op in (node.unitization, node.unitization_backward)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.forbidden, f"{func} within a step that is to be recorded"
        if func in self.ours:
            with self:
                return self.ours[func](*args)
        return func(*args, **(kwargs or {}))


def tensors_of_a_step(model: str, norm: str, optimizer: str, precision: str) -> tuple[Any, list[Tensor]]:
    """What `compute_whole_step` looks at of a run, and its inputs."""
    config = Config(
        train=TrainConfig(cuda_graph=True, precision=precision, ema_decay=0.9, label_smoothing=0.1),  # type: ignore[arg-type]
        optim=OptimConfig(clip_norm=1.0, name=optimizer),  # type: ignore[arg-type]
    )
    net = build_model(ModelConfig(name=model, num_classes=10, norm=norm), image_size_px=32, sync=False)  # type: ignore[arg-type]
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), sync_gradients=True, backward=lambda loss: loss.backward(),
        accumulate=lambda model: contextlib.nullcontext(),
    )  # fmt: skip
    engine = Engine(accelerator=accelerator, world=World.single(), config=config.train, image_shape=(3, 32, 32))
    engine.module = engine.model = net.train()
    engine.optimizer = build_optimizer(net, config.optim, learning_rate=0.1, recordable=True)
    run = SimpleNamespace(
        config=config, engine=engine, mixup=None, sums=TrainSums(engine.device), average=WeightAverage(net, 0.9)
    )
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([1, 2])
    return run, [images, labels, labels]


@pytest.mark.parametrize(
    ("model", "norm", "optimizer"),
    [
        ("cifar_resnet20", "unitization", "sgd"),
        ("cifar_resnet20", "batchnorm", "adamw"),
        ("timm:resnet18", "unitization", "sgd"),
    ],
)
def test_the_whole_step_reads_nothing_back_and_has_no_shape_that_depends_on_data(
    model: str, norm: str, optimizer: str
) -> None:
    run, inputs = tensors_of_a_step(model, norm, optimizer, "fp32")
    for _ in range(2):  # the first makes the optimizer's buffers
        with NoHost():
            compute_whole_step(run, *inputs)
    run.sums.add = lambda loss, logits, labels: loss.item()
    with NoHost(), pytest.raises(AssertionError, match="_local_scalar_dense"):  # the check can fail
        compute_whole_step(run, *inputs)


def test_every_operation_of_the_step_has_its_shapes_without_its_numbers() -> None:
    """torch's fake tensors have no numbers: whatever needs one to go on, in C++ too, fails."""
    run, inputs = tensors_of_a_step("cifar_resnet20", "unitization", "sgd", "bf16")
    engine, mode = run.engine, FakeTensorMode()
    fakes = {value: nn.Parameter(mode.from_tensor(value.detach())) for value in engine.module.parameters()}
    for module in engine.module.modules():
        for key, value in module._parameters.items():
            module._parameters[key] = None if value is None else fakes[value]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else mode.from_tensor(buffer)
    for group in engine.optimizer.param_groups:
        group["params"] = [fakes[value] for value in group["params"]]
        group["lr"] = mode.from_tensor(group["lr"])
    run.sums.window = mode.from_tensor(run.sums.window)
    run.average.state = {name: mode.from_tensor(value) for name, value in run.average.state.items()}
    inputs = [mode.from_tensor(value) for value in inputs]
    with mode:
        for _ in range(2):
            compute_whole_step(run, *inputs)
        with pytest.raises(DataDependentOutputException):  # the check can fail
            run.sums.window.sum().item()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.engine=deepspeed"], r"train\.engine: deepspeed is not offered with train\.cuda_graph: true"),
        (["train.precision=fp16"], r"train\.precision: fp16 is not offered with train\.cuda_graph: true"),
        (["train.compile=true"], r"train\.compile: True is not offered with train\.cuda_graph: true"),
        (["train.accumulation_steps=2"], r"train\.accumulation_steps: 2 is not offered with train\.cuda_graph: true"),
        (["optim.name=lars"], r"optim\.name: lars reads its learning rate on the host.*use sgd or adamw"),
        (["optim.name=lamb"], r"optim\.name: lamb reads its learning rate on the host.*use sgd or adamw"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_the_config(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SMALL, ["train.cuda_graph=true", *overrides])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is refused")
def test_without_a_gpu_the_run_ends_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: true needs a CUDA device"):
        run_of(tmp_path, "never", "train.cuda_graph=true")
    assert not (tmp_path / "never").exists()


def test_several_ranks_are_refused_by_the_run_and_by_the_dry_run() -> None:
    config = load_config(SMALL, ["train.cuda_graph=true"])
    world = World(rank=0, local_rank=0, size=2, local_size=2)
    for refuse in (lambda: step_graph.check_ranks(config, world), lambda: dry_run(config, world, num_samples=192)):
        with pytest.raises(ConfigError, match=r"train\.cuda_graph: true is for one process, this job has 2"):
            refuse()
    step_graph.check_ranks(config, World.single())
