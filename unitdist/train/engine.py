"""The data-parallel engine: DDP or DeepSpeed behind Accelerate, chosen by `train.engine`, never by a silent fallback.

Accelerate, left to itself, turns several of the launches that users try into N lonely runs or into plain DDP. So the
engine says what it wants, and `_check_is_what_was_asked` stops the run when it got something else.
"""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from unitdist.config import Config, TrainConfig
from unitdist.errors import ConfigError, TrainingError
from unitdist.train import deepspeed_engine
from unitdist.train.step_graph import check_device, check_ranks
from unitdist.world import World

AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class Engine:
    """The running engine.

    `module` is the plain network (its names are the checkpoint's names), `model` the wrapped one that is called in
    training, `optimizer` the plain torch optimizer whose `param_groups` hold the learning rate; `image_shape` is one
    training image's (channels, height, width).
    """

    accelerator: Accelerator
    world: World
    config: TrainConfig
    image_shape: tuple[int, int, int]
    module: nn.Module | None = None
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    sharded_optimizer: Any = None
    """DeepSpeed's optimizer around `optimizer`, under ZeRO 1 to 3."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def uses_deepspeed(self) -> bool:
        return self.config.engine == "deepspeed"

    @property
    def shards_state(self) -> bool:
        """True where weights or optimizer lie in shards, so that gathering them takes every rank."""
        return self.uses_deepspeed and self.config.zero_stage > 0

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Autocast to `train.precision`; parameters, statistics and gradients stay float32."""
        return torch.autocast(
            self.device.type, dtype=AUTOCAST_DTYPES[self.config.precision], enabled=self.config.precision != "fp32"
        )

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of `values` (same shape on all ranks) over the job, in place."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        """(world size, *values.shape): every rank's `values`, in rank order."""
        if self.world.size == 1:
            return values[None].clone()
        parts = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()


def start_engine(config: Config, world: World) -> Engine:
    """Join the job: process group, device, Accelerator. Raises ConfigError, TrainingError."""
    train = config.train
    check_ranks(config, world)
    check_device(config)
    if train.engine == "ddp" and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "the launcher asks for DeepSpeed, the config for train.engine: ddp; set train.engine=deepspeed"
        )
    if torch.cuda.is_available() and world.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"{world.local_size} processes on this node, {torch.cuda.device_count()} GPUs; start at most one process a GPU"
        )
    on_gpu = torch.cuda.is_available()
    process_group = InitProcessGroupKwargs(
        backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=train.timeout_s)
    )
    accumulation = GradientAccumulationPlugin(num_steps=train.accumulation_steps, sync_with_dataloader=False)
    if train.engine == "deepspeed":
        deepspeed_engine.check_supported(config)
        _announce_single_process(world)
        plugin = deepspeed_engine.build_plugin(config, world, on_gpu=on_gpu)
        accelerator = Accelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[process_group], gradient_accumulation_plugin=accumulation
        )
    else:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="no",
            # Alone, Accelerate would take a backend for the sign of a group that was formed before.
            kwargs_handlers=[process_group, ddp] if world.size > 1 else [],
            gradient_accumulation_plugin=accumulation,
        )
    image_shape = (len(config.data.mean), config.data.image_size_px, config.data.image_size_px)
    engine = Engine(accelerator=accelerator, world=world, config=train, image_shape=image_shape)
    if train.precision == "fp16":
        engine.scaler = torch.amp.GradScaler(engine.device.type)
    if on_gpu:
        torch.cuda.set_device(engine.device)
        torch.backends.cudnn.benchmark = not config.run.deterministic
    torch.use_deterministic_algorithms(config.run.deterministic)
    _check_is_what_was_asked(engine)
    return engine


def prepare(engine: Engine, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Wrap the network, whose weights are loaded already: DDP and DeepSpeed broadcast rank 0's at construction."""
    engine.module, engine.optimizer = module, optimizer
    with warnings.catch_warnings():
        # Accelerate's handler knows only the old name of this DDP argument.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        if engine.uses_deepspeed:
            engine.model, wrapped = engine.accelerator.prepare(module, optimizer)
            deepspeed_engine.check_optimizer(wrapped, engine.config.zero_stage)
            engine.sharded_optimizer = wrapped.optimizer
        else:
            engine.model = engine.accelerator.prepare_model(module)
            if engine.world.size > 1 and not isinstance(engine.model, nn.parallel.DistributedDataParallel):
                raise TrainingError(f"{engine.world.size} processes, but the network is not wrapped in DDP")


def backward(engine: Engine, loss: Tensor) -> None:
    """Backward of one micro-batch, inside `accumulating`. `loss` is the mean over this rank's micro-batch.

    DeepSpeed clips and updates inside its own backward of a step's last micro-batch.
    """
    engine.accelerator.backward(loss if engine.scaler is None else engine.scaler.scale(loss))


def update(engine: Engine, *, clip_norm: float | None) -> None:
    """After the last micro-batch of a step: clip and update. Under DeepSpeed that is done already."""
    assert engine.optimizer is not None
    if engine.uses_deepspeed:
        return
    if engine.scaler is not None:
        engine.scaler.unscale_(engine.optimizer)
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(_parameters(engine), clip_norm)
    if engine.scaler is None:
        engine.optimizer.step()
    else:
        engine.scaler.step(engine.optimizer)
        engine.scaler.update()
    engine.optimizer.zero_grad(set_to_none=True)


def gradient_norm(engine: Engine) -> Tensor:
    """l2 norm of the whole gradient, reduced over ranks: a scalar on the device, inf or nan where any element is."""
    return torch.nn.utils.get_total_norm([value.grad for value in _parameters(engine) if value.grad is not None])


def drop_gradients(engine: Engine) -> None:
    assert engine.optimizer is not None
    engine.optimizer.zero_grad(set_to_none=True)


def _parameters(engine: Engine) -> list[nn.Parameter]:
    assert engine.optimizer is not None
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def accumulating(engine: Engine) -> Iterator[None]:
    """Around forward and backward of one micro-batch: gradients are reduced over ranks on the last one of a step only."""
    with engine.accelerator.accumulate(engine.model):
        yield


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    assert engine.optimizer is not None
    for group in engine.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # of a recorded step, which reads it where it lies
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def model_state(engine: Engine) -> dict[str, Tensor]:
    """The network's whole state dict with plain names, on the CPU; collective under ZeRO 3, cheap elsewhere."""
    assert engine.module is not None
    if engine.uses_deepspeed and engine.config.zero_stage == 3:
        return deepspeed_engine.gather_model_state(engine.module)
    return {name: value.detach().to("cpu", copy=True) for name, value in engine.module.state_dict().items()}


def optimizer_state(engine: Engine) -> dict[str, object]:
    """Optimizer state by parameter name, the same form for DDP and every ZeRO stage; collective under ZeRO 1 to 3."""
    assert engine.module is not None and engine.optimizer is not None
    names = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if engine.uses_deepspeed and engine.config.zero_stage > 0:
        return {"state": deepspeed_engine.gather_optimizer_state(engine, names)}
    state = {
        name: {key: _to_cpu(value) for key, value in engine.optimizer.state[parameter].items()}
        for name, parameter in names.items()
        if parameter in engine.optimizer.state
    }
    steps = [group["step"] for group in engine.optimizer.param_groups if "step" in group]  # timm's LAMB counts here
    return {"state": state, "group_steps": steps}


def load_optimizer_state(engine: Engine, saved: dict[str, object]) -> None:
    """Put back what `optimizer_state` gave, after `prepare`. Collective under ZeRO 1 to 3."""
    assert engine.module is not None and engine.optimizer is not None
    names = dict(engine.module.named_parameters())
    state = saved["state"]
    assert isinstance(state, dict)
    if engine.uses_deepspeed and engine.config.zero_stage > 0:
        deepspeed_engine.restore_optimizer_state(engine, names, state)
        return
    engine.optimizer.state.clear()
    recorded = engine.config.cuda_graph  # then AdamW counts its steps on the device, else on the host
    for name, values in state.items():
        parameter = names[name]
        engine.optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, Tensor) and (value.dim() or recorded) else value
            for key, value in values.items()
        }
    for group, step in zip(engine.optimizer.param_groups, saved.get("group_steps") or [], strict=False):  # type: ignore[call-overload]
        group["step"] = step


def stop_engine() -> None:
    """Leave the job. No barrier here: a rank that leaves because of an error must not wait for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _to_cpu(value: object) -> object:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _announce_single_process(world: World) -> None:
    """DeepSpeed wants a launcher's variables even for one process."""
    if world.size > 1 or "MASTER_ADDR" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _check_is_what_was_asked(engine: Engine) -> None:
    accelerator, world = engine.accelerator, engine.world
    if accelerator.num_processes != world.size or accelerator.process_index != world.rank:
        raise TrainingError(
            f"the launcher announced rank {world.rank} of {world.size}, Accelerate runs rank {accelerator.process_index} of "
            f"{accelerator.num_processes}; this would be {world.size} lonely trainings"
        )
    kind = accelerator.distributed_type
    if engine.uses_deepspeed != (kind == DistributedType.DEEPSPEED):
        raise TrainingError(f"train.engine: {engine.config.engine} was asked for, Accelerate runs {kind.value}")
    if world.size > 1 and not (dist.is_initialized() and dist.get_world_size() == world.size):
        raise TrainingError(f"no process group of {world.size} ranks was formed ({kind.value})")
